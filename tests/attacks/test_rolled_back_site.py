"""Whoever can write a site's folder, and has no key of it, gets no round charged and sent twice.

A process answers messages from what it verified; here a message is what the envelope and the app do
to log and ledger, without the training between. The attacker puts older copies of the files in
their place, at the worst moment, and writes lines that look like the site's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cloister_fl.audit_log import AuditLog, name_of, told_heads
from cloister_fl.audit_log import log as audit_module
from cloister_fl.client import app_state
from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.app_state import Kept
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.ledger_file import append, transaction
from cloister_fl.client.ledger.rollback import CLAIMED, FILE
from cloister_fl.client.site.audit_log import path_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import (
    AuditLogDamaged,
    LedgerRolledBack,
    PolicyRefused,
    RoundAlreadySpent,
)
from cloister_fl.membership.identity import Identity
from support.errors import Expected, raises
from support.federations import SEEN, study
from support.spending import accept, admission
from support.tampering import elsewhere, put_in_place

STUDY = study(training="rounds = 9")
SITES = max(5, STUDY.aggregation.min_sites)
LEDGER, LOG = "ledger.sqlite", "audit/audit.jsonl"


@dataclass
class Service:
    """The process that answers a site's messages."""

    site: Site
    kept: Kept = field(default_factory=Kept)

    def message(self, act: Callable[[Any], object]) -> None:
        """Ask something of the site: it is logged, done, and logged again before it leaves."""
        session = self.kept.session(self.site.root)
        session.require_log()
        session.log.append("asked", message="train")
        try:
            act(session)
        finally:
            session.require_log()
            session.log.append("sent", message="update")

    def admit(self, run: str) -> None:
        self.message(lambda session: gate.admit(session, STUDY.canonical(), run=run, invited=SITES))

    def charge(self, number: int) -> None:
        asked = admission(STUDY, "run")
        self.message(lambda session: gate.charge(session, asked, round_number=number))

    def restart(self) -> None:
        self.kept = Kept()

    def charged(self) -> list[int]:
        """Rounds in the ledger, oldest first."""
        ledger = Ledger.open(self.site.ledger, delta=self.site.policy.ledger_delta)
        return [int(entry.body["round"]) for entry in ledger.entries() if entry.kind == "started"]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """It charged rounds 1 to 4; the folder ``old`` is a copy from before the last."""
    policy = Policy(patients_at_most=1_000, max_epsilon_study=6, max_epsilon_lifetime=100)
    site = init_site(tmp_path / "anker", policy=policy)
    judge(site, STUDY, Decision.APPROVED, data=SEEN)
    made = Service(site)
    made.admit("run")
    for number in (1, 2, 3):
        made.charge(number)
    shutil.copytree(site.root, tmp_path / "old")
    made.charge(4)
    return made


@pytest.fixture
def site(service: Service) -> Site:
    return service.site


def old(site: Site, name: str) -> Path:
    return site.root.parent / "old" / name


def roll_back(site: Site, *names: str) -> None:
    """Put older copies in the place of files, under other inodes."""
    for name in names:
        put_in_place(site.root / name, old(site, name))


def write_old_log(site: Site) -> None:
    """Write the older log over the log, in the same file."""
    code = """
import os, sys
with open(sys.argv[1], "r+b") as file, open(sys.argv[2], "rb") as other:
    file.write(other.read())
    file.truncate()
"""
    assert elsewhere(code, str(path_of(site)), str(old(site, LOG))) == 0


