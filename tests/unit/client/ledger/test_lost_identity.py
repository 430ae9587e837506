"""A site whose identity was lost and made anew goes on with the ledger that it has."""

from __future__ import annotations

from pathlib import Path

from cloister_fl.client.ledger.machine_registry import ledger_id
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.folder import IDENTITY, create_identity, init_site


def _replace_identity(root: Path) -> None:
    (root / "keys" / IDENTITY).unlink()
    create_identity(root)


def test_the_coordinator_knows_the_ledger_by_the_same_name(tmp_path: Path) -> None:
    root = init_site(tmp_path / "north").root
    before = SiteSession.open(root)
    name, first = before.ledger_name(), ledger_id(root / "ledger.sqlite")
    before.close()
    _replace_identity(root)
    after = SiteSession.open(root)
    assert (after.ledger_name(), ledger_id(root / "ledger.sqlite")) == (name, first)
    other = SiteSession.open(init_site(tmp_path / "south").root)
    assert other.ledger_name() != name


def test_what_the_old_key_signed_in_it_waits_for_the_steward(tmp_path: Path) -> None:
    root = init_site(tmp_path / "north").root
    before = SiteSession.open(root)
    before.require_log()
    before.ledger.accept(0, before.identity, log=before.log.pin, claimed=frozenset())
    assert before.disagreements() == ()
    before.close()
    _replace_identity(root)
    after = SiteSession.open(root)
    assert after.disagreements() == ("Entry 2 of the ledger is not signed by this site.",)
    after.accept_ledger()
    assert SiteSession.open(root).disagreements() == ()
