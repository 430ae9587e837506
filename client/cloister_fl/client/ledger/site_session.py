"""Site session: folder, keys, audit log and ledger of a site, opened once and verified together.

A session lives as long as its process, and every message is answered from it. What is kept was
read whole once: each message looks at the files, and where anybody else touched one, all of it is
read and compared again before anything is charged. A lawful change by another process, as of a
steward's command, costs that reading and no more; a ledger or a log that lacks what this session
wrote or read is refused. Nothing of it is written down: a process that starts has verified nothing.
What must be there again, the pins, outlives settings, keys, and the session itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from cloister_fl.audit_log import EMPTY, AuditLog, Head, heads_told, name_of
from cloister_fl.client.ledger.chain import rolled_back
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.ledger_file import Head as LedgerHead
from cloister_fl.client.ledger.rollback import (
    ACCEPTED,
    CLAIMED,
    FILE,
    NOTE,
    LogReader,
    Note,
    Pins,
    claims_of,
    differences,
    high_of,
    lacking,
)
from cloister_fl.client.ledger.steward_entries import Acceptance
from cloister_fl.client.site.audit_log import path_of
from cloister_fl.client.site.folder import (
    CACHE_KEY,
    IDENTITY,
    PSEUDONYM_KEY,
    SITE_FILE,
    Site,
    open_site,
)
from cloister_fl.client.site.last_refusal import FILE as REFUSAL
from cloister_fl.client.site.last_refusal import clear_last_refusal, keep_last_refusal
from cloister_fl.errors import CloisterError, LedgerRolledBack, PrivacyError
from cloister_fl.study.cost import Charges
from cloister_fl.study.schema import Study
from cloister_fl.system.files import Mark, locked, mark_of, write_atomic

_SIGN_EVERY = 10
"""Entries of the audit log between two signatures, at most."""
_MOST_ADMISSIONS = 8
_NAME_LABEL = b"cloister/ledger/name/v2\0"
_MOST_CLAIMS = 8
"""A site that misses one entry is refused already: more than these say nothing new."""
_READ = (
    SITE_FILE,
    f"keys/{IDENTITY}",
    f"keys/{PSEUDONYM_KEY}",
    f"keys/{CACHE_KEY}",
)


@dataclass(frozen=True)
class Admission:
    """A study that was let in for a run; see ``admission.gate``.

    Attributes:
        study: the study.
        digest: its hash.
        run: the run.
        charges: what it costs; None where privacy is off.
    """

    study: Study
    digest: str
    run: str
    charges: Charges | None


@dataclass
class _Compared:
    """What the notes of the ledger said when they were last compared with it."""

    marks: tuple[Mark | None, ...]
    differences: tuple[str, ...]
    is_noted: bool


class SiteSession:
    """What the messages to a site are answered from; one thread at a time.

    Args:
        site: the opened site.
        pins: of another session of this process; None for the first.

    Attributes:
        site: the site, as its file says now; see ``refresh``.
        identity: the key that it signs with.
        log: its audit log.
        roster: file of its trusted roster.
        admissions: what was let in, by all that the decision depends on beside the files; empty
            again after any change of these.
    """

    def __init__(self, site: Site, pins: Pins | None = None) -> None:
        self.owner = os.getpid()
        """Process that the session belongs to; another must not use it."""
        self.site = site
        self.identity = site.identity()
        self._pins = pins or Pins(self.identity.public)
        self.log = AuditLog(path_of(site), self.identity, pin=self._pins.log)
        self.roster = site.roster
        self.admissions: dict[tuple[object, ...], Admission] = {}
        self._folder = _marks_of(site.root, _READ)
        self._path = site.ledger
        self._ledger: Ledger | None = None
        self._notes: list[Note] | None = None
        self._compared: _Compared | None = None
        self._accepted_as_lost: frozenset[str] = frozenset()
        self._signed = 0
        self._told = ""
        """Hash of the entry of the log that the last answer told."""
        self._is_refusing = (site.root / REFUSAL).exists()

    @classmethod
    def open(cls, root: Path, pins: Pins | None = None) -> SiteSession:
        """Open the site folder ``root``; raises as ``folder.open_site``."""
        # Before the reading: what is written behind it is found the next time.
        marks = _marks_of(root, _READ)
        session = cls(open_site(root), pins)
        session._folder = marks
        return session

    def refresh(self) -> None:
        """Read ``site.toml`` and the keys anew where they changed.

        Raises:
            SiteFileInvalid, FileUnreadable: see ``folder.open_site``.
        """
        marks = _marks_of(self.site.root, _READ)
        if marks == self._folder:
            return
        site = open_site(self.site.root)
        identity = site.identity()
        is_same_key = identity.public == self.identity.public
        if not is_same_key:
            self.log = AuditLog(path_of(site), identity, pin=self.log.pin)
        if not is_same_key or site.policy.ledger_delta != self.site.policy.ledger_delta:
            self._drop_ledger()
        self.site, self.identity, self._folder = site, identity, marks
        self.admissions.clear()

    @property
    def ledger(self) -> Ledger:
        """The ledger, made where there is none; raises as ``Ledger.open``."""
        if self._ledger is None:
            self._ledger = self._opened(self._pins.ledger)
        return self._ledger

    def ledger_name(self) -> str:
        """What the coordinator knows the ledger by, 64 hexadecimal digits; raises as ``ledger``.

        It stays while the ledger does, whatever becomes of the site's key, and tells nothing of
        what the ledger holds: the first entry has a salt.
        """
        first = self.ledger.hashes()[0].encode()
        return hashlib.sha256(_NAME_LABEL + first).hexdigest()

    @property
    def pins(self) -> Pins:
        """What this process must find again, for the session after this one."""
        ledger = self._ledger.file.pin if self._ledger is not None else None
        return replace(self._pins, log=self.log.pin, ledger=ledger or self._pins.ledger)

    def close(self) -> None:
        """Close the ledger's file, which is read whole again before the next use."""
        self._drop_ledger()

    # What is verified

    def require_log(self) -> None:
        """Refuse an audit log that was changed but by lawful entries at its end.

        Raises:
            AuditLogDamaged: see ``AuditLog.verify``.
        """
        if self._notes is None or not self.log.is_as_verified():
            self._compared = self._notes = None
            reader = LogReader()
            self.log.verify(reader.see)
            self._notes, self._told = reader.notes, reader.told

    def require_newest(self) -> None:
        """Refuse a ledger that lacks what was noted of it; before anything is read or charged.

        Raises:
            LedgerRolledBack: it was rolled back, replaced or removed, or the notes are missing.
            LedgerDamaged, PolicyRefused: see ``Ledger.open``.
            AuditLogDamaged: see ``require_log``.
        """
        found = self.disagreements()
        if found:
            raise rolled_back(
                self.site.root,
                "The privacy ledger does not match ledger.high or the audit log.",
                " ".join(found),
            )

    def disagreements(self) -> tuple[str, ...]:
        """What is wrong between the ledger and its notes, a sentence each; empty where all fits.

        Raises:
            LedgerDamaged, LedgerRolledBack, PolicyRefused, AuditLogDamaged: as ``require_newest``.
        """
        self.require_log()
        assert self._notes is not None
        compared = self._compared
        if (
            compared is None
            or compared.marks != self._note_marks()
            or not self._is_ledger_as_verified()
        ):
            compared = self._compare(self._notes)
        return compared.differences

    def _compare(self, notes: list[Note]) -> _Compared:
        """Read the ledger, and compare it with what is noted of it."""
        self.admissions.clear()
        self._compared = None
        marks = self._note_marks()
        hashes, foreign, is_reserved = self._read_ledger(notes)
        noted = [note.head for note in notes if note.at > self._pins.accepted]
        high = high_of(self.site.root)
        found = differences(
            hashes,
            reserved=is_reserved,
            high=high,
            noted=noted,
            is_log_older=bool(self._claimed()),
            foreign=foreign,
        )
        self._compared = _Compared(marks, found, high is not None and bool(noted))
        return self._compared

    def _read_ledger(self, notes: list[Note]) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
        """Hashes and foreign entries of the ledger, and whether anything is reserved in it."""
        if self._ledger is None and self._pins.ledger is None and mark_of(self._path) is None:
            self._take(())
            return (), (), False
        try:
            hashes = self.ledger.hashes()
        except PrivacyError as error:
            # Perhaps the steward took another ledger for the newest, whatever this process saw.
            if error.code != LedgerRolledBack.code or not self._take_accepted(notes):
                raise
            hashes = self.ledger.hashes()
        self._take(self.ledger.accepted())
        return hashes, self.ledger.foreign(), self.ledger.has_reserved()

    def _take(self, accepted: tuple[Acceptance, ...]) -> None:
        """Keep in mind what the steward's acceptances in the ledger void."""
        self._accepted_as_lost = frozenset[str]().union(*(one.claimed for one in accepted))
        self._pins = replace(self._pins, accepted=self._voided(accepted))

    def _voided(self, accepted: tuple[Acceptance, ...]) -> int:
        """Up to which entry of the audit log the last acceptance voids notes; -1 for none."""
        head = accepted[-1].log if accepted else None
        return head.seq if head and (head == EMPTY or self.log.holds(head.hash)) else -1

    def _take_accepted(self, notes: list[Note]) -> bool:
        """Take a ledger that lacks the pin, where the steward accepted it since the pin.

        The acceptance is signed with the key that this process has known all along, it is younger
        than the last one in the ledger of the pin, and the ledger has all that was noted behind it.
        """
        if self.identity.public != self._pins.signer:
            return False
        ledger = self._opened(None)
        voided = self._voided(ledger.accepted())
        later = [note.head for note in notes if note.at > voided]
        if voided <= self._pins.accepted or lacking(ledger.hashes(), later):
            ledger.shut()
            return False
        self._drop_ledger()
        self._ledger = ledger
        return True

    def _opened(self, pin: LedgerHead | None) -> Ledger:
        return Ledger.open(
            self._path,
            delta=self.site.policy.ledger_delta,
            pinned=True,
            pin=pin,
            signer=self.identity.public,
        )

    def _is_ledger_as_verified(self) -> bool:
        if self._ledger is None:
            return mark_of(self._path) is None
        return self._ledger.is_as_verified()

    def _claimed(self) -> frozenset[str]:
        """What ``compare`` kept and the log still lacks."""
        claims = claims_of(self.site.root) | self._pins.claims
        return frozenset(digest for digest in claims if not self._is_in_log(digest))

    def _is_in_log(self, digest: str) -> bool:
        """Whether an entry has this hash, or the steward accepted that none has."""
        return self.log.holds(digest) or digest in self._accepted_as_lost

    def _note_marks(self) -> tuple[Mark | None, ...]:
        return _marks_of(self.site.root, (FILE, CLAIMED))

    def _drop_ledger(self) -> None:
        """Close the ledger's file; its pin stays."""
        self._pins, self._compared = self.pins, None
        if self._ledger is not None:
            self._ledger.shut()
        self._ledger = None

    # What is noted

    def is_noted(self) -> bool:
        """Whether both places note a head of the ledger; see ``note``."""
        self.disagreements()
        return self._compared is not None and self._compared.is_noted

    def note(self) -> None:
        """Note the ledger's head outside it; call it after each entry that reserves or spends.

        Raises:
            OutputInTheWay: ``ledger.high`` cannot be written.
            AuditLogDamaged: the log cannot be written.
        """
        compared = self._compared
        with locked(self.site.root / f".{FILE}.lock"):
            # The head is read under the lock, so that a slower process never notes an older one
            # last.
            seq, digest = self.ledger.head()
            write_atomic(self.site.root / FILE, json.dumps({"seq": seq, "hash": digest}).encode())
            at = self.log.append(NOTE, ledger_seq=seq, ledger_hash=digest).seq
        if self._notes is not None:
            self._notes.append(Note(at, Head(seq, digest)))
        if compared is not None:
            compared.marks = (mark_of(self.site.root / FILE), *compared.marks[1:])
            compared.is_noted = True

    def compare(self, heads: str) -> None:
        """Keep in mind what the coordinator noted of this site's audit log, where the log lacks it.

        A coordinator that lies can only keep the site out of its own runs, until the steward
        accepts.

        Args:
            heads: what the coordinator said, see ``audit_log.told_heads``.

        Raises:
            AuditLogDamaged: see ``require_log``.
            LedgerDamaged, LedgerRolledBack, PolicyRefused: as ``require_newest``.
            OutputInTheWay: what it noted cannot be kept.
        """
        self.require_log()
        told = heads_told(heads, name_of(self.identity.public))
        lost = [digest for digest in told if not self.log.holds(digest)]
        if lost:
            # The ledger says of which the steward accepted that they are lost.
            self.disagreements()
        claims = self._claimed()
        new = frozenset(digest for digest in lost if not self._is_in_log(digest)) - claims
        if new and len(claims) < _MOST_CLAIMS:
            claims |= new
            self._pins = replace(self._pins, claims=claims)
            self._compared = None
        if not claims <= claims_of(self.site.root):
            write_atomic(self.site.root / CLAIMED, "\n".join(sorted(claims)).encode())

    def accept_ledger(self) -> tuple[str, ...]:
        """Take the ledger as it is for the newest, on the steward's word, and note that.

        Returns:
            What did not fit, as in ``disagreements``; nothing is written where all fits.

        Raises:
            LedgerDamaged, PolicyRefused: see ``Ledger.open``.
            AuditLogDamaged, OutputInTheWay: see ``note``.
        """
        found, notes = self.disagreements(), self._notes
        if found and notes is not None:
            high, before = high_of(self.site.root), self._pins.accepted
            heads = [*([high] if high else []), *(n.head for n in notes if n.at > before)]
            missed = max((head.seq for head in heads), default=0)
            claimed = self._claimed()
            self.ledger.accept(missed, self.identity, log=self.log.pin, claimed=claimed)
            said = " ".join(sorted(claimed)) or None
            self.log.append(ACCEPTED, by="steward", why=" ".join(found), claimed=said)
            self.note()
            (self.site.root / CLAIMED).unlink(missing_ok=True)
            self.close()
        return found

    # What is remembered

    def remember(self, key: tuple[object, ...], admission: Admission) -> None:
        """Keep what was let in; see ``admissions``."""
        if len(self.admissions) >= _MOST_ADMISSIONS:
            self.admissions.clear()
        self.admissions[key] = admission

    def sign_log(self, head: Head, *, now: bool = False) -> Head:
        """Sign the audit log, where it is time to, or ``now``; return its head, as given or new."""
        if now or head.seq >= self._signed + _SIGN_EVERY:
            head = self.log.sign()
            self._signed = head.seq
        return head

    def tell(self, head: Head) -> str:
        """What an answer says of the audit log: the head, and the one that the last answer told."""
        base, self._told = self._told, head.hash
        return self.log.note(head, base)

    def keep_refusal(self, error: CloisterError) -> None:
        """Keep an error as the site's last refusal; it raises nothing."""
        keep_last_refusal(self.site.root, error)
        self._is_refusing = True

    def clear_refusal(self) -> None:
        """Remove the last refusal: the site has accepted a request since."""
        if self._is_refusing:
            clear_last_refusal(self.site.root)
            self._is_refusing = False


def _marks_of(root: Path, names: tuple[str, ...]) -> tuple[Mark | None, ...]:
    return tuple(mark_of(root / name) for name in names)
