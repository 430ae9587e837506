"""The audit log: whatever is done to a line is found, and a kill in mid-line costs that line."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.audit_log import EMPTY, AuditLog, Head, examine, name_of, parse_note, read
from cloister_fl.audit_log import log as module
from cloister_fl.audit_log.entries import SALT_BYTES, Entry
from cloister_fl.cli import main
from cloister_fl.errors import AuditLogDamaged, FileUnreadable
from cloister_fl.membership.identity import Identity
from support.tampering import cut, overwrite, put_in_place

KEY = Identity.generate()
OTHER = Identity.generate()


def _write(path: Path, count: int = 8, identity: Identity = KEY) -> AuditLog:
    log = AuditLog(path, identity)
    for number in range(count):
        log.append("sent", message="exchanged", bytes=number, why="masked")
    log.sign()
    return log


def _verified(log: AuditLog) -> list[Entry]:
    """The entries of a log that is verified."""
    entries: list[Entry] = []
    log.verify(entries.append)
    return entries


def _pair(folder: Path, count: int = 8) -> tuple[Path, Path]:
    """Two logs whose writers noted each other's heads."""
    one, two = AuditLog(folder / "one", KEY), AuditLog(folder / "two", OTHER)
    one.sign()
    two.sign()
    for number in range(count):
        head = one.append("sent", bytes=number)
        head = two.append("received", bytes=number, peer_head=one.note(head))
        one.append("asked", peer_head=two.note(head))
    return folder / "one", folder / "two"


def test_a_sound_log_reads_back(tmp_path: Path) -> None:
    log = _write(tmp_path / "log", 3)
    entries = list(read(tmp_path / "log"))
    assert [entry.seq for entry in entries] == [1, 2, 3, 4]
    assert [entry.kind for entry in entries] == ["sent"] * 3 + ["signed"]
    assert entries[1].body == {"message": "exchanged", "bytes": 1, "why": "masked"}
    assert entries[0].previous == "0" * 64
    assert log.head() == Head(4, entries[3].hash)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    verdict = examine(tmp_path / "log", key=KEY.public)
    assert (verdict.entries, verdict.signed, verdict.findings) == (4, 3, ())


