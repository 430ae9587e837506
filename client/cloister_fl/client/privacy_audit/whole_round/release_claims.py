"""Claims about the noised evaluation: how far a patient moves the counts, and the noise on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_fl.client.data.cohort import Cohort, split_apart, subset
from cloister_fl.client.privacy_audit.whole_round.evidence import (
    Claim,
    Evidence,
    Vector,
    normal_cdf,
    normal_p,
    shape_p,
    variance_p,
)
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import (
    WHITE,
    Kind,
    cohort_of,
    kinds_of,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference
from cloister_fl.client.privacy_audit.whole_round.sum_claims import hostile_model
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import ThrowawaySite
from cloister_fl.client.training.noised_evaluation import counts_in_units
from cloister_fl.networks import flat_parameters
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for

Whole = NDArray[np.int64]
_BINS, _UNITS = 16, 16
"""Bins of a score histogram, and units to a patient in one curve."""


@dataclass(frozen=True, eq=False)
class Released:
    """What is known of a study's release.

    Attributes:
        study: the study.
        model: the weights that are sent.
        kinds: of the patients.
        counts: patients of each kind at the site.
        exact: the counts of those who are kept apart, in units, flat.
        deviation: of the noise in each number.
    """

    study: Study
    model: NDArray[np.float32]
    kinds: Sequence[Kind]
    counts: Sequence[int]
    exact: Vector
    deviation: float

    @property
    def cohort(self) -> Cohort:
        """The site's patients."""
        return cohort_of(self.study, self.kinds, self.counts)

    def noise(self, counts: Whole) -> Vector:
        """The noise of a release, in its standard deviations."""
        found: Vector = (counts - self.exact) / self.deviation
        return found


def sensitivity_of(study: Study) -> float:
    """How far one patient moves the counts: 1 patient in one bin of each curve, in units."""
    classes = len(study.task.strata)
    return _UNITS * math.sqrt(1 if classes == 2 else classes)


def released_of(study: Study, models: Path | None = None, *, patients: int = 12) -> Released:
    """Make the patients of a release, and count them."""
    kinds = kinds_of(study, 4)
    counts = [patients // 4] * 4
    model = hostile_model(Reference(study, models), 3.0)
    used = charges(study).release
    deviation = used.noise_multiplier * sensitivity_of(study) if used is not None else 0.0
    made = Released(study, model, kinds, counts, np.zeros(0), deviation)
    _, kept = split_apart(made.cohort, study.evaluation.site_fraction)
    exact = _exact(study, model, kept, models).reshape(-1).astype(np.float64)
    return Released(study, model, kinds, counts, exact, deviation)


def _exact(study: Study, model: NDArray[np.float32], cohort: Cohort, models: Path | None) -> Whole:
    """The counts by the definition: in one bin a curve, the mean score over a patient's images."""
    module = build_for(study, models=models)
    flat_parameters.load(module, model)
    module.eval()
    classes = len(study.task.strata)
    curves = (1,) if classes == 2 else tuple(range(classes))
    total = np.zeros((len(curves), 2, _BINS), np.int64)
    for patient in cohort.patients:
        pixels = (cohort.images[list(patient.images)] / WHITE - 0.5) / 0.25
        with torch.no_grad():
            logits = module(torch.from_numpy(pixels).float().unsqueeze(1))
        scores = torch.softmax(logits.double(), dim=1).mean(dim=0).numpy()
        for place, each in enumerate(curves):
            chosen = min(int(scores[each] * _BINS), _BINS - 1)
            total[place, int(patient.label == each), chosen] += _UNITS
    return total


def release(known: Released, folder: Path, name: str, models: Path | None = None) -> Whole:
    """Ask a new site for its release."""
    site = ThrowawaySite(folder, known.study, known.model, name=name, models=models)
    site.place(known.cohort)
    return site.evaluate(known.model)


def judge_releases(
    evidence: Evidence, where: str, known: Released, releases: Sequence[Whole]
) -> list[Vector]:
    """Judge noise and mean of some releases; return the noises."""
    noises = [known.noise(counts) for counts in releases]
    values = np.concatenate(noises)
    squares, rounding = float(np.square(values).sum()), 1 / (12 * known.deviation**2)
    evidence.test(
        Claim.NOISE_SIZE,
        f"size of the release's noise, {where}",
        variance_p(squares, len(values), slack=max(1e-3, 2 * rounding)),
        f"{math.sqrt(squares / len(values)):.4f} of what the study claims",
    )
    # Whole numbers, spread over their units, are continuous again.
    spread = values + np.random.default_rng(0).uniform(-0.5, 0.5, len(values)) / known.deviation
    evidence.test(
        Claim.NOISE_SHAPE,
        f"distribution of the release's noise, {where}",
        shape_p(normal_cdf(spread), slack=max(1e-3, 2 * rounding)),
    )
    directions = {"patients": known.exact, "everything": np.ones_like(known.exact)}
    for what, direction in directions.items():
        length = float(np.linalg.norm(direction))
        if length > 0:
            z = sum(float(noise @ direction) for noise in noises) / (
                length * math.sqrt(len(noises))
            )
            evidence.test(
                Claim.RELEASE,
                f"mean of the released counts along {what}, {where}",
                normal_p(z),
                f"{z:.1f} standard deviations",
            )
    return noises


def judge_counts(
    evidence: Evidence, where: str, known: Released, models: Path | None = None
) -> None:
    """Judge the counts before their noise: whole numbers, and how far a patient moves them."""
    study, cohort = known.study, known.cohort
    module = build_for(study, models=models)
    reference, most = Reference(study, models), sensitivity_of(study)
    for what, model in (
        ("sent model", known.model),
        ("huge weights", hostile_model(reference, 1e30)),
        ("largest weights", hostile_model(reference, 1e38)),
    ):
        flat_parameters.load(module, model)

        def counted(places: Sequence[int]) -> Whole:
            some = subset(cohort, [cohort.patients[place] for place in places])
            return counts_in_units(module, some, study)

        everyone = range(len(cohort.patients))
        whole = counted(everyone)
        for place in everyone:
            less = whole - counted([other for other in everyone if other != place])
            norm = float(np.linalg.norm(less.astype(np.float64)))
            evidence.require(
                Claim.RELEASE,
                f"one patient is within the sensitivity, {what}, {where}",
                norm <= most * (1 + 1e-9),
                f"the counts move by {norm:.3f} units; {most:.3f} is claimed",
            )
            evidence.require(
                Claim.APART,
                f"a patient counts the same alone and beside others, {what}, {where}",
                np.array_equal(less, counted([place])),
            )
