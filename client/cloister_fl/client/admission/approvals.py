"""Approvals of studies at a site, by hash; no other study is trained.

A study that is proposed and not yet judged is kept, so that the steward can read it; the answer
is given once, and can be changed until the study has begun to cost. The policy can approve by
itself (``auto_approval``), never what a person denied, and only for as long as it says so.

That the data can serve a study is part of a person's approval: ``steward.approval`` looks at them
and notes which it saw. So what a site answers before a run is a person's word, or a rule's, and
the data have no say in it. An approval of a study with privacy that notes no data does not count.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from cloister_fl.audit_log import AuditLog
from cloister_fl.client.admission.auto_approval import ground_of, in_words, stands
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.data_notice import data_notices, note_look
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import FileUnreadable, OptionInvalid, StudyInvalid, StudyNotApproved
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system import utc
from cloister_fl.system.files import locked, moved_away, write_atomic

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
        ground: on what the policy approved it; empty where a person judged, see ``auto_approval``.
        data: SHA-256 of the manifest of the data that the person found to serve the study, 64
            digits; empty where nobody looked.
    """

    study: Study
    decision: Decision
    why: str = ""
    time: str = ""
    ground: str = ""
    data: str = ""

    @property
    def counts(self) -> bool:
        """Whether a run may be answered with yes: approved, and the data were looked at.

        A rule looks at no data: an answer that it gave by them would be the asker's to read.
        """
        looked = bool(self.ground or self.data) or not self.study.privacy.enabled
        return self.decision is Decision.APPROVED and looked


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
            why="Until it can be read, no study is approved.",
            remedy="Restore it from the site's backup; or keep it elsewhere, and decide again: "
            f"{moved_away(path)}; {site.command('review')}",
        ) from None


def require_approved(
    site: Site, study: Study, signatures: bytes = b"", *, log: AuditLog | None = None
) -> None:
    """Refuse a study that neither a person nor the policy approved; a new one is kept for review.

    Args:
        site: the site.
        study: the study that is asked for.
        signatures: who vouches for it, see ``study.signatures``.
        log: the site's audit log, where it is open already.

    Raises:
        StudyNotApproved: it is new, waits, or was denied.
        MessageInvalid: the policy asks for signatures, and these are none.
        FileUnreadable, AuditLogDamaged: a file cannot be read or written.
    """
    held = judgements(site).get(study.digest)
    if not _settled(site, held):
        held = _settle(site, log or log_of(site), study, ground_of(site.policy, study, signatures))
    if held is not None and held.counts:
        return
    denied = held is not None and held.decision is Decision.DENIED
    unseen = held is not None and held.decision is Decision.APPROVED
    notice = data_notices(site.root).get(study.digest)
    found = f" The data, {notice.time}: {notice.message}" if notice else ""
    raise StudyNotApproved(
        "The site's steward denied the study."
        if denied
        else "The site's steward approved the study without a look at the data."
        if unseen
        else "The site's steward has not approved the study yet.",
        why=f"Its hash is {study.digest[:16]}.{found}",
        remedy="Propose another study."
        if denied
        else f"Read it: {site.command(f'review {study.digest[:16]}')}. Then: "
        f"{site.command(f'approve {study.digest[:16]}')}. Or keep this site out of it: "
        + site.command(f"deny {study.digest[:16]} --why '...'"),
    )


def judge(site: Site, study: Study, decision: Decision, *, why: str = "", data: str = "") -> None:
    """Note a steward's decision, and write it to the audit log.

    An approval is in the log before it is in force; a denial is in force first, so that whatever
    ends this process between the two, nothing trains that the steward has denied.

    Args:
        site: the site.
        study: what is judged.
        decision: what the steward said.
        why: the steward's words; they stay out of the log.
        data: of an approval, see ``Judgement``; ``steward.approval`` gives it.

    Raises:
        FileUnreadable, AuditLogDamaged: a file cannot be read or written.
    """
    with _locked(site):
        known = judgements(site)
        known.pop(study.digest, None)
        known[study.digest] = Judgement(study, decision, why, utc.timestamp(), data=data)
        said = {"study": study.digest, "decision": decision.value, "by": "steward"}
        if data:
            said["data"] = data
        if decision is not Decision.APPROVED:
            _save(site, known)
        log_of(site).append("judged", **said)
        if decision is Decision.APPROVED:
            _save(site, known)
        elif decision is Decision.DENIED:
            note_look(site.root, study.digest)


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
            f"{prefix!r} matches {'no study' if not found else 'several studies'} of this site.",
            remedy=f"Give at least 8 digits of a listed hash: {site.command('review')}",
        )
    return found[0]


def _settled(site: Site, held: Judgement | None) -> bool:
    """Whether a person judged, or the ground of the policy's own approval still stands."""
    if held is None or held.decision is Decision.PENDING:
        return False
    if held.decision is Decision.APPROVED and not held.counts:
        return False
    return not held.ground or stands(site.policy, held.study, held.ground)


def _settle(site: Site, log: AuditLog, study: Study, ground: str) -> Judgement:
    """Let the policy approve a study, take its approval back, or keep the study for review.

    What was judged in the meantime stays.
    """
    with _locked(site):
        known = judgements(site)
        held = known.get(study.digest)
        if held is not None and (_settled(site, held) or not (held.ground or ground)):
            return held
        now = utc.timestamp()
        if ground:
            settled = Judgement(study, Decision.APPROVED, in_words(ground), now, ground)
        else:
            settled = Judgement(study, Decision.PENDING, time=now)
            waiting = [d for d, one in known.items() if one.decision is Decision.PENDING]
            for oldest in waiting[: max(0, len(waiting) + 1 - MAX_PENDING)]:
                del known[oldest]
        if ground or held is not None:
            why = settled.why or "the policy no longer approves it"
            decision = settled.decision.value
            log.append("judged", study=study.digest, decision=decision, by="policy", why=why)
        known.pop(study.digest, None)
        known[study.digest] = settled
        _save(site, known)
        return settled


@contextmanager
def _locked(site: Site) -> Iterator[None]:
    """Change the file alone: a proposal that arrives while a steward denies must not undo it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(site.root / f".{FILE}.lock"))
        except OSError:
            raise FileUnreadable(
                f"{FILE} cannot be changed.",
                remedy="Check that this user may write to the site folder.",
            ) from None
        yield


def _judgement(digest: str, row: Mapping[str, Any]) -> Judgement:
    study = study_from_canonical(str(row["study"]))
    if study.digest != digest:
        raise ValueError("a hash is not its study's")
    decision, ground = Decision(row["decision"]), str(row.get("ground", ""))
    data = str(row.get("data", ""))
    return Judgement(study, decision, str(row["why"]), str(row["time"]), ground, data)


def _save(site: Site, known: Mapping[str, Judgement]) -> None:
    rows = {
        digest: {
            "study": one.study.canonical(),
            "decision": one.decision.value,
            "why": one.why,
            "time": one.time,
            "ground": one.ground,
            "data": one.data,
        }
        for digest, one in known.items()
    }
    text = json.dumps({"format": FORMAT, "studies": rows}, indent=1)
    write_atomic(site.root / FILE, text.encode())