def while_it_waits(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act when the site next asks for the lock of its log, as whoever holds it until then can."""
    honest, waits = audit_module.locked, [True]

    def locked(path: Path) -> Any:
        if waits:
            waits.clear()
            act()
        return honest(path)

    patch.setattr(audit_module, "locked", locked)


def require_refused(service: Service, number: int, error: Expected) -> None:
    """A round is refused, whenever it is asked for."""
    for _ in range(2):
        with raises(error):
            service.charge(number)


# A file that was verified is replaced before it is written again.


def test_the_whole_folder_is_rolled_back_while_the_site_waits_for_its_log(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    _delta_for_one_message(service, monkeypatch)

    def everything() -> None:
        write_old_log(site)
        roll_back(site, LEDGER, FILE)

    with monkeypatch.context() as patch:
        while_it_waits(patch, everything)
        with raises(AuditLogDamaged, match="is gone, or another one stands in its place"):
            service.charge(4)
    require_refused(service, 4, AuditLogDamaged)
    require_refused(service, 5, AuditLogDamaged)
    assert service.charged() == [1, 2, 3]
    # Nothing is written behind what nobody explains.
    assert path_of(site).read_bytes() == old(site, LOG).read_bytes()


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_the_log_alone_is_rolled_back_while_the_site_waits_for_it(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with monkeypatch.context() as patch:
        while_it_waits(
            patch, lambda: write_old_log(site) if how == "in place" else roll_back(site, LOG)
        )
        with raises(AuditLogDamaged):
            service.charge(5)
    require_refused(service, 5, AuditLogDamaged)
    assert service.charged() == [1, 2, 3, 4]
    assert path_of(site).read_bytes() == old(site, LOG).read_bytes()


def test_the_log_is_rolled_back_while_the_ledger_reserves(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site.root / "site.toml"
    limit = "max_epsilon_study = 6"
    settings.write_text(settings.read_text().replace(limit, "max_epsilon_study = 50"))
    honest = Ledger.reserve

    def reserve(self: Ledger, *given: Any, **named: Any) -> Any:
        held = honest(self, *given, **named)
        roll_back(site, LOG)
        return held

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", reserve)
        with raises(AuditLogDamaged):
            service.admit("another")
    require_refused(service, 5, AuditLogDamaged)
    assert service.charged() == [1, 2, 3, 4]
    assert path_of(site).read_bytes() == old(site, LOG).read_bytes()


# What the process verified is to be forgotten.


def _delta_for_one_message(service: Service, _: pytest.MonkeyPatch) -> None:
    settings = service.site.root / "site.toml"
    text = settings.read_text()
    assert "ledger_delta = 1e-05" in text
    settings.write_text(text.replace("ledger_delta = 1e-05", "ledger_delta = 2e-05"))
    with raises(PolicyRefused):
        service.charge(5)
    settings.write_text(text)


def _key_for_one_message(service: Service, _: pytest.MonkeyPatch) -> None:
    key = service.site.keys / "identity.pem"
    content = key.read_bytes()
    key.write_bytes(Identity.generate().to_pem())
    with raises(RoundAlreadySpent):
        service.charge(1)
    key.write_bytes(content)


def _many_other_sites(service: Service, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(app_state, "SESSIONS", 1)
    other = init_site(service.site.root.parent / "other", name="other")
    service.kept.session(other.root)
    assert service.site.root not in service.kept._sessions


def _fork(service: Service, patch: pytest.MonkeyPatch) -> None:
    session = service.kept.session(service.site.root)
    patch.setattr(session, "owner", session.owner + 1)


FORGET: dict[str, Callable[[Service, pytest.MonkeyPatch], None]] = {
    "another delta for one message": _delta_for_one_message,
    "another key for one message": _key_for_one_message,
    "more sites than sessions": _many_other_sites,
    "a child process": _fork,
}


@pytest.mark.parametrize("how", FORGET)
def test_what_a_process_verified_of_a_ledger_is_not_forgotten(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    FORGET[how](service, monkeypatch)
    roll_back(site, LEDGER)
    with raises(LedgerRolledBack, match="as this process knows it"):
        service.kept.session(site.root).ledger.head()
    require_refused(service, 4, LedgerRolledBack)
    assert service.charged() == [1, 2, 3]


@pytest.mark.parametrize("how", FORGET)
def test_what_a_process_verified_of_a_log_is_not_forgotten(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    FORGET[how](service, monkeypatch)
    roll_back(site, LOG)
    require_refused(service, 5, AuditLogDamaged)
    assert service.charged() == [1, 2, 3, 4]


def test_a_key_in_the_site_s_place_accepts_no_rollback(service: Service, site: Site) -> None:
    """Who writes the folder can put a key of their own there, and sign with it."""
    roll_back(site, LEDGER, FILE)
    (site.keys / "identity.pem").write_bytes(Identity.generate().to_pem())
    assert accept(site)
    require_refused(service, 4, LedgerRolledBack)
    assert service.charged() == [1, 2, 3]


def test_a_site_that_is_forgotten_is_met_anew(service: Service, site: Site) -> None:
    """As a simulation does at its end, whose folders the next one may make anew."""
    service.kept.forget(site.root)
    roll_back(site, LEDGER, FILE, LOG)
    service.charge(4)
    assert service.charged() == [1, 2, 3, 4]


# Lines that nobody signed, or somebody else.


def _forged_log(site: Site) -> AuditLog:
    return AuditLog(path_of(site), Identity.generate())


def _forge_acceptance_in_the_log(site: Site) -> None:
    log = _forged_log(site)
    log.append("accepted", by="steward", why="forged", claimed=None)
    _note_the_head(site, log)


def _note_the_head(site: Site, log: AuditLog) -> None:
    """Note the ledger as it is in both places."""
    seq, digest = Ledger.open(site.ledger, delta=site.policy.ledger_delta).head()
    log.append("ledger", ledger_seq=seq, ledger_hash=digest)
    (site.root / FILE).write_text(json.dumps({"seq": seq, "hash": digest}))


def _forge_acceptance_in_both(site: Site) -> None:
    log = _forged_log(site)
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    ledger.accept(99, Identity.generate(), log=log.head())
    log.append("accepted", by="steward", why="forged", claimed=None)
    _note_the_head(site, log)


def _go_on_with_entries_that_spend_nothing(site: Site) -> None:
    """A ledger as long as the newest one, and a note of each entry."""
    log = _forged_log(site)
    for number in range(3):
        with transaction(site.ledger) as connection:
            append(connection, "epoch", {"epoch": f"{number:064x}", "study": STUDY.digest})
        _note_the_head(site, log)


FORGERIES: dict[str, Callable[[Site], None]] = {
    "an acceptance in the log": _forge_acceptance_in_the_log,
    "an acceptance in both, with another key": _forge_acceptance_in_both,
    "entries that spend nothing": _go_on_with_entries_that_spend_nothing,
}


@pytest.mark.parametrize("after", ["warm", "restarted"])
@pytest.mark.parametrize("what", FORGERIES)
def test_a_ledger_is_rolled_back_behind_forged_lines(
    service: Service, site: Site, what: str, after: str
) -> None:
    roll_back(site, LEDGER, FILE)
    FORGERIES[what](site)
    if after == "restarted":
        service.restart()
    require_refused(service, 4, LedgerRolledBack)
    require_refused(service, 5, LedgerRolledBack)
    assert service.charged() == [1, 2, 3]


@pytest.mark.parametrize("after", ["warm", "restarted"])
def test_an_acceptance_is_used_for_a_later_rollback(
    service: Service, site: Site, after: str
) -> None:
    """The steward accepted a ledger once; that copy, put back later, is no newest ledger."""
    roll_back(site, LEDGER, FILE)
    require_refused(service, 5, LedgerRolledBack)
    assert accept(site)
    for name in (LEDGER, FILE):
        shutil.copy(site.root / name, old(site, name))
    service.charge(5)
    assert service.charged() == [1, 2, 3, 5]
    roll_back(site, LEDGER, FILE)
    _forge_acceptance_in_the_log(site)
    if after == "restarted":
        service.restart()
    require_refused(service, 5, LedgerRolledBack)
    assert service.charged() == [1, 2, 3]


def test_a_closing_by_somebody_else_frees_no_budget(service: Service, site: Site) -> None:
    """Who closes a study releases what it reserved; only the site's own key can."""
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    assert ledger.close(STUDY.digest, Identity.generate()) > 0
    _note_the_head(site, _forged_log(site))
    for _ in range(2):
        require_refused(service, 5, LedgerRolledBack)
        service.restart()


def test_a_lost_entry_that_the_coordinator_noted_stays_lost_without_its_file(
    service: Service, site: Site
) -> None:
    heads = told_heads([(name_of(site.identity().public), "5" * 64)])
    service.message(lambda session: session.compare(heads))
    (site.root / CLAIMED).unlink()
    require_refused(service, 5, LedgerRolledBack)
    assert service.charged() == [1, 2, 3, 4]
    # The coordinator says it again, and the steward accepts that it is lost.
    service.message(lambda session: session.compare(heads))
    assert accept(site)
    service.charge(5)
    service.message(lambda session: session.compare(heads))
    service.charge(6)
