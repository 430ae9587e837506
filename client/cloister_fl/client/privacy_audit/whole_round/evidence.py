"""Evidence of an audit: tests with a p-value each, and what they refute.

Sound code is accused with a chance of at most ``LEVEL``, whatever the tests have to do with each
other: each of at most ``MOST_TESTS`` tests refutes where its p-value is below LEVEL / MOST_TESTS,
every p-value is exact or too large, and by the union bound MOST_TESTS x LEVEL / MOST_TESTS =
LEVEL. Requirements that hold with certainty in sound code have no share in it.

The p-values are closed bounds without asymptotics, so they hold at any number of values:
Chernoff's for variances, counts and sums, the normal distribution's own tail for projections of
Gaussian noise, and that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990) for
shapes; for two samples of one size, Wei and Dudley (2012).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister_fl.errors import InternalError

LEVEL = 0.01
"""Chance at most with which an audit accuses sound code."""
MOST_TESTS = 1000
"""Tests of chance in one audit, at most."""
THRESHOLD = LEVEL / MOST_TESTS
FEWEST = 458
"""Values of a sample from which the bound for two samples holds (Wei and Dudley 2012)."""

Vector = NDArray[np.float64]


class Claim(enum.Enum):
    """What an installation claims by training with privacy, and what it means where it is false."""

    TAKES_PART = (
        "it trains and measures what its gate lets in",
        "The installed code refused a round that it must be able to train.",
    )
    CHARGE = (
        "each round and each release is charged once, for all its steps, and no second time",
        "Patients pay less than they lose, and the ledger's limits do not hold.",
    )
    EPSILON = (
        "noise, steps and sampling rate keep the study within its epsilon",
        "The study costs its patients more than the epsilon that was approved.",
    )
    NOISE_SIZE = (
        "every step adds noise of the study's noise multiplier times its clipping norm",
        "Updates hide less of a patient than the epsilon says.",
    )
    NOISE_SHAPE = (
        "the noise is Gaussian, tails included",
        "Values that sound noise reaches now and then show that a patient is there, or is not.",
    )
    NOISE_FRESH = (
        "noise is drawn anew in each step, round, release, site and process",
        "Whoever sees two updates can take the noise off.",
    )
    INFLUENCE = (
        "a patient moves a step by the clipped gradient, whoever else is there",
        "Updates tell more of a patient, or of who else is there, than the epsilon says.",
    )
    ROUNDS_APART = (
        "nothing of a round's patients is left in the next, but for the model that was sent",
        "Patients go on to show in rounds that were not charged for them.",
    )
    SAMPLING = (
        "each patient joins each step by a secret coin of the study's sampling rate",
        "Whoever knows who was drawn knows more than the epsilon says.",
    )
    SUM = (
        "one patient moves the clipped sum by at most the clipping norm, exactly",
        "One patient can move an update by more than the noise was made for.",
    )
    APART = (
        "a patient's gradient is computed from that patient alone",
        "Patients mix, so leaving one out changes what the others add.",
    )
    RELEASE = (
        "a patient moves the released counts by at most their sensitivity",
        "The released counts tell more of a patient than the release's epsilon says.",
    )

    def __init__(self, says: str, means: str) -> None:
        self.says = says
        self.means = means


@dataclass(frozen=True)
class Finding:
    """A test that refutes a claim.

    Attributes:
        claim: what is refuted.
        test: what was looked at.
        p: chance at most of such a result from sound code; 0 where it cannot be.
        detail: what was seen, beside what was expected.
    """

    claim: Claim
    test: str
    p: float
    detail: str


@dataclass
class Evidence:
    """The tests of one audit.

    Attributes:
        tests: how many tests of chance were made, by claim.
        checks: how many requirements without chance were looked at, by claim.
        findings: what was refuted.
    """

    tests: dict[Claim, int] = field(default_factory=dict)
    checks: dict[Claim, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def test(self, claim: Claim, what: str, p: float, detail: str = "") -> None:
        """Count a test of chance; it refutes where ``p`` is below ``THRESHOLD``, or no number."""
        if sum(self.tests.values()) >= MOST_TESTS:
            raise InternalError("An audit makes more tests than its level was shared out among.")
        self.tests[claim] = self.tests.get(claim, 0) + 1
        if not p >= THRESHOLD:
            self.findings.append(Finding(claim, what, max(p, 0.0), detail))

    def require(self, claim: Claim, what: str, holds: bool, detail: str = "") -> None:
        """Count a requirement that sound code always meets."""
        self.checks[claim] = self.checks.get(claim, 0) + 1
        if not holds:
            self.findings.append(Finding(claim, what, 0.0, detail))

    @property
    def refuted(self) -> bool:
        """Whether any claim is."""
        return bool(self.findings)


def variance_p(squares: float, values: int, lost: int = 0, slack: float = 1e-4) -> float:
    """p-value of a sum of squares of ``values`` standard normal numbers.

    Chernoff's bound of the chi-square distribution, (r e^(1-r))^(n/2) for the ratio r to n.

    Args:
        squares: the sum.
        values: how many numbers.
        lost: dimensions at most that a projection took out of them; where that may be all of
            them, too small a sum shows nothing.
        slack: relative error at most of the variance that they were divided by.
    """
    if not math.isfinite(squares):
        return 0.0
    high = squares / (values * (1 + slack))
    low = squares / (max(values - lost, 1) * (1 - slack))
    if high > 1:
        return min(1.0, 2 * math.exp(-values / 2 * (high - 1 - math.log(high))))
    if lost < values and low < 1:
        if low <= 0:
            return 0.0
        return min(1.0, 2 * math.exp(-(values - lost) / 2 * (low - 1 - math.log(low))))
    return 1.0


def normal_p(z: float, bias: float = 0.0) -> float:
    """p-value of a standard normal number that is off by ``bias`` at most."""
    if not math.isfinite(z):
        return 0.0
    return math.erfc(max(abs(z) - bias, 0.0) / math.sqrt(2))


def count_p(count: int, of: int, chance: float, slack: float = 1e-3) -> float:
    """p-value of a binomial count (Chernoff), for a chance that is off by a share ``slack``."""
    share = count / of
    edge = chance * (1 + slack) if share > chance else chance * (1 - slack)
    if (share - chance) * (share - edge) <= 0:
        return 1.0
    divergence = 0.0
    for part, whole in ((share, edge), (1 - share, 1 - edge)):
        if part > 0:
            divergence += part * math.log(part / whole) if whole > 0 else math.inf
    return min(1.0, 2 * math.exp(-of * divergence))


def shape_p(uniform: Vector, slack: float = 0.0) -> float:
    """p-value of numbers that are independent and uniform over [0, 1], to within ``slack``."""
    ordered = np.sort(uniform)
    places = np.arange(len(ordered))
    away = max(
        float(((places + 1) / len(ordered) - ordered).max(initial=0.0)),
        float((ordered - places / len(ordered)).max(initial=0.0)),
    )
    return min(1.0, 2 * math.exp(-2 * len(ordered) * max(away - slack, 0.0) ** 2))


def same_law_p(one: Vector, other: Vector, slack: float = 0.0) -> float:
    """p-value of two samples of one size, ``FEWEST`` or more, of one law, to within ``slack``."""
    assert len(one) == len(other) >= FEWEST
    every = np.concatenate([one, other])
    every.sort()
    ranks = [np.searchsorted(np.sort(each), every, side="right") for each in (one, other)]
    away = float(np.abs(ranks[0] - ranks[1]).max()) / len(one)
    return min(1.0, 2 * math.exp(-len(one) * max(away - slack, 0.0) ** 2))


def normal_cdf(values: Vector) -> Vector:
    """Distribution of the standard normal, at each value."""
    import torch

    found: Vector = torch.special.ndtr(torch.from_numpy(np.asarray(values, np.float64))).numpy()
    return found


def correlation_p(vectors: Sequence[Vector]) -> tuple[float, str]:
    """p-value of vectors of one length, independent of each other, of independent numbers that
    are standard normal, or signs that fair coins give.

    Each pair is held against each other at every offset, so that streams that repeat are found
    also where they begin at another place. Given one of two vectors, the inner product with the
    other over its length has the tail of a standard normal number at most (Hoeffding 1963).

    Returns:
        The p-value, and the pair that is most alike.
    """
    highest, pair = 0.0, (0, 0)
    spectra = [np.fft.rfft(vector) for vector in vectors]
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    size, pairs = len(vectors[0]), 0
    for later in range(len(vectors)):
        for earlier in range(later):
            pairs += 1
            products = np.fft.irfft(spectra[earlier] * spectra[later].conj(), size)
            seen = float(np.abs(products).max()) / max(norms[later], 1e-300)
            if not seen <= highest:
                highest, pair = seen, (earlier, later)
    p = min(1.0, pairs * size * 2 * math.exp(-(highest**2) / 2)) if pairs else 1.0
    return p, f"vectors {pair[0]} and {pair[1]}: {highest:.1f} standard deviations"


def chernoff_p(
    seen: float, log_moments: Callable[[float], float], scales: Iterable[float]
) -> float:
    """Bound of the chance that a number is ``seen`` or more, by its moment-generating function.

    Args:
        seen: the number.
        log_moments: logarithm of E exp(s X), or more, for each s above 0.
        scales: values of s to try; the bound holds for each of them.
    """
    if not math.isfinite(seen):
        return 0.0
    return math.exp(min(0.0, *(log_moments(s) - s * seen for s in scales)))
