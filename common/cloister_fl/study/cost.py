"""Privacy cost of a study: its training steps, and its noised evaluation where it has one.

The release is one Gaussian on the sites' score histograms, after the last round. Its noise comes
from ``evaluation.release_epsilon`` alone, and the noise of training from what is left: both
together, composed as privacy-loss distributions, stay within ``privacy.epsilon``. The patients of
the release are others than those of training, so a patient pays for one of the two only; the whole
is charged to all, for it needs no argument about who is where.

Everything that tells a study's epsilon asks here, so that gate, plan, report and certificate speak
of the same whole. All of it is a public function of the study's constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_fl.privacy.accounting import calibrate, epsilon_of
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from cloister_fl.study.schema import Study

RELEASE_BINS = 16
"""Bins of a score histogram that is noised: each cell gets the same noise, so few are better."""

UNITS = 16
"""Whole numbers to one patient in one curve of a noised histogram; a finer grid for the noise."""


def open_units(study: Study) -> int:
    """Whole numbers to one patient in one curve of exact counts, of a study without privacy.

    1 where patients have labels, else ``UNITS``, as in noised counts: a patient with n units of
    ``Task.unit`` adds floor(UNITS / n) for each, in all one patient at most.
    """
    return 1 if study.task.unit == "patient" else UNITS


@dataclass(frozen=True)
class Charges:
    """The mechanisms of a study.

    Attributes:
        step: of each training step.
        steps: T, over the whole study.
        release: of the release, sampling rate 1; None where the study has none.
        delta: the study's.
    """

    step: Mechanism
    steps: int
    release: Mechanism | None
    delta: float

    def composition(self, steps: int | None = None, *, released: bool = True) -> Composition:
        """So many training steps (all where None), and the noised evaluation where it was made."""
        release = ((self.release, 1),) if self.release is not None and released else ()
        return compose(((self.step, self.steps if steps is None else steps),), release)

    def epsilon(self, steps: int | None = None, *, released: bool = True) -> float:
        """Epsilon of ``composition`` at the study's delta, by privacy-loss distribution."""
        return epsilon_of(self.composition(steps, released=released), self.delta)


def charges(study: Study) -> Charges:
    """Return the least noise that keeps a study within its epsilon, noised evaluation included.

    Raises:
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    training, privacy = study.training, study.privacy
    release = release_mechanism(study)
    noise = calibrate(
        privacy.epsilon,
        privacy.delta,
        training.sampling_rate,
        training.total_steps,
        beside=() if release is None else ((release, 1),),
    )
    step = Mechanism(noise_multiplier=noise, sampling_rate=training.sampling_rate)
    return Charges(step, training.total_steps, release, privacy.delta)


def release_mechanism(study: Study) -> Mechanism | None:
    """Return the mechanism of the noised evaluation, which costs ``evaluation.release_epsilon``.

    The noise multiplier is the noise's standard deviation over the histogram's sensitivity, see
    ``sensitivity``. None where the study releases nothing.

    Raises:
        EpsilonUnreachable: no noise gives that epsilon.
    """
    if not study.releases:
        return None
    noise = calibrate(study.evaluation.release_epsilon, study.privacy.delta, 1.0, 1)
    return Mechanism(noise_multiplier=noise, sampling_rate=1.0)


def sensitivity(study: Study) -> float:
    """Most that one patient moves the noised counts by, in units, in L2: ``Task.sensitivity``.

    Raises:
        ValueError: the study's task has no noised evaluation.
    """
    of_one = study.task.sensitivity
    if of_one is None:
        raise ValueError(f"{study.target.kind} has no noised evaluation.")
    return UNITS * of_one


def study_epsilon(study: Study, rounds: int, *, released: bool = False) -> float | None:
    """Epsilon at the study's delta after ``rounds`` rounds; None where privacy is off.

    With ``released``, the study's noised evaluation is included.

    A public function of the study's constants: it tells nothing of a site's data or ledger.
    """
    if not study.privacy.enabled:
        return None
    return charges(study).epsilon(rounds * study.training.steps_per_round, released=released)
