"""Plan of a study: noise, epsilon, bytes and signal-to-noise, by arithmetic alone.

Signal and noise are compared for one noised step. Patients who all pull the same way, each at the
clipping norm C, give an expected sum of norm q N C; no cohort gives more. The noise has a norm of
about sigma C sqrt(d) for d trained weights. Their ratio, q N / (sigma sqrt(d)), is at most what a
step tells; a real one tells less, for patients disagree. Over T steps the signals add, and the
noises as a square root does, so that the whole study has sqrt(T) times the ratio of a step. Full
participation (q = 1) gets the most out of an epsilon: its steps compose to one Gaussian, whatever
their number. The share of that which a setting keeps is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloister_fl.privacy.accounting import calibrate, epsilon_trajectory
from cloister_fl.study.cost import charges, release_mechanism
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.schema import Study

WORD = 4
"""Bytes of one number on the way: float32, or a word of 32 bits with secure aggregation."""


@dataclass(frozen=True)
class Pace:
    """What this machine takes for one patient, in seconds; see ``timing``.

    Attributes:
        gradient: for each patient that a step samples.
        once: for each patient of the site, once a round.
    """

    gradient: float
    once: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Sampling rate, rounds and steps, and what they give within the study's epsilon.

    Attributes:
        sampling_rate: q, above 0 and at most 1.
        rounds: 1 or more.
        steps_per_round: 1 or more.
        noise_multiplier: sigma, the least that keeps the epsilon.
        step_ratio: signal-to-noise of a step, all sites together; see the module.
        study_ratio: of all steps together.
        share: ``study_ratio`` over that of full participation at the same epsilon.
        passes: expected gradients of each patient over the study, q T: what it costs to compute.
    """

    sampling_rate: float
    rounds: int
    steps_per_round: int
    noise_multiplier: float
    step_ratio: float
    study_ratio: float
    share: float
    passes: float


@dataclass(frozen=True)
class SitePlan:
    """One site's part.

    Attributes:
        patients: N, 1 or more.
        sampled: expected patients of a step.
        step_ratio: signal-to-noise of a step of this site alone; None where privacy is off.
        minutes: a round on this machine.
        delta_too_large: whether delta is above 1 / (10 N).
    """

    patients: int
    sampled: float
    step_ratio: float | None
    minutes: float
    delta_too_large: bool


@dataclass(frozen=True)
class Plan:
    """The answers.

    Attributes:
        study: what is planned.
        weights: trained weights, d.
        pace: what this machine takes for one patient.
        sites: in the order given.
        bytes_each_way: a round, to a site and again from it; keys and signatures come on top.
        setting: the study's own; None where privacy is off.
        epsilons: upper bounds on epsilon after rounds 1, 2, ...; empty where privacy is off.
        release: noise multiplier of the study's release; None where it has none.
        whole: epsilon of training and release together; None where privacy is off.
        others: settings within the same epsilon, to compare; empty where privacy is off.
    """

    study: Study
    weights: int
    pace: Pace
    sites: tuple[SitePlan, ...]
    bytes_each_way: int
    setting: Setting | None
    epsilons: tuple[float, ...]
    others: tuple[Setting, ...]
    release: float | None = None
    whole: float | None = None

    @property
    def better(self) -> Setting | None:
        """The other setting that keeps the most, where it keeps at least a hundredth more.

        Of those that keep the same to a thousandth, the one that takes the least computing.
        """
        if self.setting is None:
            return None
        most = max((other.share for other in self.others), default=0.0)
        near = [other for other in self.others if other.share >= most - 1e-3]
        best = min(near, key=lambda other: other.passes, default=self.setting)
        return best if best.share >= self.setting.share + 0.01 else None


def make_plan(study: Study, patients: Sequence[int], *, weights: int, pace: Pace) -> Plan:
    """Plan a study for sites of given sizes, which weigh the same and each add their own noise.

    Args:
        study: what is planned.
        patients: each site's number of patients, 1 or more; guesses will do. Those whom a release
            keeps apart are not trained on, and taken off.
        weights: d, 1 or more.
        pace: what a machine takes for one patient.

    Raises:
        StudyInvalid: the study's engine does not support its privacy claim.
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    require_sound_engine(study)
    training, privacy = study.training, study.privacy
    setting: Setting | None = None
    epsilons: tuple[float, ...] = ()
    others: tuple[Setting, ...] = ()
    release = release_mechanism(study)
    whole: float | None = None
    share = 1 - study.evaluation.site_fraction if study.releases else 1.0
    trained = [share * count for count in patients]
    if privacy.enabled:
        whole = charges(study).epsilon()
        given = (training.sampling_rate, training.rounds, training.steps_per_round)
        setting = _setting(study, given, trained, weights)
        others = tuple(_setting(study, one, trained, weights) for one in _neighbours(*given))
        epsilons = epsilon_trajectory(
            setting.noise_multiplier,
            training.sampling_rate,
            training.steps_per_round,
            training.rounds,
            privacy.delta,
        )
    sites = [_site(study, count, share, pace, setting, weights) for count in patients]
    return Plan(
        study,
        weights,
        pace,
        tuple(sites),
        WORD * weights,
        setting,
        tuple(epsilons),
        others,
        None if release is None else release.noise_multiplier,
        whole,
    )


def ratio(rate: float, patients: Sequence[float], noise_multiplier: float, weights: int) -> float:
    """Signal-to-noise of a step of all sites together.

    Each site adds its full noise: the signals add, the S noises as a square root does, and the
    result is q sum(N) / (sigma sqrt(S d)).
    """
    return rate * sum(patients) / (noise_multiplier * math.sqrt(len(patients) * weights))


def _setting(
    study: Study, given: tuple[float, int, int], patients: Sequence[float], weights: int
) -> Setting:
    rate, rounds, per_round = given
    privacy, steps = study.privacy, rounds * per_round
    release = release_mechanism(study)
    beside = () if release is None else ((release, 1),)
    noise = calibrate(privacy.epsilon, privacy.delta, rate, steps, beside)
    full = calibrate(privacy.epsilon, privacy.delta, 1.0, 1, beside)
    step = ratio(rate, patients, noise, weights)
    share = rate * math.sqrt(steps) / noise * full
    return Setting(
        rate, rounds, per_round, noise, step, step * math.sqrt(steps), share, rate * steps
    )


def _neighbours(rate: float, rounds: int, steps: int) -> list[tuple[float, int, int]]:
    """Larger rates at the same rounds, larger rates at the same work, and fewer rounds."""
    larger = sorted({min(1.0, rate * factor) for factor in (2, 4)} | {1.0})
    found = [(other, rounds, steps) for other in larger]
    found += [(other, max(1, round(rounds * rate / other)), steps) for other in larger]
    found += [(rate, max(1, rounds // 2), steps)]
    return [one for one in dict.fromkeys(found) if one != (rate, rounds, steps)]


def _site(
    study: Study, patients: int, share: float, pace: Pace, setting: Setting | None, weights: int
) -> SitePlan:
    training, privacy = study.training, study.privacy
    trained = share * patients
    sampled = training.sampling_rate * trained
    seconds = training.steps_per_round * sampled * pace.gradient + trained * pace.once
    alone = None
    if setting is not None:
        alone = ratio(training.sampling_rate, [trained], setting.noise_multiplier, weights)
    too_large = privacy.enabled and privacy.delta * 10 * patients > 1
    return SitePlan(patients, sampled, alone, seconds / 60, too_large)
