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


def test_the_counting_lemma_over_all_attempts_and_commits() -> None:
    """No two sums over other sites, and no site's b and mask_sk both, from any n and c.

    However the server splits views, each honest site answers for one U3, written before its answer,
    over all attempts at a sum; each of the c colluders answers for every one. So whatever the
    number of attempts, the honest sites are split into those that answer for A, those that answer
    for B, and the rest; a secret that needs answers from both sides needs t of each.
    """
    tried = 0
    for n in range(4, 41):
        for c in range(6):
            if c + 3 > n:
                continue
            try:
                t = Parameters.derive(n, c).t
            except SecureAggregationError:
                continue
            honest = n - c
            for one in range(honest + 1):
                for other in range(honest + 1 - one):
                    tried += 1
                    assert not (one + c >= t and other + c >= t), (n, c, one, other)
            # One less, and the lemma fails where it is tight: the bound is not idle.
            if 2 * t == n + c + 1:
                assert 2 * (t - 1 - c) <= honest
    assert tried > 60_000


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
