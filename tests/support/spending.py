"""Privacy spent at a site as the app spends it, each time from a session of its own."""

from __future__ import annotations

from cloister_fl.client.admission import gate
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.site.folder import Site
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study


def admit(site: Site, study: Study, *, run: str, invited: int) -> Admission:
    """Let a study in, and reserve its whole cost."""
    return gate.admit(SiteSession(site), study.canonical(), run=run, invited=invited)


def charge(site: Site, study: Study, *, run: str, round_number: int) -> None:
    """Charge a round of a study, whether or not it was let in."""
    gate.charge(SiteSession(site), admission(study, run), round_number=round_number)


def charge_release(site: Site, study: Study, *, run: str) -> None:
    """Charge the noised evaluation of a study, whether or not it was let in."""
    gate.charge_release(SiteSession(site), admission(study, run))


def admission(study: Study, run: str) -> Admission:
    """What says that a study was let in for a run."""
    return Admission(study, study.digest, run, charges(study) if study.privacy.enabled else None)


def disagreements(site: Site) -> tuple[str, ...]:
    """What is wrong between a site's ledger and its notes."""
    return SiteSession(site).disagreements()


def accept(site: Site) -> tuple[str, ...]:
    """Accept a site's ledger, as its steward."""
    return SiteSession(site).accept_ledger()


def compare(site: Site, heads: str) -> None:
    """Hear what the coordinator noted of a site's log."""
    SiteSession(site).compare(heads)
