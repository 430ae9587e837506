"""Whoever damages the log of either side of a real run is found, and told the line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.audit_log import examine, name_of, parse_note, read
from cloister_fl.audit_log.entries import hash_of
from cloister_fl.cli import main
from cloister_fl.client.site.audit_log import path_of
from cloister_fl.client.site.folder import open_site
from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.membership.identity import Identity
from cloister_fl.server.coordinator.federation import AUDIT, Federation
from cloister_fl.server.rounds.events import Event, Measured
from cloister_fl.simulation.run_folder import FEDERATION
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import NAMES, study, write_federation

SIDES = (*NAMES, "coordinator")
FORGER = Identity.generate()


@dataclass(frozen=True)
class Log:
    """One side's log after a run, its key, the other side's log, and the last head noted there."""

    path: Path
    key: bytes
    peer: Path
    noted: int
    early: Path
    """The same file as it was after the first round."""

    @property
    def rows(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    root = tmp_path_factory.mktemp("damage")
    out, early = root / "run", root / "early"
    sites = write_federation(root / "sites", images=1)

    def keep(event: Event) -> None:
        if isinstance(event, Measured) and event.figures.round == 1:
            # All that either side holds, the signatures and the ledger with the log.
            shutil.copytree(out, early)

    run_simulation(Simulation(study(), sites, out), notify=keep)
    coordinator = out / FEDERATION / AUDIT
    found = {}
    for name in NAMES:
        site = open_site(out / "sites" / name)
        path = path_of(site)
        public = site.identity().public
        place = early / path.relative_to(out)
        found[name] = Log(path, public, coordinator, _noted(path, coordinator, public), place)
    anker = found["anker"].path
    root_key = Federation(out / FEDERATION).root
    place = early / FEDERATION / AUDIT
    noted = _noted(coordinator, anker, root_key)
    found["coordinator"] = Log(coordinator, root_key, anker, noted, place)
    return found


def _noted(path: Path, peer: Path, public: bytes) -> int:
    """Number of the last entry of this key's log that the other side has noted."""
    numbers = {entry.hash: entry.seq for entry in read(path)}
    notes = [parse_note(str(entry.body.get("peer_head"))) for entry in read(peer)]
    return max(numbers[note.hash] for note in notes if note and note.name == name_of(public))


@pytest.mark.parametrize("side", SIDES)
def test_both_logs_of_the_run_are_sound(logs: dict[str, Log], side: str) -> None:
    log = logs[side]
    verdict = examine(log.path, key=log.key, peer=log.peer)
    assert verdict.findings == ()
    assert verdict.entries == len(log.rows) > 10
    assert verdict.signed > 10
    assert log.noted > 10


def _first_change(old: list[bytes], new: list[bytes]) -> int:
    """1-based number of the first line that is another one, or one behind the end."""
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    return same + 1


KINDS = (
    "flip",
    "byte",
    "edit",
    "rehash",
    "respace",
    "forge",
    "delete",
    "copy",
    "swap",
    "cut",
    "tear",
)


