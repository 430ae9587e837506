"""The rounds of one study, asked of a made-up site: with its own network, engine, steps and rate.

Rounds without patients are asked for as the study has them, to the last constant; only secure
aggregation is off, so that a single update is seen. What shows single patients is asked for with
little noise, a tiny learning rate and plain gradient descent beside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.audited_studies import loud, shown
from cloister_fl.client.privacy_audit.whole_round.epsilon_claim import judge_epsilon
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence, Vector
from cloister_fl.client.privacy_audit.whole_round.influence_claims import (
    Crowd,
    judge_crowds,
    judge_nothing_left,
    judge_signs,
    judge_update,
)
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import (
    Kind,
    cohort_of,
    kinds_of,
)
from cloister_fl.client.privacy_audit.whole_round.noise_claims import (
    judge_adam,
    judge_freshness,
    judge_noise,
    judge_pieces,
)
from cloister_fl.client.privacy_audit.whole_round.release_claims import (
    judge_counts,
    judge_releases,
    release,
    released_of,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import (
    Law,
    Reference,
    steps_of,
)
from cloister_fl.client.privacy_audit.whole_round.sampling_claims import (
    attendance,
    following,
    judge_rate,
    judge_repeats,
)
from cloister_fl.client.privacy_audit.whole_round.sum_claims import (
    HUGE,
    hostile_model,
    judge_study,
)
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import ThrowawaySite
from cloister_fl.client.training.per_patient_gradients import Engine
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study

Stage: TypeAlias = Callable[[Evidence, Path], None]

_SECONDS = 60.0
"""Processor time that the gradients of a stage may take, about."""
_VALUE_S = 5e-8
"""Processor time of one value of one step: its noise, its rounding, its place in the sum."""
_ROUNDS = 6
_RELEASES = 10
_SEEN = 1 << 18
"""Values of an update that are held against those of others."""


@dataclass(frozen=True, eq=False)
class StudyRounds:
    """The stages of one study.

    Attributes:
        study: the study, with privacy on.
        models: the site's folder of pretrained weights.
    """

    study: Study
    models: Path | None = None

    def stages(self) -> dict[str, Stage]:
        """What to do, by what it is called."""
        name = self.study.study.name
        found: dict[str, Stage] = {
            f"{name}: epsilon": lambda e, _: judge_epsilon(e, name, self.study),
            f"{name}: rounds without patients": self._noise,
            f"{name}: clipped sums": self._sums,
            f"{name}: crowds": self._crowds,
        }
        if self.study.training.sampling_rate < 1:
            found[f"{name}: sampling"] = self._sampling
        if self.study.releases:
            found[f"{name}: release"] = self._release
        return found

    @cached_property
    def _reference(self) -> Reference:
        return Reference(shown(self.study), self.models)

    @cached_property
    def _model(self) -> NDArray[np.float32]:
        first = self._reference.first
        return first * np.float32(0.75)

    @cached_property
    def _gradient_s(self) -> float:
        """What the gradient of a patient with one image takes here, roughly."""
        kinds, clip = kinds_of(self._asked, 1, images=(1,)), self.study.privacy.clipping_norm
        began = time.process_time()
        self._reference.gradients(kinds, self._model.astype(np.float64), clip)
        return max(time.process_time() - began, 1e-3)

    @property
    def _asked(self) -> Study:
        return shown(self.study)

    def _affordable(self, gradients: int) -> int:
        """Patients of which ``gradients`` each can be had in the time there is."""
        return int(_SECONDS / (self._gradient_s * gradients))

    def _site(self, folder: Path, study: Study) -> ThrowawaySite:
        return ThrowawaySite(folder, study, self._model, models=self.models)

    def _law(
        self, reference: Reference, kinds: list[Kind], counts: list[int], *, number: int = 1
    ) -> Law:
        sigma = charges(reference.study).step.noise_multiplier
        return reference.law(kinds, counts, self._model, noise_multiplier=sigma, number=number)

    def _noise(self, evidence: Evidence, folder: Path) -> None:
        """A crowd's round, then rounds without patients, at two sites that are asked the same."""
        study, reference = self._asked, self._reference
        where, clip = study.study.name, study.privacy.clipping_norm
        kinds = kinds_of(study, 4, images=(1,), flat=study.training.augment)
        many = max(1, min(8, self._affordable(4 * steps_of(study))))
        rounds, noises = list[Vector](), list[Vector]()
        weights = self._model.astype(np.float64)
        direction = reference.gradients(kinds, weights, clip).sum(axis=0)
        affordable = int(_SECONDS / (2 * reference.size * steps_of(study) * _VALUE_S))
        last = min(study.training.rounds, _ROUNDS, max(2, affordable))
        adam = study.training.optimizer == "adam"
        for name in ("first", "again"):
            site = self._site(folder / name, study)
            if last > 1:
                site.place(cohort_of(study, kinds, [many] * len(kinds)))
                site.train(1, self._model)
            site.place(cohort_of(study, [], []))
            for number in range(2 if last > 1 else 1, last + 1):
                update = site.train(number, self._model)
                if adam:
                    rounds.append(update / study.training.rate_of(number))
                    noises.append(np.sign(update))
                    continue
                law = self._law(reference, [], [], number=number)
                judge_noise(evidence, f"round {number}, {name}, {where}", reference, law, [update])
                noises.append(law.whitened(update))
                if number == 2:
                    before = Law(
                        law.seen,
                        law.deviation,
                        (direction[law.seen] / law.deviation)[None],
                        law.grid,
                    )
                    judge_nothing_left(evidence, f"{where}, {name}", before, [1], law, update)
            if adam and last > 1:
                judge_signs(evidence, f"{where}, {name}", direction, rounds[-last + 1])
        if adam:
            judge_adam(evidence, where, steps_of(study), rounds)
        if len({len(noise) for noise in noises}) == 1:
            judge_freshness(evidence, where, [noise[:_SEEN] for noise in noises])
        judge_pieces(evidence, where, noises[:1])

    def _sums(self, evidence: Evidence, _: Path) -> None:
        # A study with privacy names no other, see ``gradient_engines``.
        engines: tuple[Engine] = (
            "opacus" if self.study.training.engine == "opacus" else "patients",
        )
        # A model of either kind, each with sums of all, of all but one, and of one.
        patients = max(3, min(20, self._affordable(14)))
        judge_study(evidence, self._asked, self.models, patients=patients, engines=engines)

    def _crowds(self, evidence: Evidence, folder: Path) -> None:
        some = 4 if self._gradient_s > 0.05 else 8
        steps = min(steps_of(self.study), max(2, self._affordable(6 * some)))
        study = loud(self._asked, rounds=6, steps=steps, everybody=True)
        reference = Reference(study, self.models)
        kinds, strata = kinds_of(study, some, images=(1, 2)), len(study.task.strata)
        each = max(1, min(8, self._affordable(steps_of(study) * 6 * some)))
        one = [2 * each if place % strata == 0 else 0 for place in range(some)]
        other = [2 * each if place % strata == 1 else 0 for place in range(some)]
        rare = [1, *(2 * each if place % strata else 0 for place in range(1, some))]
        crowds = [
            Crowd("all kinds alike", [each] * some, self._model),
            Crowd("one class", one, self._model),
            Crowd("another class", other, self._model),
            Crowd("a rare class", rare, self._model),
            Crowd("huge gradients", [each] * some, hostile_model(reference, HUGE)),
        ]
        site = self._site(folder / "site", study)
        sigma = charges(study).step.noise_multiplier
        where = study.study.name
        judge_crowds(evidence, where, reference, site, kinds, crowds, noise_multiplier=sigma)
        site.place(cohort_of(study, [], []))
        law = self._law(reference, [], [], number=6)
        update = site.train(6, self._model)
        judge_update(evidence, where, reference, law, [], update, Claim.ROUNDS_APART)

    def _sampling(self, evidence: Evidence, folder: Path) -> None:
        """Two sites of one name, run, seed and round, each in a folder of its own."""
        rounds = 5
        rate = self.study.training.sampling_rate
        steps = min(steps_of(self.study), max(2, int(self._affordable(80) / rate)))
        study = loud(self._asked, rounds=rounds, steps=steps, everybody=False)
        reference = Reference(study, self.models)
        kinds = kinds_of(study, 8, images=(1,))
        # Thirty coins that fall heads in each kind over all rounds, where time allows.
        wanted = math.ceil(30 / (rate * steps * rounds))
        each = max(1, min(wanted, int(self._affordable(len(kinds) * rounds * 2) / (rate * steps))))
        counts = [each] * len(kinds)
        law = self._law(reference, kinds, counts)
        drawn, noises = [], list[Vector]()
        for name in ("first", "again"):
            site = self._site(folder / name, study)
            site.place(cohort_of(study, kinds, counts))
            found = [
                attendance(law, counts, site.train(number, self._model), steps=steps, rate=rate)
                for number in range(1, rounds + 1)
            ]
            drawn.append([one for one, _ in found])
            noises += [noise[:_SEEN] for _, noise in found]
        where = study.study.name
        judge_repeats(evidence, f"the same again, {where}", list(zip(*drawn, strict=True)))
        pairs = [pair for one in drawn for pair in following(one)]
        judge_repeats(evidence, f"the next round, {where}", pairs)
        judge_rate(evidence, where, [one for both in drawn for one in both])
        judge_freshness(evidence, f"sampled rounds, {where}", noises)

    def _release(self, evidence: Evidence, folder: Path) -> None:
        known, where = released_of(self._asked, self.models), self.study.study.name
        judge_counts(evidence, where, known, self.models)
        counts = [
            release(known, folder / f"site-{place}", f"site-{place}", self.models)
            for place in range(_RELEASES)
        ]
        judge_freshness(evidence, where, judge_releases(evidence, where, known, counts))


def stages_of_study(study: Study, models: Path | None = None) -> dict[str, Stage]:
    """The stages of an audit of a study's own rounds.

    Args:
        study: with privacy on, and an engine that supports its claim.
        models: the site's folder of pretrained weights.
    """
    return StudyRounds(study, models).stages()