def test_an_absent_log_has_no_head(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "log", KEY).head() == EMPTY


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda rows: rows[:2] + rows[3:], "entry 3 is missing"),
        (lambda rows: rows[:2] + rows[5:], "entry 3 to 5 is missing"),
        (lambda rows: [*rows[:2], rows[2].replace('"bytes":2', '"bytes":7'), *rows[3:]], "edited"),
        (lambda rows: [*rows[:3], rows[1], *rows[3:]], "entry 2 appears again"),
        (
            lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]],
            "entry 3 comes after entry 4: it was moved",
        ),
        (lambda rows: [*rows[:4], "{}", *rows[4:]], "is not an entry"),
        (lambda rows: [*rows[:4], "not json", *rows[4:]], "is not an entry"),
        (lambda rows: [row.replace("masked", "plain") for row in rows], "edited"),
    ],
    ids=["deleted", "several", "edited", "repeated", "moved", "empty", "junk", "all"],
)
def test_each_kind_of_damage_is_named(tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "log"
    _write(path)
    rows = path.read_text().splitlines()
    path.write_text("\n".join(damage(rows)) + "\n")  # type: ignore[operator]
    findings = examine(path).findings
    assert any(words in found.what for found in findings), findings
    with pytest.raises(AuditLogDamaged):
        list(read(path))


def test_a_new_chain_needs_the_key(tmp_path: Path) -> None:
    """Whoever rewrites the whole file makes a sound chain, and cannot sign it."""
    path = tmp_path / "log"
    _write(path)
    path.unlink()
    _write(path, 3, OTHER)
    assert examine(path).findings == ()
    (found,) = examine(path, key=KEY.public).findings
    assert "not validly signed" in found.what


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_random_damage_to_either_log_is_found(
    seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    paths = _pair(folder, 4)
    which = data.draw(st.integers(0, 1))
    path, peer = paths[which], paths[1 - which]
    assert examine(path, peer=peer).findings == ()
    rows = path.read_bytes().splitlines(keepends=True)
    chance = random.Random(seed)
    kind = data.draw(st.sampled_from(["flip", "delete", "repeat", "swap", "cut"]))
    place = chance.randrange(len(rows))
    # The very last entry of either log is one that nobody has noted yet.
    last = max(
        number for number, row in enumerate(rows) if b'"sent"' in row or b'"received"' in row
    )
    if kind == "flip":
        row = bytearray(rows[place])
        spot = chance.randrange(len(row) - 1)
        row[spot] ^= 1 << chance.randrange(7)
        rows[place] = bytes(row)
    elif kind == "delete":
        del rows[min(place, last)]
    elif kind == "repeat":
        rows.insert(place, rows[chance.randrange(len(rows))])
    elif kind == "swap":
        other = (place + 1 + chance.randrange(len(rows) - 1)) % len(rows)
        rows[place], rows[other] = rows[other], rows[place]
    else:
        del rows[min(place, last) :]
    path.write_bytes(b"".join(rows))
    assert examine(path, peer=peer).findings


def test_both_rolled_back_together_is_found_by_the_other_side(tmp_path: Path) -> None:
    one, two = _pair(tmp_path)
    whole = one.read_text().splitlines(keepends=True)
    one.write_text("".join(whole[:7]))
    assert examine(one).findings == ()
    assert any("it is missing" in found.what for found in examine(one, peer=two).findings)


def test_a_log_that_the_other_side_never_met(tmp_path: Path) -> None:
    _, two = _pair(tmp_path)
    _write(tmp_path / "new", 3, Identity.generate())
    (found,) = examine(tmp_path / "new", peer=two).findings
    assert "recorded no log" in found.what


@pytest.mark.parametrize("cut", [1, 5, 60, 150])
def test_a_line_that_a_kill_cut_short_is_told_and_costs_nothing_else(
    tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "log"
    _write(path)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -min(cut, len(last) - 1)])
    log = AuditLog(path, KEY)  # In the process after it: nobody there knows the line.
    log.append("sent", bytes=1)
    kinds = [entry.kind for entry in read(path)]
    assert kinds == ["sent"] * 8 + ["recovered", "sent"]
    assert examine(path).findings == ()


def test_a_damaged_end_is_not_written_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = _write(path)
    path.write_bytes(path.read_bytes() + b"garbage\n")
    before = path.read_bytes()
    with pytest.raises(AuditLogDamaged):
        log.append("sent")
    assert path.read_bytes() == before


# A log that is verified once and then followed.


@pytest.mark.process
def test_a_verified_log_that_nobody_touched_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    log = AuditLog(path, KEY)
    assert _verified(log) == []
    _write(path, 5)
    assert not log.is_as_verified()
    assert [entry.kind for entry in _verified(log)] == ["sent"] * 5 + ["signed"]
    monkeypatch.setattr(module, "last", None)
    monkeypatch.setattr(module, "chained", None)
    heads = [log.append("sent", bytes=number) for number in range(3)] + [log.sign()]
    assert log.is_as_verified()
    assert all(log.holds(head.hash) for head in heads)
    assert not log.holds("0" * 64)
    monkeypatch.undo()
    assert [head.seq for head in heads] == [7, 8, 9, 10]
    assert [entry.seq for entry in read(path)] == list(range(1, 11))
    assert examine(path, key=KEY.public).findings == ()
    # What somebody else appended is a change like any other, and lawful.
    AuditLog(path, KEY).append("judged", by="steward")
    assert not log.is_as_verified()
    log.append("sent")
    assert not log.is_as_verified()
    assert [entry.kind for entry in _verified(log)][-2:] == ["judged", "sent"]
    assert log.is_as_verified()


def _line(path: Path, number: int) -> bytes:
    return path.read_bytes().splitlines(keepends=True)[number - 1]


def _without_line_three(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(_line(path, 3), b""))
    put_in_place(path, other)


def _older(path: Path) -> None:
    other = path.with_name("older")
    other.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    put_in_place(path, other)


def _another(path: Path) -> None:
    _write(path.with_name("another"), 12)
    put_in_place(path, path.with_name("another"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda path: overwrite(path, b'"bytes":2', b'"bytes":7'), "Line 3 was changed"),
        (lambda path: overwrite(path, b'"kind":"signed"', b'"kind":"sigNed"'), "Line 9 was"),
        (lambda path: cut(path, len(_line(path, 9))), "entry 9 is gone"),
        (_without_line_three, "Line 3 was changed"),
        (_older, "entry 9 is gone"),
        (_another, "entry 9 is gone, or another one stands in its place"),
        (Path.unlink, "entry 9 is gone"),
    ],
    ids=["byte", "last byte", "last line", "line", "older", "another", "all"],
)
def test_whatever_else_changed_a_verified_log_is_found(
    tmp_path: Path, tamper: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "log"
    log = _write(path)
    _verified(log)
    head = log.head()
    assert log.holds(head.hash)
    tamper(path)
    assert not log.is_as_verified()
    for _ in range(2):  # It stays so.
        with pytest.raises(AuditLogDamaged, match=words):
            _verified(log)
        assert not log.is_as_verified()
    assert not log.holds(head.hash)


@pytest.mark.process
@pytest.mark.parametrize("verified", [True, False], ids=["verified", "written"])
@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda path: overwrite(path, b'"bytes":2', b'"bytes":7'), "Line 3 was changed"),
        (lambda path: cut(path, len(_line(path, 9))), "entry 9 is gone"),
        (_older, "entry 9 is gone"),
        (_another, "entry 9 is gone, or another one stands in its place"),
        (Path.unlink, "entry 9 is gone"),
    ],
    ids=["byte", "last line", "older", "another", "all"],
)
def test_nothing_is_appended_to_a_log_that_lacks_what_was_verified_or_written_here(
    tmp_path: Path, tamper: Callable[[Path], None], words: str, verified: bool
) -> None:
    path = tmp_path / "log"
    log = _write(path)
    if verified:
        log = AuditLog(path, KEY)
        _verified(log)
    # So does another one, as after a change of the key.
    other = AuditLog(path, OTHER, pin=log.pin)
    tamper(path)
    before = path.read_bytes() if path.exists() else b""
    for one in (log, other, log):  # It stays so.
        with pytest.raises(AuditLogDamaged, match=words):
            one.append("sent")
        with pytest.raises(AuditLogDamaged, match=words):
            one.sign()
        with pytest.raises(AuditLogDamaged, match=words):
            one.head()
        with pytest.raises(AuditLogDamaged, match=words):
            list(one.entries())
        assert one.pin == other.pin
    assert (path.read_bytes() if path.exists() else b"") == before


