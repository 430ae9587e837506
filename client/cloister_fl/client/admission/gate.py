"""Admission of a run at a site: policy, approval and privacy ledger, before data are read.

First the site's policy, then the approval of a person or of a rule that a person set, then the
ledger: it reserves all steps of the study, and a round is charged, on disk, before its data are
read.
"""

from __future__ import annotations

import datetime

from cloister_fl.client.admission.approvals import require_approved
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.rollback import is_noted, note, require_newest
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.policy import may_measure, refusals
from cloister_fl.client.site.training_hours import within
from cloister_fl.errors import BudgetExhausted, OutsideHours, PolicyRefused
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.study.cost import charges
from cloister_fl.study.gradient_engines import REMEDY, unsound_engine
from cloister_fl.study.schema import Study


def mechanism(study: Study) -> Mechanism:
    """The mechanism of one step: the least noise that keeps the study within its epsilon.

    A pure function of the study's public constants, computed by each site for itself.

    Raises:
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    return charges(study).step


def consent(site: Site, study: Study, *, invited: int, signatures: bytes = b"") -> None:
    """Pass a study that the policy allows and a person here approved; nothing is reserved.

    Args:
        site: the site.
        study: the study that is asked for.
        invited: number of sites on the federation's list, this one included.
        signatures: who vouches for the study, see ``study.signatures``.

    Raises:
        MessageInvalid: the signatures are no signatures.
        PolicyRefused: the study asks for more than the policy allows, or for an engine that
            does not support its privacy claim, which no policy allows.
        StudyNotApproved: nobody here approved it, nor does the policy; it is kept for review.
        LedgerRolledBack: the ledger is not the newest one, see ``rollback``.
    """
    unsound = unsound_engine(study)
    if unsound:
        raise PolicyRefused(
            "The privacy claim of the study does not hold.",
            why=unsound,
            remedy=f"No policy allows it. {REMEDY} Then propose the study again.",
        )
    reasons = refusals(site.policy, study, invited)
    if reasons:
        raise PolicyRefused(
            "The site's policy refuses the study.",
            why=" ".join(reasons),
            remedy="Change the study, or let the steward change [policy] in site.toml.",
        )
    require_newest(site)
    require_approved(site, study, signatures)


def admit(site: Site, study: Study, *, run: str, invited: int, signatures: bytes = b"") -> None:
    """Let a study in, and reserve its whole cost; repeating it for the same run changes nothing.

    Args:
        site: the site.
        study: the study that is asked for.
        run: the run that asks.
        invited: see ``consent``.
        signatures: see ``consent``.

    Raises:
        MessageInvalid, PolicyRefused, StudyNotApproved: see ``consent``.
        LedgerRolledBack: see ``consent``.
        BudgetExhausted: the ledger cannot bear it.
        EpsilonUnreachable: no noise gives the study's epsilon.
        LedgerDamaged: the ledger's chain is broken.
    """
    consent(site, study, invited=invited, signatures=signatures)
    if not study.privacy.enabled:
        return
    used = charges(study)
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    if not is_noted(site):
        # Before the first reservation: a kill behind it must not look like notes that were deleted.
        note(site, ledger)
    before = ledger.head()
    ledger.reserve(
        study.digest,
        run,
        used.step,
        used.steps,
        used.delta,
        epsilon_limit_study=site.policy.max_epsilon_study,
        epsilon_limit_lifetime=site.policy.max_epsilon_lifetime,
        release=used.release,
    )
    if ledger.head() != before:
        note(site, ledger)


def require_hours(site: Site, now: datetime.time) -> None:
    """Refuse a round outside the training window of the policy; the refusal charges nothing.

    Args:
        site: the site.
        now: the local time of day.

    Raises:
        OutsideHours: it is not in them.
    """
    if not within(site.policy.hours, now):
        raise OutsideHours(
            "Outside the training window (policy.hours).",
            why=f"The window is {', '.join(site.policy.hours)}; now {now:%H:%M}. Nothing was "
            "charged.",
            remedy="Wait for the window, and repeat the round.",
        )


def require_metric(site: Site, study: Study) -> None:
    """Let score histograms leave only where the study pays for them, or privacy is off.

    Raises:
        PolicyRefused: it is not so, or the policy does not allow them.
    """
    if study.privacy.enabled and not study.releases:
        raise PolicyRefused(
            "The study reserves nothing for a noised evaluation.",
            why="With privacy on, the site's evaluation would leave without being charged.",
            remedy="Give the study an evaluation.release_epsilon above 0.",
        )
    if not may_measure(site.policy):
        # Also where the study that was approved asks for none: the server can ask anyhow.
        raise PolicyRefused(
            "The site's policy does not allow score histograms.",
            why="policy.metrics does not list score-histograms.",
            remedy="Change the study, or let the steward change [policy] in site.toml.",
        )


def shortfall(site: Site, study: Study) -> BudgetExhausted | None:
    """What the ledger would say to a run of this study now; nothing is reserved.

    Raises:
        EpsilonUnreachable, LedgerDamaged, PolicyRefused: as ``admit``.
    """
    if not study.privacy.enabled or not site.ledger.exists():
        return None
    used = charges(study)
    return Ledger.open(site.ledger, delta=site.policy.ledger_delta).refusal(
        study.digest,
        used.step,
        used.steps,
        used.delta,
        epsilon_limit_study=site.policy.max_epsilon_study,
        epsilon_limit_lifetime=site.policy.max_epsilon_lifetime,
        release=used.release,
    )


def promised(site: Site) -> float:
    """Epsilon that all studies together have reserved or spent, at the ledger's delta."""
    if not site.ledger.exists():
        return 0.0
    return Ledger.open(site.ledger, delta=site.policy.ledger_delta).epsilon_lifetime(reserved=True)


def charge(site: Site, study: Study, *, run: str, round_number: int) -> None:
    """Charge one round, durably, before its data are read.

    Raises:
        RoundAlreadySpent: this round was charged before.
        BudgetExhausted: nothing is reserved for it.
        LedgerDamaged: the ledger's chain is broken.
    """
    if not study.privacy.enabled:
        return
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    ledger.start_round(study.digest, run, round_number, study.training.steps_per_round)
    note(site, ledger)


def charge_release(site: Site, study: Study, *, run: str) -> None:
    """Charge the study's one noised evaluation, durably, before its data are read.

    Raises:
        ReleaseAlreadySpent: it was charged before.
        BudgetExhausted: nothing is reserved for it.
        LedgerDamaged: the ledger's chain is broken.
    """
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    ledger.start_release(study.digest, run)
    note(site, ledger)
