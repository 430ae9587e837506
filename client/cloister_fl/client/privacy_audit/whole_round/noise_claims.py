"""Claims about noise: its size in each step, its shape, and that it is drawn anew.

Rounds without patients are noise and nothing else, through the optimiser. Where that is linear
the sum over a round's steps has a known variance in each weight; noise in some steps only, one
draw for all steps, noise over the number of steps, or noise that is cut off, each changes it.
Adam's update is not linear: it is held against updates of Adam that are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cloister_fl.client.privacy_audit.whole_round.evidence import (
    FEWEST,
    Claim,
    Evidence,
    Vector,
    correlation_p,
    count_p,
    normal_cdf,
    normal_p,
    same_law_p,
    shape_p,
    variance_p,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Law, Reference

_TAILS = (2.5, 3.0, 3.5, 4.0)
_SHAPE_SLACK = 2e-4
"""What rounding to the float32 grid moves the distribution by, at most, once it is dithered."""
_PIECE = 1 << 16
"""Values of a vector that is held against others."""
_SAMPLE = 20_000
_ADAM_SLACK = 0.01
"""What rounding of weights moves the distribution of Adam's updates by, at most."""


def judge_noise(
    evidence: Evidence, where: str, reference: Reference, law: Law, rounds: Sequence[Vector]
) -> None:
    """Judge updates of rounds without patients.

    Args:
        evidence: where tests are counted.
        where: what is asked, in words.
        reference: knows the layers.
        law: of such an update.
        rounds: updates, (D,) each.
    """
    values = np.stack([law.whitened(update) for update in rounds])
    judge_variance(evidence, where, reference, law, values)
    total = float(values.sum()) / math.sqrt(values.size)
    evidence.test(Claim.NOISE_SIZE, f"mean of the noise, {where}", normal_p(total, 0.05))
    dithered = values + np.random.default_rng(0).uniform(-0.5, 0.5, values.shape) * (
        law.grid / law.deviation
    )
    uniform = normal_cdf(dithered.reshape(-1))
    evidence.test(
        Claim.NOISE_SHAPE, f"distribution of the noise, {where}", shape_p(uniform, _SHAPE_SLACK)
    )
    for edge in _TAILS:
        beyond, chance = int((np.abs(dithered) > edge).sum()), math.erfc(edge / math.sqrt(2))
        evidence.test(
            Claim.NOISE_SHAPE,
            f"noise beyond {edge:g} standard deviations, {where}",
            count_p(beyond, values.size, chance, slack=0.01),
            f"{beyond:,} of {values.size:,}; expected {chance * values.size:,.0f}",
        )


def judge_variance(
    evidence: Evidence,
    where: str,
    reference: Reference,
    law: Law,
    values: Vector,
    *,
    lost: int = 0,
) -> None:
    """Judge the variance of whitened noise, as a whole and in each layer.

    Args:
        evidence, where, reference, law: as of ``judge_noise``.
        values: (rounds, V).
        lost: dimensions that a projection took out of each round.
    """
    squares = np.square(values)
    p = variance_p(float(squares.sum()), values.size, lost * len(values))
    ratio = math.sqrt(float(squares.mean()))
    evidence.test(
        Claim.NOISE_SIZE,
        f"size of the noise, {where}",
        p,
        f"{ratio:.4f} of what the study claims, from {values.size:,} values",
    )
    places = np.cumsum(law.seen) - 1
    layers = [
        (name, places[part][law.seen[part]])
        for name, part in reference.layers
        if law.seen[part].any()
    ]
    lowest, worst = 1.0, ""
    for name, some in layers:
        part = squares[:, some]
        found = variance_p(float(part.sum()), part.size, lost * len(values))
        if found <= lowest:
            lowest, worst = found, f"{name}: {math.sqrt(float(part.mean())):.4f}"
    if layers:
        evidence.test(
            Claim.NOISE_SIZE, f"size of the noise in a layer, {where}", len(layers) * lowest, worst
        )


def judge_freshness(evidence: Evidence, where: str, noises: Sequence[Vector]) -> None:
    """Judge whether noises, whitened and of one length, are independent of each other."""
    if len(noises) > 1:
        p, detail = correlation_p(noises)
        evidence.test(Claim.NOISE_FRESH, f"repeated noise, {where}", p, detail)


def judge_pieces(evidence: Evidence, where: str, noises: Sequence[Vector]) -> None:
    """Judge whether the parts of long noises are independent, each of the same length."""
    pieces = [
        noise[start : start + _PIECE]
        for noise in noises
        for start in range(0, len(noise) - _PIECE + 1, _PIECE)
    ]
    judge_freshness(evidence, f"within an update, {where}", pieces[:40])


def judge_adam(evidence: Evidence, where: str, steps: int, rounds: Sequence[Vector]) -> None:
    """Judge updates of rounds without patients where Adam makes them of the noise.

    Their law does not depend on the noise's size, for Adam takes it out; it does on how the noises
    of the steps are related. With one step each value is the learning rate, up or down.

    Args:
        evidence, where: as of ``judge_noise``.
        steps: of a round.
        rounds: updates over the learning rate, (D,) each.
    """
    values = np.concatenate(rounds)[:_SAMPLE]
    high = int((values > 0).sum())
    evidence.test(
        Claim.NOISE_SHAPE, f"signs of Adam's update, {where}", count_p(high, len(values), 0.5)
    )
    if steps > 1 and len(values) >= FEWEST:
        p = same_law_p(values, _adam(steps, len(values)), _ADAM_SLACK)
        evidence.test(Claim.NOISE_SIZE, f"distribution of Adam's update, {where}", p)


def _adam(steps: int, count: int) -> Vector:
    """Updates of Adam (Kingma and Ba 2015) on independent noise, over the learning rate."""
    generator = np.random.default_rng()
    mean, square, moved = np.zeros(count), np.zeros(count), np.zeros(count)
    for step in range(1, steps + 1):
        noise = generator.standard_normal(count)
        mean = 0.9 * mean + 0.1 * noise
        square = 0.999 * square + 0.001 * noise**2
        moved -= (mean / (1 - 0.9**step)) / np.sqrt(square / (1 - 0.999**step))
    return moved