def test_what_somebody_else_appended_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = _write(path)
    AuditLog(path, KEY).append("judged", by="steward")
    assert log.append("sent").seq == 11
    assert log.pin == log.head()
    assert [entry.kind for entry in log.entries()][-3:] == ["signed", "judged", "sent"]
    assert examine(path, key=KEY.public).findings == ()


def test_a_verified_log_is_no_longer_so_where_a_line_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = _write(path)
    _verified(log)
    with path.open("ab") as file:
        file.write(b'{"bytes":')
    assert len(_verified(log)) == 9
    assert not log.is_as_verified()
    log.append("sent")
    assert [entry.kind for entry in _verified(log)][-2:] == ["recovered", "sent"]
    assert log.is_as_verified()


def _many(path: str) -> None:
    log = AuditLog(Path(path), KEY)
    for number in range(40):
        log.append("sent", process=os.getpid(), number=number)


def test_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_many, args=(str(path),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = list(read(path))
    assert len(entries) == 120
    by_process = {entry.body["process"] for entry in entries}
    assert len(by_process) == 3


HASH = "0123456789abcdef" * 4
LOG = "0" * 16


def test_a_note_names_a_log_and_entries_by_their_hashes_alone(tmp_path: Path) -> None:
    log = _write(tmp_path / "log")
    head = log.head()
    assert log.note(head) == f"{name_of(KEY.public)}:{head.hash}"
    assert parse_note(log.note(head)) == (name_of(KEY.public), head.hash, "")
    assert parse_note(log.note(head, HASH)) == (name_of(KEY.public), head.hash, HASH)
    assert name_of(KEY.public) != name_of(OTHER.public)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1:2", "g" * 16 + f":{HASH}", f"{LOG}:0", f"{LOG}:{HASH}:", f"{LOG}:{HASH}:7"),
        # As before, with a number.
        f"{LOG}:1:{HASH}",
        f"{LOG}:{HASH}:{HASH}:{HASH}",
    ],
)
def test_a_note_that_is_none(text: str) -> None:
    assert parse_note(text) is None


