"""Claims about a patient's influence: what a crowd adds to an update, and what is left of it.

The mean of an update is a known vector: each patient's own clipped gradient, once for each step,
through the optimiser. A share of the un-noised update, clipping by layer, by image or by what
others send, a learning rate that follows the labels, each moves it. The crowds differ in labels,
in number and in how large the others' gradients are, and the models that are sent make gradients
small, large, or so large that their squares are no float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.evidence import (
    Claim,
    Evidence,
    Vector,
    normal_p,
)
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import Kind, cohort_of
from cloister_fl.client.privacy_audit.whole_round.noise_claims import judge_variance
from cloister_fl.client.privacy_audit.whole_round.round_reference import Law, Reference
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import ThrowawaySite

_BIAS = 3e-3
"""What float32 gradients and their path err by, as a share of all that the crowd adds; the
gradients of DenseNet-121 err by that much."""


@dataclass(frozen=True, eq=False)
class Crowd:
    """A round to ask for, in which everybody takes part.

    Attributes:
        what: it in words.
        counts: patients of each kind.
        model: the weights that are sent, (D,).
    """

    what: str
    counts: Sequence[int]
    model: NDArray[np.float32]


def judge_crowds(
    evidence: Evidence,
    where: str,
    reference: Reference,
    site: ThrowawaySite,
    kinds: Sequence[Kind],
    crowds: Sequence[Crowd],
    *,
    noise_multiplier: float,
    first: int = 1,
    claim: Claim = Claim.INFLUENCE,
) -> list[Vector]:
    """Ask for one round a crowd, one after the other, and judge each update.

    Args:
        evidence: where tests are counted.
        where: what is asked, in words.
        reference: of the site's study, whose sampling rate is 1.
        site: the site that is asked.
        kinds: of the patients.
        crowds: the rounds.
        noise_multiplier: sigma of each step.
        first: number of the first round.
        claim: what a wrong mean refutes.

    Returns:
        The noise of each round, whitened, where all values are seen.
    """
    noises = []
    sizes: list[tuple[float, float]] = []
    for number, crowd in enumerate(crowds, start=first):
        site.place(cohort_of(site.study, kinds, crowd.counts))
        here = [(kind, count) for kind, count in zip(kinds, crowd.counts, strict=True) if count]
        some, counts = [kind for kind, _ in here], [count for _, count in here]
        law = reference.law(
            some, counts, crowd.model, noise_multiplier=noise_multiplier, number=number
        )
        update = site.train(number, crowd.model)
        noise = judge_update(
            evidence, f"{crowd.what}, {where}", reference, law, counts, update, claim, sizes
        )
        if law.seen.all():
            noises.append(noise)
    if sizes:
        z, bias = (sum(each) / math.sqrt(len(sizes)) for each in zip(*sizes, strict=True))
        evidence.test(claim, f"size of the mean updates, all crowds, {where}", normal_p(z, bias))
    return noises


def judge_update(
    evidence: Evidence,
    where: str,
    reference: Reference,
    law: Law,
    counts: Sequence[int],
    update: Vector,
    claim: Claim,
    sizes: list[tuple[float, float]] | None = None,
) -> Vector:
    """Judge one update of a crowd in which everybody takes part; return its noise, whitened.

    ``sizes`` gets by how many deviations the mean is too large, and by how many it may be.
    """
    values = law.whitened(update)
    if not np.isfinite(values).all():
        evidence.require(claim, f"finite update, {where}", holds=False)
        return np.zeros_like(values)
    present = np.asarray(counts, np.float64)
    mean = present @ law.shares if len(present) else np.zeros_like(values)
    size = float(np.linalg.norm(mean))
    bias = _BIAS * float(present @ np.linalg.norm(law.shares, axis=1)) if len(present) else 0.0
    if size > 0:
        along = float((values - mean) @ mean) / size
        if sizes is not None:
            sizes.append((along, bias))
        evidence.test(
            claim,
            f"size of the mean update, {where}",
            normal_p(along, bias),
            f"{1 + along / size:.4f} of what the patients' clipped gradients add up to",
        )
        found, noise = law.participants(update)
        some = np.flatnonzero(law.adding)
        errors = np.abs(found - present)[some] / np.sqrt(np.diag(law.covariance)[some])
        worst = int(errors.argmax())
        evidence.test(
            claim,
            f"what a patient adds, {where}",
            len(errors) * normal_p(float(errors[worst]), bias),
            f"{found[some[worst]]:.3f} patients are seen where {counts[some[worst]]} are there",
        )
    else:
        noise = values
    judge_variance(evidence, where, reference, law, noise[None], lost=len(present))
    return noise


def judge_nothing_left(
    evidence: Evidence, where: str, before: Law, counts: Sequence[int], law: Law, update: Vector
) -> None:
    """Judge a round without patients after one with a crowd: nothing of the crowd is in it.

    Args:
        evidence, where: as of ``judge_crowds``.
        before: law of the crowd's round, over the same values.
        counts: of the crowd.
        law: of the round without patients.
        update: of the round without patients.
    """
    values = law.whitened(update)
    directions = [np.asarray(counts, np.float64) @ before.shares, *before.shares]
    errors = [
        float(values @ each) / norm
        for each in directions
        if (norm := float(np.linalg.norm(each))) > 0
    ]
    worst = max(errors, key=abs)
    if math.isnan(sum(errors)):
        worst = math.nan
    evidence.test(
        Claim.ROUNDS_APART,
        f"what is left of the patients of the round before, {where}",
        len(errors) * normal_p(worst),
        f"{worst:.1f} standard deviations of the noise",
    )


def judge_signs(evidence: Evidence, where: str, direction: Vector, update: Vector) -> None:
    """Judge a round without patients after one with a crowd, where its law is only symmetric.

    Given their magnitudes, the values' signs are fair coins, so their sum along the crowd's
    direction is sub-Gaussian (Hoeffding 1963).
    """
    terms = update * direction
    length = float(np.linalg.norm(terms))
    z = float(terms.sum()) / length if length > 0 else math.nan
    evidence.test(
        Claim.ROUNDS_APART,
        f"what is left of the patients of the round before, {where}",
        2 * math.exp(-z * z / 2) if math.isfinite(z) else 0.0,
        f"{z:.1f} standard deviations at most",
    )
