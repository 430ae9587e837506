"""Audit of whole rounds: made-up sites are asked as a coordinator asks, and the answers judged.

The adversary is the one whom a study's epsilon is claimed against: it chooses every model, knows
every patient but for who was sampled, and sees each update by itself. It asks the installed app,
by messages, so that gate, ledger, data handling, sampling, gradients, clipping, noise, optimiser
and release are what a run would meet. ``evidence`` says how rarely sound code is accused.

Without a study it looks at small ones of its own, with each engine and optimiser. With a study it
also asks for that study's own rounds, on made-up patients.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.audited_studies import small_study
from cloister_fl.client.privacy_audit.whole_round.charge_claims import judge_charges
from cloister_fl.client.privacy_audit.whole_round.epsilon_claim import judge_epsilon
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence, Vector
from cloister_fl.client.privacy_audit.whole_round.front_door import judge_front_door
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
    judge_variance,
)
from cloister_fl.client.privacy_audit.whole_round.opening import (
    NAMES,
    open_audit,
    open_elsewhere,
    opening,
)
from cloister_fl.client.privacy_audit.whole_round.release_claims import (
    judge_counts,
    judge_releases,
    release,
    released_of,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Law, Reference, steps_of
from cloister_fl.client.privacy_audit.whole_round.sampling_claims import (
    Attendance,
    attendance,
    following,
    judge_rate,
    judge_repeats,
    judge_sizes,
)
from cloister_fl.client.privacy_audit.whole_round.sum_claims import (
    HUGE,
    hostile_model,
    judge_networks,
    judge_synthetic,
)
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import (
    RoundRefused,
    ThrowawaySite,
)
from cloister_fl.errors import BudgetExhausted
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study

Progress: TypeAlias = Callable[[int, int], None]
Stage: TypeAlias = Callable[[Evidence, Path], None]
_RELEASES = 12


@dataclass(frozen=True)
class RoundAudit:
    """What an audit of whole rounds found.

    Attributes:
        evidence: its tests and what they refute.
        done: the stages that were gone through, in words.
        left: the stages that were not, after a refutation.
    """

    evidence: Evidence
    done: tuple[str, ...]
    left: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether no claim is refuted; not a proof of them."""
        return not self.evidence.refuted


def audit_rounds(stages: dict[str, Stage], *, progress: Progress | None = None) -> RoundAudit:
    """Go through the stages, up to the first that refutes a claim.

    Args:
        stages: what to do, by what it is called.
        progress: called with (stages done, stages in all).
    """
    evidence, names = Evidence(), list(stages)
    done: list[str] = []
    with _one_thread(), tempfile.TemporaryDirectory(prefix="cloister-audit-") as folder:
        for name in names:
            below = Path(folder) / str(len(done))
            below.mkdir(mode=0o700)
            try:
                stages[name](evidence, below)
            except RoundRefused as error:
                evidence.require(Claim.TAKES_PART, name, False, f"{error.reason}: {error.told}")
            except BudgetExhausted as error:
                # The made-up site's own ledger: the study costs more than its epsilon.
                evidence.require(Claim.EPSILON, name, False, f"{error.what} {error.why}")
            done.append(name)
            if progress is not None:
                progress(len(done), len(names))
            if evidence.refuted:
                break
    return RoundAudit(evidence, tuple(done), tuple(names[len(done) :]))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from several, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stages_of_code(models: Path | None = None) -> dict[str, Stage]:
    """The stages of an audit of the installed code, quick ones first.

    Args:
        models: the site's folder of pretrained weights.
    """
    return {
        "noise, sampling and release, here and in another process": _opening,
        "what the ledger says": judge_charges,
        "a site that reads DICOM files": judge_front_door,
        "clipped sums of made-up gradients": lambda evidence, _: judge_synthetic(evidence),
        "noise of a large network": _large_noise,
        "crowds, one patient at a time": lambda e, f: _crowds(e, f, engine="patients", steps=4),
        "crowds, Opacus' hooks": lambda e, f: _crowds(e, f, engine="opacus", steps=2),
        "crowds, momentum and FedProx": lambda e, f: _crowds(
            e, f, steps=3, momentum=0.9, proximal=0.5, schedule="cosine"
        ),
        "rounds of Adam": _adam,
        "counts and noise of a release": _releases,
        "clipped sums of the networks": lambda e, _: judge_networks(e, models),
    }


def _opening(evidence: Evidence, folder: Path) -> None:
    asked = opening()
    every = (open_audit(folder / "first"), open_elsewhere(), open_audit(folder / "again"))
    law = _law(asked.noisy, asked.model)
    rounds = [one for each in every for name in NAMES for one in each[f"noise/{name}"]]
    judge_noise(evidence, "rounds without patients", Reference(asked.noisy), law, rounds)
    noises = [law.whitened(one) for one in rounds]
    sampled, counts = asked.sampled, [1] * len(asked.kinds)
    steps, rate = steps_of(sampled), sampled.training.sampling_rate
    law = _law(sampled, asked.model, asked.kinds, counts)
    drawn: dict[tuple[int, str], list[Attendance]] = {}
    left: list[Vector] = []
    for place, each in enumerate(every):
        for name in NAMES:
            found = [
                attendance(law, counts, update, steps=steps, rate=rate)
                for update in each[f"sampling/{name}"]
            ]
            drawn[place, name] = [one for one, _ in found]
            left += [noise for _, noise in found]
    judge_variance(
        evidence, "sampled rounds", Reference(sampled), law, np.stack(left), lost=len(counts)
    )
    judge_freshness(evidence, "rounds, sites and processes", [*noises, *left])
    here, there = NAMES
    for what, one, other in (
        ("another process", (0, here), (1, here)),
        ("another site in another process", (0, here), (1, there)),
        ("the same site again", (0, here), (2, here)),
        ("another site", (0, here), (0, there)),
    ):
        judge_repeats(evidence, what, list(zip(drawn[one], drawn[other], strict=True)))
    judge_repeats(evidence, "the next round", following(drawn[0, here]))
    everything = [one for each in drawn.values() for one in each]
    judge_rate(evidence, "all rounds", everything)
    judge_sizes(evidence, "all rounds", everything)
    releases = [
        np.rint(each[f"release/{name}"]).astype(np.int64) for each in every for name in NAMES
    ]
    noises = judge_releases(evidence, "sites and processes", asked.released, releases)
    judge_freshness(evidence, "releases", noises)
    for study in (asked.noisy, sampled, asked.released.study):
        judge_epsilon(evidence, study.study.name, study)


