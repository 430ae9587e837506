from __future__ import annotations

import pytest

from cloister_fl.errors import ParameterRefused, SecureAggregationError
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.study.schema import Aggregation
from support.errors import is_of, raises


@pytest.mark.parametrize(
    ("n", "c", "t", "m", "dropouts"),
    [
        (3, 0, 3, 3, 0),
        (4, 1, 3, 4, 0),
        (5, 1, 4, 4, 1),
        (7, 1, 5, 5, 2),
        (10, 1, 7, 7, 3),
        (10, 4, 8, 8, 2),
        (20, 1, 14, 14, 6),
        (50, 1, 34, 34, 16),
    ],
)
def test_of_the_specification(n: int, c: int, t: int, m: int, dropouts: int) -> None:
    parameters = Parameters.derive(n, c)
    assert (parameters.t, parameters.m, parameters.dropouts) == (t, m, dropouts)


def test_two_quorums_share_an_honest_site() -> None:
    for n in range(3, 101):
        for c in range(n):
            try:
                parameters = Parameters.derive(n, c)
            except SecureAggregationError as error:
                if not is_of(error, ParameterRefused):
                    raise
                continue
            assert 2 * parameters.t > n + c
            assert parameters.t >= 2 * n // 3 + 1
            assert c + 3 <= parameters.m <= n
            assert parameters.t <= parameters.m


@pytest.mark.parametrize(
    ("n", "c"), [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (5, 3), (5, -1), (1001, 1)]
)
def test_refused(n: int, c: int) -> None:
    with raises(ParameterRefused):
        Parameters.derive(n, c)


def test_cautions() -> None:
    assert len(Parameters.derive(3, 0).cautions) == 2
    assert len(Parameters.derive(4).cautions) == 1
    assert not Parameters.derive(5).cautions


@pytest.mark.parametrize("c", range(101))
def test_a_study_says_how_few_sites_are_enough(c: int) -> None:
    fewest = Aggregation(min_sites=1, colluders=c).fewest_sites
    assert Parameters.derive(fewest, c).n == fewest
    with raises(ParameterRefused):
        Parameters.derive(fewest - 1, c)
