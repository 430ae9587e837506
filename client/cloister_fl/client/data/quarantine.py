"""Quarantined files: why each is quarantined, and what the site's steward decided.

A file is quarantined where its pixels may show a name, or where it may be a program at the same
time (``Reject.held``). Which files are follows from the folder each time it is read; kept are only
the decisions, by the file's content: the same file under another name needs no second look, and a
file that was changed needs a new one. Each decision is also an entry of the audit log, and a
release counts only where the log's last word on the file is that it was released: an older file of
decisions, put back, releases nothing that was taken back since.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from cloister_fl.client.data.file_cache.file_memory import memory_of
from cloister_fl.client.data.file_cache.image_cache import Cache
from cloister_fl.client.dicom.file_finder import Found, discover
from cloister_fl.client.dicom.folder_reader import (
    Accepted,
    Refused,
    Segmented,
    read_folder,
    short_id,
)
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox.pool import shared_pool
from cloister_fl.client.pacs.sealed_store import Store, Stored
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.errors import FileUnreadable, OptionInvalid, Reject
from cloister_fl.study.schema import Input
from cloister_fl.system import utc
from cloister_fl.system.files import locked, moved_away, write_atomic
from cloister_fl.system.text import counted, is_reason

_LISTED = Input(modalities=("CR", "DX", "MG", "CT", "MR", "US"), size=16)
"""For the list, which needs no image: small, since what is accepted is cached."""
_SHOWN = _LISTED.model_copy(update={"size": 512})
"""What a steward looks at: large enough to read a name."""

_VERSION = 1


class Decision(enum.Enum):
    """What the steward decided about a held file."""

    RELEASED = "released"
    KEPT = "kept"


@dataclass(frozen=True)
class Judgement:
    """A decision, with the steward's reason and the time, ISO 8601."""

    decision: Decision
    why: str
    time: str


@dataclass(frozen=True)
class QuarantinedFile:
    """A file that is held, or was.

    Attributes:
        short_id: 12 hexadecimal digits of ``content``. A release is of what was looked at: a file
            that was changed since has another.
        file: what stands for its path; see ``folder_reader.short_id``.
        reason: why it is held; None for one that was released.
        judgement: what was decided, or None while it waits.
        content: keyed hash of its content, 32 bytes.
    """

    file: str
    reason: Reject | None
    judgement: Judgement | None
    content: bytes = field(repr=False)

    @property
    def short_id(self) -> str:
        """Its name for a person."""
        return _short(self.content)

    def as_dict(self) -> dict[str, str | None]:
        """For a script."""
        judged = self.judgement
        return {
            "id": self.short_id,
            "code": None if self.reason is None else self.reason.value,
            "reason": None if self.reason is None else self.reason.title,
            "state": "waiting" if judged is None else judged.decision.value,
            "why": None if judged is None else judged.why,
            "time": None if judged is None else judged.time,
        }


def judgements(site: Site) -> Mapping[bytes, Judgement]:
    """All decisions that hold, by content.

    Raises:
        FileUnreadable: they were written and cannot be read.
        AuditLogDamaged: a file was released, and the log cannot be read.
    """
    told = _written(site)
    if not any(one.decision is Decision.RELEASED for one in told.values()):
        return told
    last = {
        entry.body.get("file"): entry.body.get("decision")
        for entry in log_of(site).entries()
        if entry.kind == "quarantine"
    }
    return {
        content: one
        for content, one in told.items()
        if one.decision is not Decision.RELEASED
        or last.get(_short(content)) == Decision.RELEASED.value
    }


