"""A ledger that was rolled back is noticed before anything is read or charged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.audit_log import name_of, told_heads
from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import Decision, judge, judgements
from cloister_fl.client.cli import client_group
from cloister_fl.client.ledger import site_session
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.rollback import CLAIMED, FILE
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.preflight.data_check import inspect
from cloister_fl.client.site.audit_log import entries_of, log_of, path_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import budget
from cloister_fl.client.steward.review import review
from cloister_fl.encoding.canonical_json import GENESIS
from cloister_fl.errors import LedgerRolledBack, RoundAlreadySpent
from support import spending
from support.errors import raises
from support.federations import SEEN, study
from support.spending import accept, compare, disagreements

STUDY = study()
OTHER = study(study='name = "other"')
SITES = max(5, STUDY.aggregation.min_sites)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with one round charged, and a copy of its folder from before that."""
    made = init_site(tmp_path / "anker", policy=Policy(patients_at_most=1_000, max_epsilon_study=6))
    judge(made, STUDY, Decision.APPROVED, data=SEEN)
    admit(made)
    shutil.copytree(made.root, tmp_path / "old")
    spending.charge(made, STUDY, run="run-1", round_number=1)
    return made


def admit(site: Site) -> None:
    spending.admit(site, STUDY, run="run-1", invited=SITES)


def roll_back(site: Site, *names: str) -> None:
    for name in names:
        shutil.copy(site.root.parent / "old" / name, site.root / name)


def ledger(site: Site) -> Ledger:
    return Ledger.open(site.ledger, delta=site.policy.ledger_delta)


def test_the_newest_ledger_passes_and_is_noted_in_both_places(site: Site) -> None:
    admit(site)
    seq, digest = ledger(site).head()
    last = [entry for entry in entries_of(site) if entry.kind == "ledger"][-1]
    assert (last.body["ledger_seq"], last.body["ledger_hash"]) == (seq, digest)
    assert f'"seq": {seq}' in (site.root / FILE).read_text()
    assert digest in (site.root / FILE).read_text()
    assert (site.root / FILE).stat().st_mode & 0o777 == 0o600


def test_a_ledger_restored_from_an_older_copy(site: Site) -> None:
    roll_back(site, "ledger.sqlite")
    with raises(LedgerRolledBack, match=r"ledger.high has entry 3.*ends at entry 2"):
        admit(site)
    assert ledger(site).head()[0] == 2


def test_what_predicts_the_gate_tells_of_a_ledger_that_is_not_the_newest(site: Site) -> None:
    """Check, review and budget said that the study passes, and the run was refused."""
    sound = (
        review(site, judgements(site)[STUDY.digest]),
        budget.render(budget.judged_statement(site), site.root),
        budget.render_proposal(budget.proposal(site, STUDY)),
    )
    assert gate.distrusted(site) is None
    roll_back(site, "ledger.sqlite")
    with raises(LedgerRolledBack) as caught:
        admit(site)
    told = f"{caught.value.what} {caught.value.why}"
    short = gate.shortfall(site, STUDY)
    assert short is not None
    assert short.code == LedgerRolledBack.code
    assert f"{short.what} {short.why}" == told
    for text, without in zip(
        (
            review(site, judgements(site)[STUDY.digest]),
            budget.render(budget.judged_statement(site), site.root),
            budget.render_proposal(budget.proposal(site, STUDY)),
        ),
        sound,
        strict=True,
    ):
        assert told in text
        assert told not in without
    assert told in inspect(site, STUDY).policy[0]


def test_ledger_and_high_water_rolled_back_together_are_found_by_the_audit_log(
    site: Site,
) -> None:
    roll_back(site, "ledger.sqlite", FILE)
    with raises(LedgerRolledBack) as caught:
        admit(site)
    assert caught.value.why == "The audit log has entry 3; the ledger ends at entry 2."


def test_a_lower_note_written_behind_a_higher_one_takes_nothing_back(site: Site) -> None:
    for number in (2, 3):
        spending.charge(site, STUDY, run="run-1", round_number=number)
    roll_back(site, "ledger.sqlite", FILE)
    seq, digest = ledger(site).head()
    log_of(site).append("ledger", ledger_seq=seq, ledger_hash=digest)
    with raises(LedgerRolledBack) as caught:
        admit(site)
    assert caught.value.why == "The audit log has entry 5; the ledger ends at entry 2."
    # The steward's word does, and only up to here.
    accept(site)
    admit(site)
    assert disagreements(site) == ()


@pytest.mark.parametrize(
    ("forged", "why"),
    [
        ({"ledger_seq": 99, "ledger_hash": "0" * 64}, "has entry 99; the ledger ends at entry 3."),
        ({"ledger_seq": 3, "ledger_hash": "0" * 64}, "has another entry 3 than the ledger."),
        ({"ledger_seq": 4, "ledger_hash": "0" * 64}, "has entry 4; the ledger ends at entry 3."),
    ],
)
def test_a_head_that_somebody_else_noted(
    site: Site, forged: dict[str, str | int], why: str
) -> None:
    log_of(site).append("ledger", **forged)
    with raises(LedgerRolledBack) as caught:
        admit(site)
    assert caught.value.why == f"The audit log {why}"


def test_a_log_rolled_back_alone_refunds_nothing(site: Site) -> None:
    spent = ledger(site).epsilon_lifetime()
    roll_back(site, "audit/audit.jsonl")
    admit(site)
    assert ledger(site).epsilon_lifetime() == spent > 0
    with pytest.raises(RoundAlreadySpent):
        spending.charge(site, STUDY, run="run-1", round_number=1)


