"""Which heads of the sites' logs the coordinator tells, and whose word it takes for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.audit_log import AuditLog, heads_told, name_of
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.server.results.audit_report import account, render
from cloister_fl.server.rounds.site_log_heads import COMPARES, heads_of_sites

SITES = {name: Identity.generate() for name in ("anker", "birke")}
ROSTER = Roster.of("test", 1, [RosterEntry(name, who.public) for name, who in SITES.items()])


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    made = AuditLog(tmp_path / "audit.jsonl", Identity.generate())
    made.append("began", run="r", sites="11=anker 22=birke")
    return made


def received(
    log: AuditLog, node: int, site: str, digit: str, base: str = "", message: str = "exchanged"
) -> None:
    """A message that names the entry with the hash of these digits, and the one before."""
    note = f"{name_of(SITES[site].public)}:{digit * 64}" + (f":{base * 64}" if base else "")
    log.append("received", node=node, message=message, peer_head=note)


def asked(log: AuditLog, *nodes: int, compares: bool = True) -> None:
    """The coordinator asked who takes part, and said what each log must hold."""
    told = {COMPARES: True} if compares else {}
    log.append("sent", message="prepare", round=0, nodes=" ".join(map(str, nodes)), **told)


def told(log: AuditLog, site: str, seats: dict[int, str] | None = None) -> set[str]:
    heads = heads_of_sites(log.entries(), ROSTER, seats or {})
    return {digest[0] for digest in heads_told(heads, name_of(SITES[site].public))}


def rollbacks(tmp_path: Path) -> dict[str, int]:
    return {one.site: one.rollbacks for one in account(tmp_path / "audit.jsonl").sites}


def test_of_a_log_that_goes_on_the_newest_entry_is_told_alone_and_by_its_hash(
    log: AuditLog, tmp_path: Path
) -> None:
    for digit, base in (("a", ""), ("b", "a"), ("c", "b"), ("d", "c")):
        received(log, 11, "anker", digit, base)
    assert told(log, "anker") == {"d"}
    assert told(log, "birke") == set()
    only = f"{name_of(SITES['anker'].public)}:"
    assert heads_of_sites(log.entries(), ROSTER, {}) == f"{only}{'d' * 64}"
    assert rollbacks(tmp_path) == {"anker": 0}


def test_a_log_that_was_rolled_back_is_told_what_it_lost(log: AuditLog, tmp_path: Path) -> None:
    for digit, base in (("a", ""), ("b", "a"), ("c", "b")):
        received(log, 11, "anker", digit, base)
    # Rolled back to the entry a; it answers from there, and refuses what it is asked.
    received(log, 11, "anker", "d", "a")
    assert told(log, "anker") == {"c", "d"}
    received(log, 11, "anker", "e", "d", "refusal")
    assert told(log, "anker") == {"c", "e"}
    assert rollbacks(tmp_path) == {"anker": 1}
    assert "its audit log was rolled back or replaced: 1 x" in render(
        account(tmp_path / "audit.jsonl")
    )


def test_a_log_that_was_rolled_back_and_has_outgrown_the_old_one_is_told_what_it_lost(
    log: AuditLog,
) -> None:
    """A number would hide it: the newest entry has the highest, too."""
    received(log, 11, "anker", "a")
    received(log, 11, "anker", "b", "a")
    for digit, base in (("c", "a"), ("d", "c"), ("e", "d"), ("f", "e")):
        received(log, 11, "anker", digit, base)
    assert told(log, "anker") == {"b", "f"}


def test_an_answer_that_was_lost_is_no_rollback(log: AuditLog, tmp_path: Path) -> None:
    received(log, 11, "anker", "a")
    received(log, 11, "anker", "c", "b")  # The entry b was never heard of.
    received(log, 11, "anker", "d", "c")
    assert told(log, "anker") == {"a", "d"}
    assert rollbacks(tmp_path) == {"anker": 0}


def test_a_site_that_takes_part_has_compared_its_log_where_it_was_told_what_to_look_for(
    log: AuditLog,
) -> None:
    received(log, 11, "anker", "a")
    received(log, 11, "anker", "b")
    asked(log, 11, 22, compares=False)
    received(log, 11, "anker", "c", "b", "prepared")
    assert told(log, "anker") == {"a", "c"}
    asked(log, 22)
    received(log, 11, "anker", "d", "c", "prepared")
    assert told(log, "anker") == {"a", "d"}
    asked(log, 11, 22)
    received(log, 11, "anker", "e", "d", "refusal")
    assert told(log, "anker") == {"a", "e"}
    received(log, 11, "anker", "f", "e", "prepared")
    assert told(log, "anker") == {"f"}


def test_a_site_that_parts_again_and_again_does_not_push_out_what_it_lost(log: AuditLog) -> None:
    received(log, 11, "anker", "f")
    for digit in "0123456789abcde":
        received(log, 11, "anker", digit)
    assert told(log, "anker") == {"f", "0", "1", "2", "3", "4", "5", "e"}


def test_a_hospital_that_tells_of_anothers_log_is_not_heard(log: AuditLog) -> None:
    received(log, 11, "birke", "a")
    received(log, 33, "birke", "b")
    assert told(log, "birke") == set()


def test_a_site_that_came_back_as_another_node_is_heard(log: AuditLog) -> None:
    received(log, 44, "birke", "a")
    assert told(log, "birke", {44: "birke"}) == {"a"}
    assert told(log, "birke") == set()
    log.append("seated", sites="44=birke")
    assert told(log, "birke") == {"a"}


def test_a_line_that_a_kill_cut_short_is_no_entry_and_an_edited_one_is_damage(
    log: AuditLog, tmp_path: Path
) -> None:
    received(log, 11, "anker", "a")
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"rece')
    assert told(log, "anker") == {"a"}
    path.write_bytes(path.read_bytes().replace(b"11=anker", b"12=anker"))
    with pytest.raises(AuditLogDamaged):
        told(log, "anker")
