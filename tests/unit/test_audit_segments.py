"""The sealed segments of an audit log: one chain over all files, whatever ends its writer."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cloister_fl.audit_log import AuditLog, examine, read, segments
from cloister_fl.audit_log import log as module
from cloister_fl.audit_log.entries import Entry
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.membership.identity import Identity

KEY, OTHER = Identity.generate(), Identity.generate()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1_400)


def _pass_over(_: Entry) -> None:
    pass


def _write(path: Path, count: int = 30) -> AuditLog:
    log = AuditLog(path, KEY)
    for number in range(count):
        log.append("asked", number=number)
    return log


def _numbers(path: Path) -> list[object]:
    return [entry.body["number"] for entry in read(path) if entry.kind == "asked"]


def _require_whole(path: Path, count: int) -> None:
    """Each entry is there once, in order, in one chain whose sealed files are signed to the end."""
    assert _numbers(path) == list(range(count))
    verdict = examine(path, key=KEY.public)
    assert verdict.findings == ()
    assert [entry.seq for entry in read(path)] == list(range(1, verdict.entries + 1))


def test_a_full_log_is_sealed_and_its_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _write(path)
    _require_whole(path, 30)
    kept = segments.sealed(path)
    assert [one.name for one in kept] == [f"audit.{n:06d}.jsonl" for n in range(1, len(kept) + 1)]
    assert len(kept) > 3
    assert all(one.stat().st_size < 4_000 for one in (*kept, path))
    assert {one.stat().st_mode & 0o777 for one in (*kept, path)} == {0o600}
    for one in kept:
        rows = one.read_text().splitlines()
        assert '"kind":"sealed"' in rows[-2]
        assert '"kind":"signed"' in rows[-1]
        # By itself, each is the log up to its end.
        verdict = examine(one, key=KEY.public)
        assert verdict.findings == ()
        assert verdict.signed == verdict.head.seq - 1
    assert path.read_text().splitlines()[0].count('"kind":"segment"') == 1
    assert list(log.entries()) == list(read(path))
    assert log.head() == log.pin


def test_what_is_in_memory_does_not_grow_with_the_years(tmp_path: Path) -> None:
    log = _write(tmp_path / "audit.jsonl", 1)
    log.verify(_pass_over)
    heads = [log.append("asked", number=number) for number in range(100)]
    assert log.is_as_verified()
    assert log._verified is not None
    assert len(log._verified.hashes) < 10
    assert all(log.holds(head.hash) for head in heads)
    assert not log.holds("0" * 64)
    again = AuditLog(tmp_path / "audit.jsonl", KEY, pin=heads[3])
    again.verify(_pass_over)
    assert again._verified is not None
    assert len(again._verified.hashes) < 10
    assert all(again.holds(head.hash) for head in heads)


def test_a_writer_that_waited_goes_on_in_the_next_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            log = AuditLog(path, KEY)
            for number in range(20):
                log.append("asked", number=number, by=name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failed == []
    assert examine(path, key=KEY.public).findings == ()
    for name in "abc":
        by_name = [entry.body["number"] for entry in read(path) if entry.body.get("by") == name]
        assert by_name == list(range(20))


@pytest.mark.slow
@pytest.mark.process
def test_killed_at_any_line_of_sealing_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    sealing = {segments.__file__, module.__file__}
    for line in range(1, 1_000):
        path = tmp_path / str(line) / "audit.jsonl"
        path.parent.mkdir()
        _write(path, 5)
        if path.stat().st_size < segments.SEGMENT_BYTES:
            pytest.fail("the next entry seals nothing")
        process = os.fork()
        if process == 0:
            seen = 0

            def trace(frame: FrameType, event: str, argument: Any, line: int = line) -> Any:
                nonlocal seen
                if frame.f_code.co_filename not in sealing:
                    return None
                seen += event == "line"
                if seen == line:
                    os._exit(9)
                return trace

            log = AuditLog(path, KEY)
            sys.settrace(trace)
            log.append("asked", number=5)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        found = _numbers(path)
        # Whoever reads meanwhile finds one log, too.
        assert examine(path, key=KEY.public).findings == ()
        if len(found) == 5:
            AuditLog(path, KEY).append("asked", number=5)
        AuditLog(path, KEY).append("asked", number=6)
        _require_whole(path, 7)
        kinds = [entry.kind for entry in read(path)]
        assert [kinds.count(kind) for kind in ("sealed", "signed", "segment")] == [1, 1, 1]
        assert sorted(one.name for one in path.parent.iterdir() if one.suffix == ".jsonl") == [
            "audit.000001.jsonl",
            "audit.jsonl",
        ]
        if os.waitstatus_to_exitcode(status) == 0:
            assert line > 60
            return
    pytest.fail("it was killed at each of a thousand lines")


def _edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"number":1,', b'"number":9,', 1))


@pytest.mark.parametrize(
    ("which", "harm", "told", "found"),
    [
        (1, Path.unlink, "segment before audit.000002.jsonl, or its end, is missing",
         "the sealed segment audit.000001.jsonl is missing"),
        (-1, Path.unlink, "segment before audit.jsonl, or its end, is missing", "is missing"),
        (0, Path.unlink, "audit.jsonl has no entry", None),
        (0, lambda path: path.write_bytes(b""), "has no entry, and sealed segments are there",
         "audit.jsonl has no entry"),
        (1, _edit, "Line 2 was changed", "audit.000001.jsonl line 2: entry 2 was edited"),
        (2, lambda path: path.write_bytes(b""), "audit.000002.jsonl has no entry",
         "before entry"),
        (1, lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1])),
         "before audit.000002.jsonl, or its end, is missing", "is missing or was moved"),
    ],
    ids=["first", "last", "written", "emptied", "edited", "sealed emptied", "end cut off"],
)  # fmt: skip
def test_a_segment_that_is_missing_or_altered_is_told(
    which: int, harm: Callable[[Path], object], told: str, found: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    log = _write(path)
    log.verify(_pass_over)
    kept = segments.sealed(path)
    number = which if which >= 0 else len(kept)
    harm(segments.segment_path(path, number) if number else path)
    assert not log.is_as_verified()
    before = {one: one.read_bytes() for one in tmp_path.iterdir() if one.suffix == ".jsonl"}
    for one in (log, AuditLog(path, KEY)):
        with pytest.raises(AuditLogDamaged, match=told):
            one.verify(_pass_over)
    if number == 0:
        with pytest.raises(AuditLogDamaged, match="no entry"):
            AuditLog(path, KEY).append("asked")
    with pytest.raises(AuditLogDamaged):
        list(read(path))
    if found is not None:
        assert any(found in one.where + one.what for one in examine(path, key=KEY.public).findings)
    assert all(one.read_bytes() == held for one, held in before.items())


def test_the_other_sides_log_is_compared_over_all_its_files(tmp_path: Path) -> None:
    one, two = AuditLog(tmp_path / "one.jsonl", KEY), AuditLog(tmp_path / "two.jsonl", OTHER)
    one.sign()
    for number in range(20):
        head = one.append("sent", number=number)
        two.append("received", number=number, peer_head=one.note(head))
    theirs = tmp_path / "two.jsonl"
    assert len(segments.sealed(theirs)) > 2
    assert examine(tmp_path / "one.jsonl", peer=theirs).findings == ()
    (tmp_path / "one.jsonl").unlink()
    last = segments.sealed(tmp_path / "one.jsonl")[-1]
    told = [found.what for found in examine(last, peer=theirs).findings]
    assert any("the other side recorded an entry after line" in what for what in told)
    segments.sealed(theirs)[0].unlink()
    told = [found.what for found in examine(last, peer=theirs).findings]
    assert any("two.000001.jsonl is missing: it was not compared" in what for what in told)


def test_a_file_in_the_place_of_the_next_segment_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _write(path, 5)
    taken = segments.segment_path(path, 1)
    taken.write_text("mine")
    with pytest.raises(AuditLogDamaged):
        log.append("asked", number=5)
    assert taken.read_text() == "mine"
    taken.unlink()
    log.append("asked", number=5)
    _require_whole(path, 6)