def _end(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main.main(["verify", *arguments])
    return int(caught.value.code or 0), capsys.readouterr().out


def test_verify_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = _pair(tmp_path)
    status, out = _end(capsys, str(one), "--against", str(two), "--key", KEY.public.hex())
    assert status == 0
    assert "The log was not changed" in out
    rows = one.read_text().splitlines()
    one.write_text("\n".join(rows[:3] + rows[4:]) + "\n")
    status, out = _end(capsys, str(one), "--json")
    assert status == 4
    told = json.loads(out)
    assert told["sound"] is False
    assert told["findings"][0] == {
        "line": 4,
        "what": "before entry 5, entry 4 is missing or was moved",
    }


@pytest.mark.parametrize("arguments", [("nowhere",), (".",)])
def test_verify_of_no_file_is_a_named_error(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["verify", *arguments])
    # No alarm: nothing was changed.
    assert caught.value.code == FileUnreadable.exit_status
    assert capsys.readouterr().err.startswith("CLO-103: ")


@pytest.mark.parametrize(
    "text", ["[study]\n", '{"body":{"seq":1},"hash":"0","previous":"0"}\n', "\0"]
)
def test_verify_of_another_file_is_no_alarm(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = _pair(tmp_path)
    other = tmp_path / "other"
    other.write_text(text)
    for arguments in ([str(other)], [str(one), "--against", str(other)]):
        with pytest.raises(SystemExit) as caught:
            main.main(["verify", *arguments])
        assert caught.value.code == FileUnreadable.exit_status
        told = capsys.readouterr().err
        assert "other is neither an audit log nor a certificate" in told
        assert "changed" not in told


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("{", '{"body":0,', 1),
        lambda text: '{"body":1}\n' + text,
        lambda text: "x" * (1 << 20) + "\n" + text,
    ],
)
def test_a_log_whose_first_line_was_defaced_is_no_other_file(
    damage: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = _pair(tmp_path)
    one.write_text(damage(one.read_text()))
    with pytest.raises(SystemExit) as caught:
        main.main(["verify", str(one)])
    assert caught.value.code == AuditLogDamaged.exit_status
    told = capsys.readouterr().out
    assert "  line 1: " in told
    assert "The log was changed." in told


def test_a_log_without_a_signature_says_that_the_key_is_needed(tmp_path: Path) -> None:
    one, two = _pair(tmp_path)
    rows = one.read_text().splitlines(keepends=True)
    one.write_text("")
    (found,) = examine(one, peer=two).findings
    assert "no entry is signed" in found.what
    noted = examine(one, key=KEY.public, peer=two).findings
    assert len(noted) > 1
    assert all("it is missing" in found.what for found in noted)
    one.write_text("".join(rows)[:-1])
    assert [(found.line, found.what) for found in examine(one).findings] == [
        (len(rows), f"entry {len(rows)} is incomplete: it was cut short")
    ]


def test_a_thousand_sites_fit_on_a_line_and_no_line_is_too_long_to_read(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    seats = " ".join(f"{2**63 - number}={'n' * 59}{number:04d}" for number in range(1000))
    log.append("began", sites=seats)
    log.sign()
    assert [entry.kind for entry in read(tmp_path / "log")] == ["began", "signed"]
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(ValueError, match="longer"):
        log.append("began", sites=seats + seats)
    assert (tmp_path / "log").read_bytes() == before


# Salts.


def test_each_entry_has_a_salt_of_its_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write(tmp_path / name, 20)
    salts = [entry.salt for name in ("one", "two") for entry in read(tmp_path / name)]
    assert len(set(salts)) == len(salts) == 42
    assert all(len(bytes.fromhex(salt)) == SALT_BYTES == 32 for salt in salts)
    with pytest.raises(ValueError, match="fixed fields"):
        AuditLog(tmp_path / "one", KEY).append("sent", salt="0" * 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(salt="0" * 64),
        lambda entry: entry.update(salt=entry["salt"][:-2]),
        lambda entry: entry.update(salt=7),
        lambda entry: entry.pop("salt"),
    ],
    ids=["another", "short", "number", "none"],
)
def test_a_salt_is_part_of_what_is_hashed(
    tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    path = tmp_path / "log"
    _write(path)
    rows = path.read_text().splitlines()
    entry = json.loads(rows[2])
    change(entry)
    rows[2] = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    path.write_text("\n".join(rows) + "\n")
    assert examine(path).findings[0].line == 3
    with pytest.raises(AuditLogDamaged, match="Line 3 was changed"):
        list(read(path))


def _without_salts(path: Path) -> None:
    """As an earlier version wrote a log."""
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    for row in rows:
        del row["salt"]
    path.write_text(
        "".join(f"{json.dumps(r, sort_keys=True, separators=(',', ':'))}\n" for r in rows)
    )


def test_a_log_of_an_earlier_version_is_named_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    _write(path)
    _without_salts(path)
    before = path.read_bytes()
    log = AuditLog(path, KEY)
    for use in (
        lambda: _verified(log),
        log.head,
        log.sign,
        lambda: log.append("sent"),
        lambda: list(read(path)),
    ):
        with pytest.raises(
            AuditLogDamaged, match="an earlier version of Cloister wrote it"
        ) as told:
            use()
        assert "cloister explain CLO-306" in str(told.value)
    assert path.read_bytes() == before
    status, out = _end(capsys, str(path))
    assert status == AuditLogDamaged.exit_status
    assert "line 1: has no salt, as an entry of an earlier version" in out
