"""P-values of the audit of rounds: not too small for sound numbers, and small for unsound ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cloister_fl.client.privacy_audit.whole_round import evidence
from cloister_fl.client.privacy_audit.whole_round.evidence import (
    LEVEL,
    MOST_TESTS,
    THRESHOLD,
    Claim,
    Evidence,
    chernoff_p,
    correlation_p,
    count_p,
    normal_cdf,
    normal_p,
    same_law_p,
    shape_p,
    variance_p,
)
from cloister_fl.errors import InternalError

Draw = Callable[[np.random.Generator], float]


def _chernoff(generator: np.random.Generator) -> float:
    heads = float(generator.binomial(60, 0.3))

    def log_moments(scale: float) -> float:
        return 60 * math.log1p(0.3 * math.expm1(scale))

    scales = np.geomspace(1e-3, 20, 100)
    sides = [chernoff_p(heads, log_moments, sign * scales) for sign in (1, -1)]
    return min(1.0, 2 * min(sides))


SOUND: dict[str, Draw] = {
    "variance": lambda g: variance_p(float(np.square(g.standard_normal(200)).sum()), 200),
    "variance, few values": lambda g: variance_p(float(np.square(g.standard_normal(3)).sum()), 3),
    "variance, projected": lambda g: variance_p(
        float(np.square(g.standard_normal(190)).sum()), 200, lost=10
    ),
    "mean": lambda g: normal_p(float(g.standard_normal())),
    "mean, biased": lambda g: normal_p(float(g.standard_normal()) + 0.3, bias=0.3),
    "count": lambda g: count_p(int(g.binomial(500, 0.01)), 500, 0.01),
    "count of half": lambda g: count_p(int(g.binomial(40, 0.5)), 40, 0.5),
    "shape": lambda g: shape_p(normal_cdf(g.standard_normal(300))),
    "two samples": lambda g: same_law_p(g.standard_normal(500), g.standard_normal(500)),
    "correlation": lambda g: correlation_p([g.standard_normal(64) for _ in range(5)])[0],
    "moments": _chernoff,
}


@pytest.mark.parametrize("name", SOUND)
def test_no_p_value_is_too_small_for_sound_numbers(name: str) -> None:
    """2,000 draws with fixed seeds: below each level at most that share, and five deviations."""
    generator = np.random.default_rng(7)
    found = np.array([SOUND[name](generator) for _ in range(2_000)])
    assert found.max() <= 1
    assert found.min() >= 0
    for level in (0.2, 0.05, 0.01, 0.002):
        assert (found < level).mean() <= level + 5 * math.sqrt(level / len(found))


UNSOUND: dict[str, Draw] = {
    "4 % too little": lambda g: variance_p(
        float(np.square(0.96 * g.standard_normal(30_000)).sum()), 30_000
    ),
    "3 % too much": lambda g: variance_p(
        float(np.square(1.03 * g.standard_normal(30_000)).sum()), 30_000
    ),
    "nothing": lambda g: variance_p(0.0, 100),
    "a mean": lambda g: normal_p(float(g.standard_normal()) + 9),
    "no tail": lambda g: count_p(0, 10_000, 0.0027),
    "too many": lambda g: count_p(70, 10_000, 0.0027),
    "all": lambda g: count_p(40, 40, 0.5),
    "uniform, not Gaussian": lambda g: shape_p(
        normal_cdf(g.uniform(-math.sqrt(3), math.sqrt(3), 20_000))
    ),
    "another law": lambda g: same_law_p(g.standard_normal(9_000), g.laplace(size=9_000)),
    "no number": lambda g: min(variance_p(math.nan, 9), normal_p(math.nan)),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_unsound_is_below_the_threshold(name: str) -> None:
    generator = np.random.default_rng(7)
    assert all(UNSOUND[name](generator) < THRESHOLD for _ in range(20))


def test_a_repeated_stream_is_found_at_any_offset() -> None:
    generator = np.random.default_rng(1)
    stream = generator.standard_normal(900)
    others = [generator.standard_normal(400) for _ in range(4)]
    p, told = correlation_p([*others, stream[:400], stream[70:470]])
    assert p < THRESHOLD
    assert told.startswith("vectors 4 and 5")
    assert correlation_p([*others, stream[:400]])[0] > 0.01
    assert correlation_p([stream])[0] == 1


def test_the_level_is_shared_out_and_no_more() -> None:
    """Union bound: MOST_TESTS tests at THRESHOLD each accuse sound code with LEVEL at most."""
    assert pytest.approx(LEVEL) == MOST_TESTS * THRESHOLD
    assert LEVEL <= 0.05
    found = Evidence()
    for _ in range(MOST_TESTS):
        found.test(Claim.NOISE_SIZE, "again", THRESHOLD)
    assert not found.refuted
    with pytest.raises(InternalError, match="more tests"):
        found.test(Claim.NOISE_SIZE, "once more", 1.0)


@pytest.mark.parametrize(("p", "refuted"), [(1.0, False), (0.0, True), (math.nan, True)])
def test_what_is_no_number_refutes(p: float, refuted: bool) -> None:
    found = Evidence()
    found.test(Claim.SAMPLING, "test", p, "seen")
    assert found.refuted is refuted
    found.require(Claim.SUM, "check", holds=True)
    assert found.refuted is refuted
    assert (found.tests, found.checks) == ({Claim.SAMPLING: 1}, {Claim.SUM: 1})
    found.require(Claim.SUM, "check", holds=False, detail="why")
    assert (found.findings[-1].claim, found.findings[-1].p) == (Claim.SUM, 0.0)


def test_claims_say_what_they_mean() -> None:
    for claim in evidence.Claim:
        assert claim.says[0].islower()
        assert claim.means.endswith(".")
    assert len({claim.says for claim in Claim}) == len(Claim)
