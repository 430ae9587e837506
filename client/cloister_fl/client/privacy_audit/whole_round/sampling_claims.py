"""Claims about sampling: each patient joins each step by a coin that nobody else can throw.

In a study with little noise, how many patients of each kind took part in a round's steps can be
read off its update. Repeats of the same run, round and seed, at this site in another folder, at
another site or in another process, must show other patients each time; and as many of them as
coins of the study's rate give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloister_fl.client.privacy_audit.whole_round.evidence import (
    Claim,
    Evidence,
    Vector,
    chernoff_p,
    count_p,
    normal_cdf,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Law

_SCALES = np.geomspace(1e-3, 60, 120)


@dataclass(frozen=True, eq=False)
class Attendance:
    """Who took part in a round, as an update shows it.

    Attributes:
        coins: heads of each kind over all steps: a whole number and what noise there is (kinds,).
        thrown: coins of each kind: its patients times the steps (kinds,).
        rate: the study's sampling rate.
        covariance: of the noise in ``coins``.
    """

    coins: Vector
    thrown: Vector
    rate: float
    covariance: Vector

    @property
    def excess(self) -> Vector:
        """Heads above what is expected."""
        return self.coins - self.rate * self.thrown


def attendance(
    law: Law, counts: Sequence[int], update: Vector, *, steps: int, rate: float
) -> tuple[Attendance, Vector]:
    """Read who took part off an update; the noise that is left comes with it, whitened.

    Args:
        law: of the update, of plain gradient descent.
        counts: patients of each kind.
        update: (D,).
        steps: of the round.
        rate: the study's sampling rate.
    """
    found, noise = law.participants(update)
    thrown = np.asarray(counts, np.float64) * steps
    return Attendance(found * steps, thrown, rate, law.covariance * steps**2), noise


def following(rounds: Sequence[Attendance]) -> list[tuple[Attendance, Attendance]]:
    """Rounds with the round after each, no round in two pairs: the second of all are then fresh."""
    return list(zip(rounds[0::2], rounds[1::2], strict=False))


def judge_repeats(
    evidence: Evidence, where: str, pairs: Sequence[tuple[Attendance, Attendance]]
) -> None:
    """Judge whether rounds that agree in all that is public drew other patients.

    Given the first of each pair, the inner product of both excesses is a weighted sum of fresh
    coins and Gaussian noise, whose moments are known.
    """
    seen = sum(float(one.excess @ other.excess) for one, other in pairs)

    def log_moments(scale: float) -> float:
        """Of the sum where the scale is above 0, of its negative where it is below."""
        total = 0.0
        for one, other in pairs:
            tilt = scale * one.excess
            coins = np.logaddexp(math.log1p(-other.rate), math.log(other.rate) + tilt)
            total += float(other.thrown @ (coins - other.rate * tilt))
            total += float(tilt @ other.covariance @ tilt) / 2
        return total

    p = 2 * min(chernoff_p(seen, log_moments, _SCALES), chernoff_p(seen, log_moments, -_SCALES))
    alike = seen / max(sum(float(one.excess @ one.excess) for one, _ in pairs), 1e-300)
    evidence.test(
        Claim.SAMPLING,
        f"the same patients are drawn, {where}",
        p,
        f"{alike:.2f} of the deviations agree",
    )


def judge_rate(evidence: Evidence, where: str, rounds: Sequence[Attendance]) -> None:
    """Judge how often each kind, and everybody together, was drawn over some rounds."""
    kinds = len(rounds[0].coins)
    heads = sum(one.coins for one in rounds)
    thrown = sum(one.thrown for one in rounds)
    covariance = sum(one.covariance for one in rounds)
    rate, lowest, worst = rounds[0].rate, 1.0, ""
    for some in (np.ones(kinds), *np.eye(kinds)):
        coins, deviation = float(some @ thrown), float(some @ covariance @ some)
        excess = float(some @ heads) - rate * coins
        p = 2 * _rate_p(excess, coins, rate, deviation)
        if not p > lowest:
            lowest, worst = p, f"drawn with a rate of {float(some @ heads) / coins:.4f}"
    evidence.test(Claim.SAMPLING, f"rate of sampling, {where}", (kinds + 1) * lowest, worst)


def _rate_p(excess: float, coins: float, rate: float, variance: float) -> float:
    sign = math.copysign(1.0, excess)

    def log_moments(scale: float) -> float:
        tilt = sign * scale
        one = float(np.logaddexp(math.log1p(-rate), math.log(rate) + tilt))
        return coins * (one - rate * tilt) + tilt * tilt * variance / 2

    return chernoff_p(abs(excess), log_moments, _SCALES)


def judge_sizes(evidence: Evidence, where: str, rounds: Sequence[Attendance]) -> None:
    """Judge whether the number of those drawn varies from round to round as coins do.

    The middle of the law is where batches of a fixed size always are.
    """
    middle = 0
    for one in rounds:
        total = np.ones(len(one.coins))
        deviation = math.sqrt(float(total @ one.covariance @ total))
        middle += (
            0.375 < _cdf(float(one.coins.sum()), int(one.thrown.sum()), one.rate, deviation) < 0.625
        )
    p = count_p(middle, len(rounds), 0.25, slack=0.01)
    evidence.test(
        Claim.SAMPLING,
        f"number of those drawn, {where}",
        p,
        f"{middle} of {len(rounds)} rounds in the middle quarter",
    )


def _cdf(value: float, coins: int, rate: float, deviation: float) -> float:
    """Distribution of the heads of some coins with Gaussian noise on them."""
    heads = np.arange(coins + 1)
    steps = np.log(np.arange(1, coins + 1))
    factorials = np.concatenate([[0.0], np.cumsum(steps)])
    ways = factorials[coins] - factorials - factorials[::-1]
    chances = np.exp(ways + heads * math.log(rate) + (coins - heads) * math.log1p(-rate))
    places = np.asarray((value - heads) / max(deviation, 1e-9), np.float64)
    return float(chances @ normal_cdf(places))
