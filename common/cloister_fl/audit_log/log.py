"""The log of one side: entries in a hash chain that both sides attest.

Whoever edits the files can make a new chain, so the writer signs the head from time to time
(Ed25519), and the two sides tell each other their heads with every message and note them: cutting
the end off, or rolling both the files and their signatures back, shows in the other side's log.
What an entry is, is in ``entries``; which files there are, in ``segments``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cloister_fl.audit_log import segments
from cloister_fl.audit_log.entries import (
    EMPTY,
    FIXED,
    LABEL,
    MAX_LINE,
    SALT_BYTES,
    SIGN_LABEL,
    SIGNED,
    Entry,
    Head,
    Value,
    chained,
    damaged,
    gone,
    last,
    require_torn,
)
from cloister_fl.audit_log.heads import name_of
from cloister_fl.encoding.canonical_json import canonical_json, entry_hash
from cloister_fl.encoding.framing import u64
from cloister_fl.membership.identity import Identity
from cloister_fl.system import utc
from cloister_fl.system.files import Mark, locked, mark_of


@dataclass
class _Verified:
    """What a log was when it was last read whole, and has become by the entries written since."""

    hashes: set[str]
    """Of the entries of the file that is written; those of sealed segments stay on the disk."""
    is_torn: bool
    """Whether a line that a kill cut short is behind the head."""


class _Segment(NamedTuple):
    """A sealed segment that was verified, as it looked then."""

    path: Path
    mark: Mark | None


class AuditLog:
    """The log; several processes may write to it.

    One without the last entry that was verified or written here is refused, whatever reads it or
    appends to it: it is an older log, or another one.

    Args:
        path: the file that is written; made with mode 0600 at the first entry. Its folder must
            exist; full ones are sealed beside it.
        identity: signs the head.
        pin: entry that the file must have, as of another ``AuditLog`` of this process.
    """

    def __init__(self, path: Path, identity: Identity, *, pin: Head = EMPTY) -> None:
        self._path = path
        self._identity = identity
        self._name = name_of(identity.public)
        self._verified: _Verified | None = None
        self._pin = pin
        self._mark: Mark | None = None
        """Of the file when the pin was its end; None where that is not known."""
        self._sealed: tuple[_Segment, ...] = ()

    @property
    def pin(self) -> Head:
        """The last entry that was verified or written here; ``EMPTY`` before the first."""
        return self._pin

    def append(self, kind: str, **body: Value) -> Head:
        """Write one entry, durably.

        A last line that a kill cut short is no entry: it is taken off, and a ``recovered`` entry
        says that it was there.

        Raises:
            AuditLogDamaged: the end of the file is not a log's, it cannot be written, or somebody
                else changed it and it is not sound or lacks what was verified or written here.
        """
        if FIXED & body.keys():
            raise ValueError("an entry's fixed fields are not its body")
        return self._append(kind, lambda _: body)

    def sign(self) -> Head:
        """Write an entry that signs everything before it."""
        return self._append(SIGNED, self._signature)

    def verify(self, see: Callable[[Entry], object]) -> None:
        """Read the whole log, sealed segments too, and remember how its files look.

        From then on, ``is_as_verified`` says at little cost whether anybody else touched them, and
        what is written here is part of it. A last line that a kill cut short is no entry.

        Args:
            see: is given each entry, oldest first; no more than one file's are in memory.

        Raises:
            AuditLogDamaged: at the first line that does not fit; or the last entry that was
                verified or written here is gone, as in an older log.
        """
        self._verified, self._mark, self._sealed = None, None, ()
        if mark_of(self._path) is None:
            mark, lines, before = None, [], segments.sealed(self._path)
        else:
            with self._locked() as file:
                mark = mark_of(file.fileno())
                lines, before = file.readlines(), segments.sealed(self._path)
        head, hashes, is_torn = self._read_whole(before, lines, see)
        self._pin = head
        self._mark = None if is_torn else mark
        self._verified = _Verified(hashes, is_torn)

    def is_as_verified(self) -> bool:
        """Whether nobody else touched the files since ``verify``, and they end with an entry.

        Raises:
            AuditLogDamaged: they cannot be looked at.
        """
        if self._verified is None or self._verified.is_torn:
            return False
        try:
            for segment in self._sealed:
                if segment.mark != mark_of(segment.path):
                    return False
            return self._mark == mark_of(self._path)
        except OSError as error:
            raise damaged("It cannot be read.", self._path) from error

    def holds(self, digest: str) -> bool:
        """Whether an entry has this hash; of the entries that were verified or written here."""
        if self._verified is None:
            return False
        if digest in self._verified.hashes:
            return True
        return any(segments.holds(one.path, digest) for one in reversed(self._sealed))

    def note(self, head: Head, base: str = "") -> str:
        """What the other side is told of a head, for ``heads.parse_note``; not its number.

        Args:
            head: of this log.
            base: hash of the entry that the other side was told before; empty where that is not
                known.
        """
        told = f"{self._name}:{head.hash}"
        return f"{told}:{base}" if base else told

    def entries(self) -> Iterator[Entry]:
        """Its entries, oldest first; a last line that a kill cut short is none.

        Raises:
            AuditLogDamaged: at the first line that does not fit; or at the end, where the last
                entry that was verified or written here is gone.
        """
        pin, seq = self._pin, 0
        if segments.is_begun(self._path):
            for entry in segments.read(self._path, whole_lines=True):
                if entry.seq == pin.seq and entry.hash != pin.hash:
                    break
                seq = entry.seq
                yield entry
        if seq < pin.seq:
            raise gone(pin, self._path)

    def head(self) -> Head:
        """The head; ``EMPTY`` where nothing was written yet."""
        if not self._path.exists():
            self._read_whole(segments.sealed(self._path), [], _pass_over)
            return EMPTY
        with self._locked() as file:
            return self._end(file)[0]

    def _append(self, kind: str, body: Callable[[Head], Mapping[str, Value]]) -> Head:
        """Write an entry whose body may depend on the head before it."""
        with self._locked() as file:
            head, torn = self._end(file)
            if torn:
                head = write(file, head, "recovered", {"bytes": torn})
            written = file
            if os.fstat(file.fileno()).st_size >= segments.SEGMENT_BYTES:
                written, head = self._seal(file, head)
            try:
                head = write(written, head, kind, body(head))
                if self._verified is not None:
                    self._verified.hashes.add(head.hash)
                # The mark last: whatever ends this before it, the log is read whole the next time.
                self._pin = head
                self._mark = mark_of(written.fileno())
            finally:
                written.close()
        return head

    def _seal(self, file: BinaryIO, head: Head) -> tuple[BinaryIO, Head]:
        """Seal the full file and begin the next, whose lock is held until it is closed."""
        before = self._verified
        # Whatever ends this on the way, the log is read whole the next time.
        self._verified = self._mark = None
        fresh, first = segments.seal(file, self._path, head, write, self._signature)
        kept = segments.sealed(self._path)[-1]
        self._sealed = (*self._sealed, _Segment(kept, mark_of(kept)))
        if before is not None:
            self._verified = _Verified({first.hash}, is_torn=False)
        return fresh, first

    def _signature(self, head: Head) -> Mapping[str, Value]:
        signature = self._identity.sign(SIGN_LABEL, u64(head.seq), head.hash.encode())
        return {"key": self._identity.public.hex(), "signature": signature.hex()}

    def _end(self, file: BinaryIO) -> tuple[Head, int]:
        """The head of the locked file, and how many bytes of a torn line were taken off behind it.

        Raises:
            AuditLogDamaged: its end is not a log's; or somebody else changed it, and it is not
                sound or lacks the pin.
        """
        if self._mark is not None and self._mark == mark_of(file.fileno()):
            return self._pin, 0
        # Somebody else wrote: what that was is for ``verify`` to say, but it must be a log that
        # went on from what was verified or written here. It was perhaps replaced or written while
        # this process waited for the lock.
        self._verified = self._mark = None
        if self._pin.seq:
            file.seek(0)
            self._read_whole(segments.sealed(self._path), file.readlines(), _pass_over)
        entry, torn = last(file, self._path)
        if entry is None and segments.sealed(self._path):
            raise segments.empty(self._path)
        return EMPTY if entry is None else Head(entry.seq, entry.hash), torn

    def _read_whole(
        self, before: Sequence[Path], lines: list[bytes], see: Callable[[Entry], object]
    ) -> tuple[Head, set[str], bool]:
        """Read the log.

        Args:
            before: its sealed segments, as they were when the lines were read.
            lines: of the file that is written.
            see: see ``verify``.

        Returns:
            The head, the hashes of the file's entries, and whether a torn line is behind them.

        Raises:
            AuditLogDamaged: see ``verify``.
        """
        head, pin, kept = EMPTY, self._pin, []
        is_torn = bool(lines) and not lines[-1].endswith(b"\n")
        if is_torn:
            require_torn(lines[-1], self._path)
        hashes: set[str] = set()
        for path in (*before, self._path):
            # Before the reading: what is written behind it is found the next time.
            mark, seq, hashes = mark_of(path), head.seq, set()
            held = segments.lines_of(path) if path != self._path else lines[: len(lines) - is_torn]
            for entry in chained(held, path, head):
                if entry.seq == pin.seq and entry.hash != pin.hash:
                    raise gone(pin, self._path)
                head = Head(entry.seq, entry.hash)
                hashes.add(entry.hash)
                see(entry)
            if before and head.seq == seq:
                raise segments.empty(path)
            kept.append(_Segment(path, mark))
        if head.seq < pin.seq:
            raise gone(pin, self._path)
        self._sealed = tuple(kept[:-1])
        return head, hashes, is_torn

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            while True:
                with locked(self._path) as handle:
                    mine, named = mark_of(handle), mark_of(self._path)
                    if mine is None or named is None or mine[:2] != named[:2]:
                        # It was sealed while its lock was waited for: another bears its name.
                        continue
                    with os.fdopen(handle, "r+b", closefd=False) as file:
                        yield file
                    return
        except OSError as error:
            raise damaged("It cannot be read or written.", self._path) from error


def write(file: BinaryIO, head: Head, kind: str, body: Mapping[str, Value]) -> Head:
    """Write the entry behind ``head`` at the end of a file, durably; its head.

    Raises:
        ValueError: it is longer than a line may be.
    """
    full = {
        **body,
        "kind": kind,
        "previous": head.hash,
        "salt": secrets.token_hex(SALT_BYTES),
        "seq": head.seq + 1,
        "time": utc.timestamp(),
    }
    digest = entry_hash(LABEL, canonical_json(full))
    file.seek(0, os.SEEK_END)
    line = canonical_json({**full, "hash": digest}).encode() + b"\n"
    if len(line) > MAX_LINE:
        # It could never be read again, and nothing after it.
        raise ValueError("an entry is longer than a line may be")
    file.write(line)
    file.flush()
    os.fsync(file.fileno())
    return Head(head.seq + 1, digest)


def _pass_over(_: Entry) -> None:
    """For who wants a log to be sound, and reads none of it."""