def _damage(data: st.DataObject, rows: list[bytes], noted: int) -> bytes:
    """Draw one damage; of the end, which nobody noted, only what stays is touched."""
    kind = data.draw(st.sampled_from(KINDS))
    rows = list(rows)
    place = data.draw(st.integers(0, len(rows) - 1), label="line")
    noted_place = data.draw(st.integers(0, noted - 1), label="line that is noted")
    if kind in {"flip", "byte"}:
        row = bytearray(rows[place])
        spot = data.draw(st.integers(0, len(row) - 1))
        row[spot] ^= (
            1 << data.draw(st.integers(0, 7)) if kind == "flip" else data.draw(st.integers(1, 255))
        )
        rows[place] = bytes(row)
    elif kind == "edit":
        body = json.loads(rows[place])
        body[data.draw(st.sampled_from(sorted(body)))] = data.draw(st.sampled_from([0, "", "x"]))
        rows[place] = canonical_json(body).encode() + b"\n"
    elif kind == "rehash":
        # Sound in itself, but the next entry follows another one; the newest has no next.
        place = min(place, len(rows) - 2)
        body = json.loads(rows[place])
        del body["hash"]
        body["kind"] = "x"
        body["hash"] = hash_of(body)
        rows[place] = canonical_json(body).encode() + b"\n"
    elif kind == "respace":
        rows[place] = json.dumps(json.loads(rows[place])).encode() + b"\n"
    elif kind == "forge":
        # A whole entry with a hash of its own that follows the line before it. Behind the last
        # line it would be the newest entry, which nobody has signed or noted yet.
        place = min(place, len(rows) - 2)
        before = json.loads(rows[place])
        made = {
            "kind": "sent",
            "salt": "0" * 64,
            "seq": before["seq"] + 1,
            "time": before["time"],
            "previous": before["hash"],
        }
        made["hash"] = hash_of(made)
        rows.insert(place + 1, canonical_json(made).encode() + b"\n")
    elif kind == "delete":
        many = data.draw(st.integers(1, 5))
        del rows[noted_place : noted_place + many]
    elif kind == "copy":
        rows.insert(place, rows[data.draw(st.integers(0, len(rows) - 1))])
    elif kind == "swap":
        other = data.draw(st.integers(0, len(rows) - 1).filter(lambda number: number != place))
        rows[place], rows[other] = rows[other], rows[place]
    elif kind == "cut":
        del rows[noted_place:]
    else:
        whole = b"".join(rows)
        end = sum(map(len, rows[:noted]))
        return whole[: data.draw(st.integers(0, end - 1))]
    return b"".join(rows)


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(side=st.sampled_from(SIDES), data=st.data())
def test_random_damage_to_either_log_is_found_and_named(
    logs: dict[str, Log], side: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = logs[side]
    before = log.path.read_bytes()
    after = _damage(data, log.rows, log.noted)
    if after == before:
        return
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(after)
    verdict = examine(path, key=log.key, peer=log.peer)
    assert verdict.findings
    changed = _first_change(log.rows, after.splitlines(keepends=True))
    first = verdict.findings[0]
    if changed <= len(after.splitlines()):
        # Where two sound entries do not fit together, both lines are named.
        assert first.line == changed or f" in line {changed}" in first.what, verdict.findings
    else:
        # The end is gone: no line of this file can be named, so the other side's is.
        assert first.line == 0
        assert "its line " in first.what


@settings(max_examples=150, deadline=None)
@given(side=st.sampled_from(SIDES), data=st.data())
def test_a_chain_that_is_made_anew_behind_an_edit_is_found(
    logs: dict[str, Log], side: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The forger knows the format, and not the key: every hash behind the edit fits again."""
    log = logs[side]
    rows = [json.loads(row) for row in log.rows]
    place = data.draw(st.integers(0, log.noted - 1))
    how = data.draw(st.sampled_from(["edit", "drop", "resign"]))
    if how == "drop":
        del rows[place]
    else:
        rows[place]["kind"] = "nothing"
    for number in range(place, len(rows)):
        row = rows[number]
        row["seq"] = number + 1
        row["previous"] = rows[number - 1]["hash"] if number else "0" * 64
        if how == "resign" and row["kind"] == "signed":
            row["key"] = FORGER.public.hex()
            said = (number.to_bytes(8, "big"), row["previous"].encode())
            row["signature"] = FORGER.sign("cloister/audit/head/v2", *said).hex()
        del row["hash"]
        row["hash"] = hash_of(row)
    path = tmp_path_factory.getbasetemp() / "anew"
    path.write_bytes(b"".join(canonical_json(row).encode() + b"\n" for row in rows))
    verdict = examine(path, key=log.key, peer=log.peer)
    assert verdict.findings
    assert verdict.findings[0].line > place or "its line" in verdict.findings[0].what
    last = max(number for number, row in enumerate(rows) if row["kind"] == "signed")
    if place < last:
        # The forger cannot sign, so the log alone tells, to whoever knows its writer's key.
        assert examine(path, key=log.key).findings


@pytest.mark.parametrize("side", SIDES)
def test_a_whole_side_rolled_back_is_found_by_the_other_side(
    logs: dict[str, Log], side: str
) -> None:
    """The log with its signatures, its ledger, its keys: a folder from a backup."""
    log = logs[side]
    alone = examine(log.early, key=log.key)
    assert alone.findings == ()
    assert alone.signed > 0
    against = examine(log.early, key=log.key, peer=log.peer)
    assert any("it is missing" in found.what for found in against.findings)
    # Both sides together rolled back fit together: only a third, here another site, can tell.
    if side == "coordinator":
        others = [logs[name] for name in NAMES]
        assert all(examine(log.early, peer=other.path).findings for other in others)
        early = logs["anker"].early
        assert examine(log.early, peer=early).findings == ()


def test_verify_names_the_line_on_the_command_line(
    logs: dict[str, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("anker", "coordinator"):
        log = logs[side]
        rows = log.rows
        del rows[6]
        (tmp_path / side).write_bytes(b"".join(rows))
        with pytest.raises(SystemExit) as ended:
            main.main(["verify", str(tmp_path / side), "--against", str(log.peer)])
        assert ended.value.code == 4
        assert "line 7: before entry 8, entry 7 is missing" in capsys.readouterr().out