def test_a_ledger_that_went_on_from_an_older_copy(site: Site) -> None:
    newest = ledger(site).head()
    roll_back(site, "ledger.sqlite")
    ledger(site).start_round(STUDY.digest, "run-1", 2, 1)
    assert ledger(site).head()[0] == newest[0]
    with raises(LedgerRolledBack, match=r"ledger\.high has another entry 3"):
        admit(site)


@pytest.mark.parametrize("gone", ["ledger.sqlite", FILE, "audit/audit.jsonl"])
def test_what_was_deleted_is_missed(site: Site, gone: str) -> None:
    (site.root / gone).unlink()
    with raises(LedgerRolledBack):
        admit(site)


def test_a_high_water_file_that_says_nothing_is_missed(site: Site) -> None:
    (site.root / FILE).write_text('{"seq": true, "hash": ""}')
    with raises(LedgerRolledBack, match=r"ledger\.high has no head"):
        admit(site)


@pytest.mark.parametrize("killed_in", ["note", "write_atomic"])
def test_a_kill_between_the_ledger_and_its_notes_is_no_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    made = init_site(tmp_path / "birke", policy=Policy(patients_at_most=1_000, max_epsilon_study=6))
    judge(made, STUDY, Decision.APPROVED, data=SEEN)
    where = SiteSession if killed_in == "note" else site_session
    honest = getattr(where, killed_in)

    def kill(*given: object) -> None:
        if ledger(made).reservations():
            raise KeyboardInterrupt
        honest(*given)

    with monkeypatch.context() as patch:
        patch.setattr(where, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            admit(made)
    assert len(ledger(made).reservations()) == 1
    admit(made)
    spending.charge(made, STUDY, run="run-1", round_number=1)
    assert disagreements(made) == ()


def told(site: Site, digest: str) -> str:
    return told_heads([(name_of(site.identity().public), digest), ("0" * 16, GENESIS)])


def test_all_three_rolled_back_together_are_found_by_the_coordinators_note(site: Site) -> None:
    newest = log_of(site).head().hash
    compare(site, told(site, newest))
    assert disagreements(site) == ()
    roll_back(site, "ledger.sqlite", FILE, "audit/audit.jsonl")
    assert disagreements(site) == ()
    compare(site, told(site, newest))
    # What the site answers now is what the coordinator notes next: it fits, and changes nothing.
    compare(site, told(site, log_of(site).head().hash))
    with raises(LedgerRolledBack) as caught:
        admit(site)
    assert (
        caught.value.why
        == "The coordinator has an entry of the audit log that the log itself lacks."
    )
    assert (site.root / CLAIMED).stat().st_mode & 0o777 == 0o600


def test_what_the_steward_accepted_is_not_held_against_the_site_again(site: Site) -> None:
    newest = log_of(site).head().hash
    roll_back(site, "ledger.sqlite", FILE, "audit/audit.jsonl")
    compare(site, told(site, newest))
    assert accept(site)
    assert not (site.root / CLAIMED).exists()
    compare(site, told(site, newest))
    admit(site)
    compare(site, told(site, "5" * 64))
    with raises(LedgerRolledBack):
        admit(site)


@pytest.mark.parametrize("heads", ["", "no head", "0000000000000000:" + "5" * 64, "{}:", "{}:x"])
def test_what_is_said_of_another_log_or_is_no_head_is_passed_over(site: Site, heads: str) -> None:
    compare(site, heads.format(name_of(site.identity().public)))
    assert disagreements(site) == ()
    admit(site)


def test_a_ledger_that_moves_to_a_folder_with_another_key(site: Site, tmp_path: Path) -> None:
    """As after a key was replaced, see the guide for a hospital."""
    budget.close(site, STUDY.digest)
    limits = Policy(patients_at_most=1_000, max_epsilon_study=6, max_epsilon_lifetime=50)
    new = init_site(tmp_path / "birke", policy=limits)
    shutil.copy(site.ledger, new.ledger)
    seq, digest = ledger(new).head()
    (new.root / FILE).write_text(f'{{"seq": {seq}, "hash": "{digest}"}}')
    log_of(new).append("ledger", ledger_seq=seq, ledger_hash=digest)
    # Both notes fit, and yet nobody here has said that it is this site's ledger.
    assert disagreements(new) == (f"Entry {seq} of the ledger is not signed by this site.",)
    judge(new, OTHER, Decision.APPROVED, data=SEEN)
    with raises(LedgerRolledBack, match="not signed by this site"):
        spending.admit(new, OTHER, run="run-2", invited=SITES)
    assert accept(new)
    assert disagreements(new) == ()
    spending.admit(new, OTHER, run="run-2", invited=SITES)
    assert ledger(new).closed() == {STUDY.digest}
    assert ledger(new).epsilon_lifetime() == ledger(site).epsilon_lifetime() > 0


def test_the_steward_accepts_and_it_is_written_in_both(site: Site) -> None:
    roll_back(site, "ledger.sqlite")
    words = ["budget", "accept-ledger", "--dir", str(site.root)]
    result = CliRunner().invoke(client_group.app, [*words, "--yes"])
    assert "has entry 3" in result.output
    assert "Accepted" in result.output
    admit(site)
    accepted = [entry for entry in ledger(site).entries() if entry.kind == "accepted"]
    assert [entry.body["missed"] for entry in accepted] == [3]
    assert accepted[0].body["key"] == site.identity().public.hex()
    assert any(entry.kind == "accepted" for entry in entries_of(site))
    assert disagreements(site) == ()
    before = path_of(site).read_bytes()
    again = CliRunner().invoke(client_group.app, words)
    assert "matches" in again.output
    assert path_of(site).read_bytes() == before
