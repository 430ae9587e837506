"""Which heads of the sites' logs the coordinator tells, and whose word it takes for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.audit_log import AuditLog, Head, heads_told, name_of
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.server.rounds.site_log_heads import heads_of_sites

SITES = {name: Identity.generate() for name in ("anker", "birke")}
ROSTER = Roster.of("test", 1, [RosterEntry(name, who.public) for name, who in SITES.items()])


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    made = AuditLog(tmp_path / "audit.jsonl", Identity.generate())
    made.append("began", sites="11=anker 22=birke")
    return made


def received(log: AuditLog, node: int, site: str, seq: int, digit: str) -> None:
    note = f"{name_of(SITES[site].public)}:{Head(seq, digit * 64)}"
    log.append("received", node=node, peer_head=note)


def told(log: AuditLog, site: str, seats: dict[int, str] | None = None) -> set[str]:
    heads = heads_of_sites(log.entries(), ROSTER, seats or {})
    return {digest[0] for digest in heads_told(heads, name_of(SITES[site].public))}


def test_the_newest_and_the_highest_are_told_and_no_number(log: AuditLog) -> None:
    received(log, 11, "anker", 5, "a")
    received(log, 11, "anker", 9, "b")
    received(log, 11, "anker", 6, "c")
    received(log, 11, "anker", 7, "d")
    assert told(log, "anker") == {"b", "d"}
    assert told(log, "birke") == set()
    only = f"{name_of(SITES['anker'].public)}:"
    assert heads_of_sites(log.entries(), ROSTER, {}) == f"{only}{'b' * 64} {only}{'d' * 64}"


def test_a_hospital_that_tells_of_anothers_log_is_not_heard(log: AuditLog) -> None:
    received(log, 11, "birke", 5, "a")
    received(log, 33, "birke", 5, "b")
    assert told(log, "birke") == set()


def test_a_site_that_came_back_as_another_node_is_heard(log: AuditLog) -> None:
    received(log, 44, "birke", 5, "a")
    assert told(log, "birke", {44: "birke"}) == {"a"}
    assert told(log, "birke") == set()
    log.append("seated", sites="44=birke")
    assert told(log, "birke") == {"a"}


def test_a_line_that_a_kill_cut_short_is_no_entry_and_an_edited_one_is_damage(
    log: AuditLog, tmp_path: Path
) -> None:
    received(log, 11, "anker", 5, "a")
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"rece')
    assert told(log, "anker") == {"a"}
    path.write_bytes(path.read_bytes().replace(b"11=anker", b"12=anker"))
    with pytest.raises(AuditLogDamaged):
        told(log, "anker")