def _law(
    study: Study,
    model: NDArray[np.float32],
    kinds: Sequence[Kind] = (),
    counts: Sequence[int] = (),
    *,
    number: int = 1,
) -> Law:
    return Reference(study).law(
        kinds, counts, model, noise_multiplier=charges(study).step.noise_multiplier, number=number
    )


def _large_noise(evidence: Evidence, folder: Path) -> None:
    """One step a round: then the noise's own distribution is seen, and not a sum's."""
    study = small_study("large-noise", width=64, rounds=3)
    model = Reference(study).first * np.float32(0.75)
    site = ThrowawaySite(folder / "site", study, model)
    site.place(cohort_of(study, [], []))
    rounds = [site.train(number, model) for number in range(1, 4)]
    law = _law(study, model)
    judge_noise(evidence, "one step of a large network", Reference(study), law, rounds)
    judge_pieces(evidence, "a large network", [law.whitened(one) for one in rounds])


def _crowds(evidence: Evidence, folder: Path, **training: Any) -> None:
    """Rounds of one site after another, in which everybody takes part."""
    study = small_study("crowds", rounds=9, **training)
    kinds, reference = kinds_of(study, 8), Reference(study)
    plain = reference.first * np.float32(0.75)
    sharp, huge = hostile_model(reference, 10.0), hostile_model(reference, HUGE)
    gentle = hostile_model(reference, 0.1)
    undefined = plain.copy()
    undefined[reference.layers[0][1]] = np.float32(3e38)
    where = f"{study.training.engine}, {study.training.optimizer}"
    if study.training.momentum:
        where += " with momentum"
    crowds = [
        Crowd("all kinds alike", [4] * 8, plain),
        Crowd("one class", [8, 0] * 4, plain),
        Crowd("another class", [0, 8] * 4, plain),
        Crowd("a rare class", [1, 0, 0, 8, 0, 8, 0, 8], plain),
        Crowd("small and large gradients", [4] * 8, sharp),
        Crowd("gradients that need no clipping", [1, 7] * 4, gentle),
        Crowd("gradients whose squares overflow", [4] * 8, huge),
    ]
    site = ThrowawaySite(folder / "site", study, plain)
    sigma = charges(study).step.noise_multiplier
    noises = judge_crowds(evidence, where, reference, site, kinds, crowds, noise_multiplier=sigma)
    # Nobody's gradient is a number, so nobody counts.
    law = _law(study, undefined, number=8)
    update = site.train(8, undefined)
    judge_update(
        evidence, f"gradients that are no numbers, {where}", reference, law, [], update,
        Claim.INFLUENCE,
    )  # fmt: skip
    site.place(cohort_of(study, [], []))
    law = _law(study, plain, number=9)
    before = _law(study, plain, kinds, [4] * 8, number=9)
    update = site.train(9, plain)
    judge_update(evidence, f"nobody, {where}", reference, law, [], update, Claim.ROUNDS_APART)
    judge_nothing_left(evidence, where, before, [4] * 8, law, update)
    judge_freshness(evidence, where, [*noises, law.whitened(update)])
    judge_epsilon(evidence, where, study)


def _adam(evidence: Evidence, folder: Path) -> None:
    """A crowd's round, then rounds without patients."""
    study = small_study("adam", rounds=4, steps=3, optimizer="adam", learning_rate=1e-6)
    kinds, reference = kinds_of(study, 8), Reference(study)
    plain = reference.first * np.float32(0.75)
    site = ThrowawaySite(folder / "site", study, plain)
    site.place(cohort_of(study, kinds, [16] * 8))
    site.train(1, plain)
    site.place(cohort_of(study, [], []))
    rounds = [site.train(number, plain) for number in range(2, 5)]
    rate = study.training.learning_rate
    scaled = [update / rate for update in rounds]
    judge_adam(evidence, "rounds without patients", steps_of(study), scaled)
    gradients = reference.gradients(kinds, plain.astype(np.float64), study.privacy.clipping_norm)
    judge_signs(evidence, "Adam", gradients.sum(axis=0), rounds[0])


def _releases(evidence: Evidence, folder: Path) -> None:
    known = opening().released
    judge_counts(evidence, "64 classes", known)
    counts = [
        release(known, folder / f"site-{place}", f"site-{place}") for place in range(_RELEASES)
    ]
    noises = judge_releases(evidence, "many sites", known, counts)
    judge_freshness(evidence, "releases of many sites", noises)
    two = released_of(small_study("two-classes", rounds=1, release=100.0))
    judge_counts(evidence, "2 classes", two)
