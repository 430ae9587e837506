"""Two ledgers of the same patients: the one counts what the other may come to spend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.machine_registry import ledger_id
from cloister_fl.client.ledger.replay import link_body
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.steward import budget, ledger_link
from cloister_fl.errors import BudgetExhausted, LedgerDamaged, OptionInvalid, PolicyRefused
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.verify import ledger_export
from support.errors import raises
from support.spending import disagreements

STUDY, OTHER = "a" * 64, "b" * 64
NOISE = Mechanism(6.219, 1.0)
"""Of a study of 20 steps and epsilon 3."""
ONCE, TWICE = 3.58, 5.28
"""The lifetime's epsilon of so many such studies."""


def _site(root: Path) -> Site:
    return init_site(root, name=root.name)


def _reserve(site: Site, study: str, run: str = "run", *, started: int = 0) -> None:
    session = SiteSession(site)
    if not session.is_noted():
        session.note()
    session.ledger.reserve(study, run, NOISE, 20, 1e-5, 3.01, 8.0)
    if started:
        session.ledger.start_round(study, run, 1, started)
    session.note()
    session.close()


def _lifetime(site: Site) -> float:
    return round(budget.statement(site).lifetime_promised, 2)


@pytest.fixture
def old(tmp_path: Path) -> Site:
    site = _site(tmp_path / "old")
    _reserve(site, STUDY, started=5)
    return site


def test_a_new_folder_counts_what_the_old_one_reserved_as_spent(old: Site, tmp_path: Path) -> None:
    new = _site(tmp_path / "new")
    assert _lifetime(new) == 0
    assert ledger_link.link(new, old)
    told = budget.statement(new)
    assert round(told.lifetime_spent, 2) == round(told.lifetime_promised, 2) == ONCE
    assert told.linked == 1
    assert "1 other ledger of the same patients counted as spent" in budget.render(told, new.root)
    _reserve(new, OTHER)
    assert _lifetime(new) == TWICE
    assert disagreements(new) == disagreements(old) == ()
    # Once, however often it is said.
    assert not ledger_link.link(new, old)
    assert _lifetime(new) == TWICE
    assert [one.kind for one in entries_of(new) if one.kind == "linked"] == ["linked"]


def test_the_same_study_in_both_folders_is_one_study_to_its_limit(
    old: Site, tmp_path: Path
) -> None:
    new = _site(tmp_path / "new")
    ledger_link.link(new, old)
    with pytest.raises(BudgetExhausted, match="The study budget does not suffice"):
        _reserve(new, STUDY)
    _reserve(new, OTHER)


def test_the_old_folder_finishes_its_run_and_reserves_nothing_more(
    old: Site, tmp_path: Path
) -> None:
    new = _site(tmp_path / "new")
    ledger_link.link(new, old)
    before = _lifetime(new)
    ledger = Ledger.open(old.ledger, delta=old.policy.ledger_delta)
    # The run's own reservation, asked for again, and its next round.
    ledger.reserve(STUDY, "run", NOISE, 20, 1e-5, 3.01, 8.0)
    ledger.start_round(STUDY, "run", 2, 15)
    for study, run in ((OTHER, "run"), (STUDY, "another")):
        with pytest.raises(BudgetExhausted, match="continued in another site folder"):
            ledger.reserve(study, run, NOISE, 20, 1e-5, 9.0, 99.0)
        refusal = ledger.refusal(study, NOISE, 20, 1e-5, 9.0, 99.0)
        assert refusal is not None
        assert "continued" in refusal.what
    assert _lifetime(new) == before
    assert "continued in another site folder" in budget.render(budget.statement(old))


def test_a_kill_between_the_two_ledgers_leaves_nothing_uncounted(
    old: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = _site(tmp_path / "new")

    def killed(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger_link.link(new, old)
    with pytest.raises(BudgetExhausted, match="continued"):
        _reserve(old, OTHER)
    assert disagreements(new) == disagreements(old) == ()
    assert ledger_link.link(new, old)
    assert _lifetime(new) == ONCE


def test_a_kill_before_the_notes_is_no_rollback(
    old: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = _site(tmp_path / "new")
    linked = Ledger.link

    def linked_and_killed(ledger: Ledger, *words: object) -> bool:
        linked(ledger, *words)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "link", linked_and_killed)
        with pytest.raises(KeyboardInterrupt):
            ledger_link.link(new, old)
    assert disagreements(new) == ()
    assert _lifetime(new) == ONCE


def test_chains_of_folders_count_all_of_them(old: Site, tmp_path: Path) -> None:
    second, third = _site(tmp_path / "second"), _site(tmp_path / "third")
    ledger_link.link(second, old)
    _reserve(second, OTHER)
    ledger_link.link(third, second)
    assert _lifetime(third) == TWICE
    # A ledger that is continued counts nowhere else.
    with raises(PolicyRefused):
        ledger_link.link(third, old)
    with raises(OptionInvalid, match="is continued in another site folder itself"):
        ledger_link.link(second, third)


def test_own_folders_copies_and_folders_without_a_ledger_are_not_linked(
    old: Site, tmp_path: Path
) -> None:
    with raises(OptionInvalid, match="own folder"):
        ledger_link.open_other(old, old.root)
    new = _site(tmp_path / "new")
    with raises(OptionInvalid, match="has no ledger"):
        ledger_link.open_other(old, new.root)
    for name in ("ledger.sqlite", "ledger.high"):
        (new.root / name).write_bytes((old.root / name).read_bytes())
    ledger_link.SiteSession(new).accept_ledger()
    with raises(OptionInvalid, match="copies of one"):
        ledger_link.link(new, old)


def test_an_entry_that_breaks_a_rule_is_found(old: Site) -> None:
    ledger = Ledger.open(old.ledger, delta=old.policy.ledger_delta)
    good = link_body("1" * 64, {OTHER: ((NOISE, 3),)})
    broken = (
        {**good, "ledger": "short"},
        {**good, "steps": [{**good["steps"][0], "steps": 0}]},
        {**good, "steps": [{**good["steps"][0], "noise_multiplier": -1.0}]},
    )
    for body in broken:
        with raises(LedgerDamaged), ledger.file.transaction(write=True):
            ledger.file.append("linked", body)
    with ledger.file.transaction(write=True):
        ledger.file.append("linked", good)
    with raises(LedgerDamaged), ledger.file.transaction(write=True):
        ledger.file.append("linked", good)
    with raises(LedgerDamaged), ledger.file.transaction(write=True):
        ledger.file.append("continued", {"ledger": "short"})


def test_an_export_counts_it_by_another_reader(old: Site, tmp_path: Path) -> None:
    new = _site(tmp_path / "new")
    ledger_link.link(new, old)
    out = tmp_path / "export.jsonl"
    budget.export(new, out)
    export = ledger_export.read(out.read_bytes())
    assert export.composition() == ((NOISE, 20),)
    assert export.linked(study=STUDY) == ((NOISE, 20),)
    assert export.linked(study=OTHER) == ()
    assert json.loads(out.read_bytes().splitlines()[-1])["unsupported"] == []
    assert ledger_id(old.ledger) in out.read_text()


def test_four_studies_of_epsilon_3_are_a_lifetime_of_8(tmp_path: Path) -> None:
    site = _site(tmp_path / "one")
    for number in range(4):
        _reserve(site, f"{number:064x}")
    assert _lifetime(site) == 7.92
    with pytest.raises(BudgetExhausted, match="The lifetime budget does not suffice"):
        _reserve(site, OTHER)
    assert "four studies of epsilon 3" in budget.render(budget.statement(site))
