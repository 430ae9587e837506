"""Which studies a person at this hospital has approved, by hash; nothing else is trained here.

A study that is proposed and not yet judged is kept, so that the steward can read it; the answer
is given once, and can be changed until the study has begun to cost.
"""

from __future__ import annotations

import enum
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cloister_client.audit import log_of
from cloister_client.site import Site
from cloister_common.errors import FileUnreadable, OptionInvalid, StudyInvalid, StudyNotApproved
from cloister_common.files import write_atomic
from cloister_common.study import Study, study_from_canonical

FILE = "approvals.json"
FORMAT = 1
MAX_PENDING = 100
"""Proposals that are kept; the oldest gives way, so that no server fills the disk."""

_PREFIX = re.compile(r"[0-9a-f]{8,64}")


class Decision(enum.StrEnum):
    """What a person said of a study."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"


@dataclass(frozen=True)
class Judgement:
    """A study and what was decided.

    Attributes:
        study: the study.
        decision: pending, approved or denied.
        why: the steward's words; they stay here.
        time: when it was proposed or judged last, ISO 8601.
    """

    study: Study
    decision: Decision
    why: str = ""
    time: str = ""


def judgements(site: Site) -> dict[str, Judgement]:
    """All studies that were proposed or judged here, by hash, oldest first.

    Raises:
        FileUnreadable: the file cannot be read, or is not Cloister's.
    """
    path = site.root / FILE
    try:
        text = path.read_text("utf-8") if path.exists() else '{"format": 1, "studies": {}}'
        held = json.loads(text)
        if held["format"] != FORMAT:
            raise ValueError
        return {digest: _judgement(digest, row) for digest, row in held["studies"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StudyInvalid):
        raise FileUnreadable(
            f"{FILE} cannot be read.",
            why="No study is approved while that is so.",
            remedy="Restore it from the site's backup, or move it away and judge again.",
        ) from None


def require_approved(site: Site, study: Study) -> None:
    """Refuse a study that nobody here approved; one that is new is kept for review.

    Raises:
        StudyNotApproved: it is new, waits, or was denied.
        FileUnreadable: see ``judgements``.
    """
    held = judgements(site).get(study.digest)
    if held is not None and held.decision is Decision.APPROVED:
        return
    if held is None:
        _propose(site, study)
    denied = held is not None and held.decision is Decision.DENIED
    raise StudyNotApproved(
        "A steward here denied the study."
        if denied
        else "No steward here has approved the study yet.",
        why=f"Its hash is {study.digest[:16]}.",
        remedy="Propose another study."
        if denied
        else "Read it with 'cloister client review', then 'cloister client approve' or 'deny'.",
    )


def judge(site: Site, study: Study, decision: Decision, *, why: str = "") -> None:
    """Note a steward's decision, and write it to the audit log.

    Raises:
        FileUnreadable, AuditLogDamaged: a file cannot be read or written.
    """
    with _locked(site):
        known = judgements(site)
        known.pop(study.digest, None)
        known[study.digest] = Judgement(study, decision, why, _now())
        log_of(site).append("judged", study=study.digest, decision=decision.value)
        _save(site, known)


def find(site: Site, prefix: str) -> Judgement:
    """The study whose hash begins with ``prefix``, at least 8 digits.

    Raises:
        OptionInvalid: there is none, or more than one.
        FileUnreadable: see ``judgements``.
    """
    known = judgements(site)
    found = [one for digest, one in known.items() if digest.startswith(prefix.lower())]
    if not _PREFIX.fullmatch(prefix.lower()) or len(found) != 1:
        raise OptionInvalid(
            f"{prefix!r} names {'no study' if not found else 'more than one study'} here.",
            remedy="Give at least 8 digits of a hash that 'cloister client review' lists.",
        )
    return found[0]


def _propose(site: Site, study: Study) -> None:
    """Keep a study for review, unless it was judged in the meantime."""
    with _locked(site):
        known = judgements(site)
        if study.digest in known:
            return
        waiting = [d for d, one in known.items() if one.decision is Decision.PENDING]
        for oldest in waiting[: max(0, len(waiting) + 1 - MAX_PENDING)]:
            del known[oldest]
        known[study.digest] = Judgement(study, Decision.PENDING, time=_now())
        _save(site, known)


@contextmanager
def _locked(site: Site) -> Iterator[None]:
    """Change the file alone: a proposal that arrives while a steward denies must not undo it."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(site.root / f".{FILE}.lock", flags, 0o600)
    except OSError:
        raise FileUnreadable(
            f"{FILE} cannot be changed.",
            remedy="Check that this user may write to the site folder.",
        ) from None
    with os.fdopen(handle) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _judgement(digest: str, row: Mapping[str, Any]) -> Judgement:
    study = study_from_canonical(str(row["study"]))
    if study.digest != digest:
        raise ValueError("a hash is not its study's")
    return Judgement(study, Decision(row["decision"]), str(row["why"]), str(row["time"]))


def _save(site: Site, known: Mapping[str, Judgement]) -> None:
    rows = {
        digest: {
            "study": one.study.canonical(),
            "decision": one.decision.value,
            "why": one.why,
            "time": one.time,
        }
        for digest, one in known.items()
    }
    text = json.dumps({"format": FORMAT, "studies": rows}, indent=1)
    write_atomic(site.root / FILE, text.encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