def _written(site: Site) -> Mapping[bytes, Judgement]:
    """The decisions as they lie in the site folder."""
    try:
        text = _path(site).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError:
        raise _unreadable(site) from None
    try:
        told = json.loads(text)
        if told["version"] != _VERSION:
            raise _unreadable(site)
        return {
            bytes.fromhex(content): Judgement(Decision(one["decision"]), one["why"], one["time"])
            for content, one in told["decisions"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _unreadable(site) from None


def releases(site: Site) -> frozenset[bytes]:
    """Contents of the files that may be read although they would be held."""
    judged = judgements(site)
    return frozenset(key for key, one in judged.items() if one.decision is Decision.RELEASED)


def quarantined_files(
    site: Site, *, progress: Callable[[int, int], None] | None = None
) -> Sequence[QuarantinedFile]:
    """Read the folder, and list what is held and what was released, in the order of the paths.

    Raises:
        FolderUnreadable, DecoderUnfit: see ``read_folder``.
    """
    judged = judgements(site)
    found = []
    with memory_of(site, releases(site)) as memory:
        for one in read_folder(
            site.dicom,
            _LISTED,
            key=site.pseudonym_key(),
            memory=memory,
            also=Store(site.store, site.cache_key()).items(),
            progress=progress,
        ):
            if isinstance(one, Segmented):
                continue
            judgement = judged.get(one.content)
            # Also one that is turned away although it was released: a decision can be taken back.
            if isinstance(one, Refused) and (one.reason.held or judgement is not None):
                found.append(QuarantinedFile(one.short_id, one.reason, judgement, one.content))
            elif isinstance(one, Accepted) and judgement is not None:
                found.append(QuarantinedFile(one.short_id, None, judgement, one.content))
    return found


def look(site: Site, one: QuarantinedFile) -> tuple[Path, bytes]:
    """Where a held file lies, and its bytes. Both can name a patient: for the steward's eyes.

    Raises:
        OptionInvalid: it is no longer there as it was listed.
        FolderUnreadable: the folder cannot be listed.
    """
    key = site.pseudonym_key()
    items: list[Found | Stored] = [*discover(site.dicom)]
    items += Store(site.store, site.cache_key()).items()
    cache = Cache(site.cache, site.cache_key())
    for item in items:
        if item.reason is None and short_id(key, item.name) == one.file:
            with contextlib.suppress(RejectedFile):
                data = item.read()
                if cache.content(data) == one.content:
                    return item.path, data
    raise OptionInvalid(
        "The file changed while it was read.",
        remedy=f"List the quarantined files again: {site.command('quarantine')}",
    )


def picture(data: bytes) -> bytes:
    """A held file as a PNG of 512 x 512, read as if it were released, by a worker.

    Raises:
        OptionInvalid: it cannot be shown; it would be refused after a release, too.
    """
    from PIL import Image

    try:
        _, image = shared_pool().submit(data, _SHOWN, released=True).result()
    except RejectedFile as rejected:
        raise OptionInvalid(
            "The file cannot be shown.",
            why=f"It would also be rejected after a release: {rejected.reason.title} "
            f"({rejected.reason.value}).",
        ) from None
    out = BytesIO()
    Image.fromarray((image >> 8).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def decide(site: Site, one: QuarantinedFile, decision: Decision, *, why: str) -> None:
    """Note a decision. A release is logged first, for what is not in the log has not happened; one
    that is taken back is so before that is logged.

    Raises:
        OptionInvalid: no reason is given.
        OutputInTheWay, AuditLogDamaged, FileUnreadable: it cannot be noted.
    """
    require_reason(why)
    with _alone(site):
        told = dict(_written(site))
        now = utc.timestamp()
        told[one.content] = Judgement(decision, why.strip(), now)

        def note() -> None:
            log_of(site).append(
                "quarantine",
                file=one.short_id,
                decision=decision.value,
                held_for="" if one.reason is None else one.reason.value,
                why=why.strip(),
            )

        if decision is Decision.RELEASED:
            note()
        decisions = {
            content.hex(): {"decision": each.decision.value, "why": each.why, "time": each.time}
            for content, each in sorted(told.items())
        }
        text = json.dumps({"version": _VERSION, "decisions": decisions}, indent=1)
        write_atomic(_path(site), text.encode())
        if decision is not Decision.RELEASED:
            note()


def require_reason(why: str) -> None:
    """See that a person says why a file is released or kept.

    Raises:
        OptionInvalid: no reason is given, it has several lines, or more than 500 characters.
    """
    if not is_reason(why):
        raise OptionInvalid(
            "A decision needs a reason: one line of at most 500 characters.",
            remedy="Give it: --why '...'. It is written to the site's audit log: name no patient.",
        )


def render(found: Sequence[QuarantinedFile], root: Path | None = None) -> str:
    """Return the quarantined files of the site at ``root`` as text for a terminal."""
    if not found:
        return "No quarantined files."
    lines = []
    for one in found:
        judged = one.judgement
        state = "waiting" if judged is None else judged.decision.value
        reason = "" if one.reason is None else f"{one.reason.value}  {one.reason.title}"
        lines.append(f"{one.short_id}  {state:<8}  {reason}".rstrip())
        if judged is not None:
            lines.append(f"              {judged.time}: {judged.why}")
    waiting = sum(one.judgement is None for one in found)
    if waiting:
        lines.append(
            f"{waiting} of {counted(len(found), 'quarantined file')} "
            f"{'has' if waiting == 1 else 'have'} no decision yet. Show one, then release or keep "
            f"it:\n  {command_at(root, 'quarantine show ID --png FILE')}"
        )
    return "\n".join(lines)


def _short(content: bytes) -> str:
    return content.hex()[:12]


def _path(site: Site) -> Path:
    return site.root / "quarantine.json"


def _unreadable(site: Site) -> FileUnreadable:
    return FileUnreadable(
        "quarantine.json cannot be read.",
        why="It is damaged, of another version, or closed to this user.",
        remedy="Restore it from the site's backup; or keep it elsewhere, and repeat the decisions: "
        f"{moved_away(_path(site))}; {site.command('quarantine')}",
    )


@contextmanager
def _alone(site: Site) -> Iterator[None]:
    """One decision at a time, whoever else decides."""
    with locked(site.root / "quarantine.lock"):
        yield
