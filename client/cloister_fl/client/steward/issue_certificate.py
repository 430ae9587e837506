"""Privacy certificate of a run, from ledger, audit log and code, signed by the site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cloister_fl.audit_log import EMPTY
from cloister_fl.client.admission.approvals import judgements
from cloister_fl.client.ledger.ledger import Reservation
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import what_left
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.trusted_roster import read_pin
from cloister_fl.errors import InputError, OptionInvalid
from cloister_fl.privacy.accounting import epsilon_of
from cloister_fl.privacy.certificate import Certificate, Left, Release, code_hash
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from cloister_fl.study.cost import release_mechanism, sensitivity
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.schema import Study
from cloister_fl.system import utc
from cloister_fl.version import __version__


def certify(site: Site, study: str, *, run: str | None = None) -> Certificate:
    """Say what a run of a study cost this site's patients.

    Args:
        site: the site.
        study: the study's hash.
        run: the run; else the one that reserved last.

    Raises:
        OptionInvalid: the site knows no such study or run, or reserved nothing for it.
        StudyInvalid: the study's engine does not support its privacy claim.
        LedgerRolledBack: the ledger is not the newest one.
        LedgerDamaged, PolicyRefused, AuditLogDamaged, FileUnreadable: a file is not sound.
    """
    known = judgements(site)
    if study not in known or not site.ledger.exists():
        raise _unknown(site, "study")
    session = SiteSession(site)
    session.require_newest()
    ledger = session.ledger
    held = [one for one in ledger.reservations() if one.study_digest == study]
    own = [one for one in held if run in {None, one.run_id}]
    if not own:
        raise _unknown(site, "run")
    one, asked = own[-1], known[study].study
    # It would promise an epsilon that does not hold.
    require_sound_engine(asked)
    entries = tuple(session.log.entries())
    head = entries[-1] if entries else EMPTY
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for left in what_left(entries, run=one.run_id):
        counts[left.message] += left.count
        sizes[left.message] += left.bytes
    elsewhere = _linked(ledger.spent(study), held)
    # A simulation keeps its list of sites elsewhere.
    pin = read_pin(site.roster) if site.roster.exists() else None
    return Certificate(
        made=utc.timestamp(),
        site=site.name,
        key=site.identity().public.hex(),
        roster="" if pin is None else pin.digest.hex(),
        study=asked.canonical(),
        study_hash=study,
        run=one.run_id,
        noise_multiplier=one.mechanism.noise_multiplier,
        sampling_rate=one.mechanism.sampling_rate,
        clipping_norm=asked.privacy.clipping_norm,
        steps_reserved=asked.training.total_steps,
        steps_started=one.started,
        steps_of_study=sum(each.started for each in held) + elsewhere.get(one.mechanism, 0),
        release=_release(one, held, elsewhere, asked),
        delta=one.delta,
        epsilon_run=epsilon_of(one.spent, one.delta),
        epsilon_study=ledger.epsilon_study(study, one.delta),
        ledger=ledger.head().hash,
        log=head.hash,
        left=[Left(message=kind, count=counts[kind], bytes=sizes[kind]) for kind in sorted(counts)],
        version=__version__,
        code=code_hash(),
    )


def _linked(spent: Composition, held: Sequence[Reservation]) -> dict[Mechanism, int]:
    """What linked ledgers count of a study: its whole, without what was started here."""
    own = dict(compose(*(each.spent for each in held)))
    return {step: count - own.get(step, 0) for step, count in spent if count > own.get(step, 0)}


def _release(
    one: Reservation,
    held: Sequence[Reservation],
    elsewhere: Mapping[Mechanism, int],
    study: Study,
) -> Release | None:
    # A study that was closed before it keeps none in its reservation.
    release = one.release or release_mechanism(study)
    if release is None:
        return None
    return Release(
        noise_multiplier=release.noise_multiplier,
        sensitivity=sensitivity(study),
        charged=one.released,
        charged_of_study=any(each.released for each in held) or release in elsewhere,
    )


def _unknown(site: Site, what: str) -> InputError:
    return OptionInvalid(
        f"The site's ledger has no such {what}.",
        remedy=f"List the studies with a reservation: {site.command('budget')}",
    )
