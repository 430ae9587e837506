"""Admission of a run at a site: policy, approval and privacy ledger, before data are read.

First the site's policy, then the approval of a person or of a rule that a person set, then the
ledger: it reserves all steps of the study, and a round is charged, on disk, before its data are
read.
"""

from __future__ import annotations

import datetime

from cloister_fl.client.admission.approvals import FILE as APPROVALS
from cloister_fl.client.admission.approvals import require_approved
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.policy import may_measure, refusals
from cloister_fl.client.site.training_hours import within
from cloister_fl.errors import (
    AuditLogDamaged,
    LedgerRolledBack,
    MessageInvalid,
    OutsideHours,
    PolicyRefused,
    PrivacyError,
)
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.study.cost import Charges, charges
from cloister_fl.study.gradient_engines import REMEDY
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system.files import mark_of


def mechanism(study: Study) -> Mechanism:
    """The mechanism of one step: the least noise that keeps the study within its epsilon.

    A pure function of the study's public constants, computed by each site for itself.

    Raises:
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    return charges(study).step


def consent(session: SiteSession, study: Study, *, invited: int, signatures: bytes = b"") -> None:
    """Pass a study that the policy allows and a person here approved; nothing is reserved.

    Args:
        session: of the site.
        study: the study that is asked for.
        invited: number of sites on the federation's list, this one included.
        signatures: who vouches for the study, see ``study.signatures``.

    Raises:
        MessageInvalid: the signatures are no signatures.
        PolicyRefused: the study asks for more than the policy allows, or for an engine that
            does not support its privacy claim, which no policy allows.
        StudyNotApproved: nobody here approved it, nor does the policy; it is kept for review.
        LedgerRolledBack: the ledger is not the newest one, see ``rollback``.
        LedgerDamaged, AuditLogDamaged: ledger or log were changed.
    """
    unsound = study.unsound_engine
    if unsound:
        raise PolicyRefused(
            "The privacy claim of the study does not hold.",
            why=unsound,
            remedy=f"No policy allows it. {REMEDY} Then propose the study again.",
        )
    reasons = refusals(session.site.policy, study, invited)
    if reasons:
        raise PolicyRefused(
            "The site's policy refuses the study.",
            why=" ".join(reasons),
            remedy="Change the study, or let the steward change [policy] in site.toml.",
        )
    session.require_newest()
    require_approved(session.site, study, signatures, log=session.log)


def admit(session: SiteSession, text: str, *, run: str, invited: int) -> Admission:
    """Let a study in, and reserve its whole cost; repeating it for the same run changes nothing.

    What was let in stays so while nothing changed that the decision depends on: the site's file,
    the approvals, the ledger and its notes.

    Args:
        session: of the site.
        text: canonical JSON of the study that is asked for.
        run: the run that asks.
        invited: see ``consent``.

    Raises:
        StudyInvalid: the text is no study's canonical form.
        PolicyRefused, StudyNotApproved: see ``consent``.
        LedgerRolledBack, LedgerDamaged, AuditLogDamaged: see ``consent``.
        BudgetExhausted: the ledger cannot bear it.
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    # Before the reading: what is decided behind it is found the next time.
    key = (text, run, invited, mark_of(session.site.root / APPROVALS))
    if key in session.admissions:
        session.require_newest()
    known = session.admissions.get(key)
    if known is not None:
        return known
    study = study_from_canonical(text)
    consent(session, study, invited=invited)
    used = charges(study) if study.privacy.enabled else None
    admission = Admission(study, study.digest, run, used)
    if used is not None:
        _reserve(session, admission, used)
    session.remember(key, admission)
    return admission


def _reserve(session: SiteSession, admission: Admission, used: Charges) -> None:
    ledger, policy = session.ledger, session.site.policy
    if not session.is_noted():
        # Before the first reservation: a kill behind it must not look like notes that were deleted.
        session.note()
    before = ledger.head()
    ledger.reserve(
        admission.digest,
        admission.run,
        used.step,
        used.steps,
        used.delta,
        epsilon_limit_study=policy.max_epsilon_study,
        epsilon_limit_lifetime=policy.max_epsilon_lifetime,
        release=used.release,
        releases_unstarted=policy.release_unstarted,
    )
    if ledger.head() != before:
        # A run may have lost its reservation to this one.
        session.admissions.clear()
        session.note()


def end(session: SiteSession, study: str, *, run: str) -> None:
    """Take the coordinator's word that a run has ended; see ``Ledger.end``.

    A lie costs its own federation the study at this site, and no patient anything: only what was
    not started is released, and it cannot be started any more.

    Args:
        session: of the site.
        study: the study's hash.
        run: the run.

    Raises:
        BudgetExhausted: the run has no reservation here.
        MessageInvalid: nothing was ever reserved here.
        LedgerRolledBack, LedgerDamaged, AuditLogDamaged: see ``consent``.
    """
    session.require_newest()
    if not session.site.ledger.exists():
        # Asking it would make one.
        raise MessageInvalid("The site has no run with a privacy budget.")
    if study in session.ledger.closed():
        return
    before = session.ledger.head()
    released = session.ledger.end(study, run, session.identity)
    if session.ledger.head() != before:
        session.admissions.clear()
        session.log.append("closed", study=study, released=released, by="policy")
        session.note()


def require_hours(site: Site, now: datetime.time) -> None:
    """Refuse a round outside the training window of the policy; the refusal charges nothing.

    Args:
        site: the site.
        now: the local time of day.

    Raises:
        OutsideHours: it is not in them.
    """
    if site.policy.hours and not within(site.policy.hours, now):
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


def distrusted(site: Site) -> PrivacyError | None:
    """Why the site would refuse every study: its ledger or audit log is not what was noted of it.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
    """
    session = SiteSession(site)
    try:
        session.require_newest()
    except PrivacyError as error:
        if error.code not in {LedgerRolledBack.code, AuditLogDamaged.code}:
            raise
        return error
    finally:
        session.close()
    return None


def shortfall(site: Site, study: Study) -> PrivacyError | None:
    """What ledger and audit log would have a run of this study refused for; nothing is reserved.

    Raises:
        EpsilonUnreachable, LedgerDamaged, PolicyRefused: as ``admit``.
    """
    if error := distrusted(site):
        return error
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


def charge(session: SiteSession, admission: Admission, *, round_number: int) -> None:
    """Charge one round, durably, before its data are read.

    Raises:
        RoundAlreadySpent: this round was charged before.
        BudgetExhausted: nothing is reserved for it.
        LedgerRolledBack, LedgerDamaged, AuditLogDamaged: see ``consent``.
    """
    if admission.charges is None:
        return
    steps = admission.study.training.steps_per_round
    session.require_newest()
    session.ledger.start_round(admission.digest, admission.run, round_number, steps)
    session.note()


def charge_release(session: SiteSession, admission: Admission) -> None:
    """Charge the study's one noised evaluation, durably, before its data are read.

    Raises:
        ReleaseAlreadySpent: it was charged before.
        BudgetExhausted: nothing is reserved for it.
        LedgerRolledBack, LedgerDamaged, AuditLogDamaged: see ``consent``.
    """
    session.require_newest()
    session.ledger.start_release(admission.digest, admission.run)
    session.note()
