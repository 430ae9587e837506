"""Typed messages of a round; the only module that uses Flower's records.

A message is a frozen dataclass. ``pack`` turns it into a Flower ``RecordDict``: one
``ConfigRecord`` with its scalar fields and, where it has arrays, one ``ArrayRecord`` with one flat
array each (few flat arrays are what Flower moves fastest). ``unpack`` takes nothing that is
missing, additional, of another type or of another version, so what a side may say is a list known
in advance. Arrays travel as raw little-endian bytes: no pickle, no ``.npy`` header to parse.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cloister_fl.errors import MessageInvalid
from cloister_fl.version import PROTOCOL

SITE_KEY = "site"
"""Key of Flower's node configuration, which never travels: the site's folder."""

ROSTER_KEY = "roster"
"""Another: the file of the trusted roster, where it is not the site's own."""

VERSION = f"cloister/round/v{PROTOCOL}"
_HEAD = "cloister"
_SAME_VERSION = "Install the same version of Cloister on both sides: cloister --version"
_BODY = "arrays"
_LOG_HEAD = "log_head"
_MOST_LOG_HEAD = 160
"""Characters of what a message says of its sender's log: a name and two hashes fit."""
_STYPE = "cloister.raw"

Vector = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Octets = npt.NDArray[np.uint8]
MessageT = TypeVar("MessageT", bound="RoundMessage")


class Refused(enum.StrEnum):
    """The closed list of reasons that a site may give; with privacy on, none depends on data."""

    BUNDLE = "bundle"
    """The run is of another bundle than the installed wheel's: of code, or another version."""
    POLICY = "policy"
    """The study asks for more than the site's policy allows."""
    APPROVAL = "approval"
    """The study is not approved at the site."""
    HOURS = "hours"
    """The site takes part, but is outside its training window; no round was charged."""
    BUDGET = "budget"
    """The privacy budget is not sufficient."""
    SPENT = "round-spent"
    """The round was charged before and is not trained again."""
    MESSAGE = "message"
    """The request does not have the agreed form."""
    MODEL = "model"
    """The model of round 1 is not the one whose hash the study carries, or it carries none."""
    ROSTER = "roster"
    """The site's trusted roster is another one, or does not list the site."""
    PROTOCOL = "protocol"
    """A check of secure aggregation failed; the site gave the round up."""
    DECLINED = "declined"
    """Everything else. The reason is shown at the site only."""


@dataclass(frozen=True)
class RoundMessage:
    """Base of all messages; ``kind`` tells them apart."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Prepare(RoundMessage):
    """Server to site: will you take part in this study?"""

    kind = "prepare"
    study: str
    """Canonical JSON of the study."""
    run: str
    sites: int
    """Number of invited sites."""
    roster: str
    """Digest of the roster, hexadecimal; empty without secure aggregation."""
    signatures: bytes
    """Signatures under the study, see ``study.signatures``; empty where there is none."""
    heads: str
    """What the sites' audit logs must hold, see ``audit_log.told_heads``."""


@dataclass(frozen=True)
class Prepared(RoundMessage):
    """Site to server: yes. With privacy on, what it says of the site's data is the steward's word:
    that they can serve the study."""

    kind = "prepared"
    site: str
    signature: bytes
    """The site's, see ``signed_answer``."""
    ledger: str
    """What its privacy ledger is known by, 64 hexadecimal digits: it stays while ledger and key do,
    and tells nothing of what the ledger holds. Empty where privacy is off."""


@dataclass(frozen=True)
class Finish(RoundMessage):
    """Server to site: the run has ended before the study's last round, and nothing more of it
    comes."""

    kind = "finish"
    study: str
    """The study's hash, 64 hexadecimal digits."""
    run: str


@dataclass(frozen=True)
class Finished(RoundMessage):
    """Site to server: heard. It says nothing of what the site makes of it."""

    kind = "finished"
    site: str


@dataclass(frozen=True)
class Task(RoundMessage):
    """Server to site: what every message of a round begins with. It is never sent as such."""

    study: str
    run: str
    round: int
    """1-based."""
    sites: int
    exchange: Octets
    """A ``secagg.Bundle``, encoded; empty without secure aggregation."""


@dataclass(frozen=True)
class TrainTask(Task):
    """Server to site: train this round from this model."""

    kind = "train"
    vector: Vector
    """The global model, flat, (D,)."""


@dataclass(frozen=True)
class Exchange(Task):
    """Server to site: stages of secure aggregation that need neither model nor data."""

    kind = "exchange"


@dataclass(frozen=True)
class Exchanged(RoundMessage):
    """Site to server: the answers of secure aggregation, the masked vector among them."""

    kind = "exchanged"
    site: str
    round: int
    exchange: Octets
    """A ``secagg.Bundle``, encoded."""


@dataclass(frozen=True)
class Update(RoundMessage):
    """Site to server: new weights minus old, flat, (D,); noised at the site where privacy is on.

    Only where the study trains without secure aggregation.
    """

    kind = "update"
    site: str
    round: int
    vector: Vector


@dataclass(frozen=True)
class EvaluateTask(Task):
    """Server to site: measure this model on patients of your own (privacy off, or noised)."""

    kind = "evaluate"
    vector: Vector
    """The global model, flat, (D,)."""


@dataclass(frozen=True)
class Evaluated(RoundMessage):
    """Site to server: score histograms, patients counted; only without secure aggregation.

    In a noised evaluation they are in units of ``cost.UNITS`` to a patient, and may be negative; so
    are exact ones where examinations or images have labels (``cost.open_units``).

    ``counts`` is flat: (curves, 2, bins), the patients without and with a class, by its score;
    one curve for a binary target (the second class), else one a class.
    """

    kind = "evaluated"
    site: str
    round: int
    bins: int
    counts: Counts


@dataclass(frozen=True)
class Refusal(RoundMessage):
    """Site to server: no, with a reason of the closed list."""

    kind = "refusal"
    site: str
    reason: str
    signature: bytes
    """The site's, see ``signed_answer``; empty where its folder could not be opened."""


def signed_answer(site: str, node: int, word: str) -> tuple[str, bytes, bytes, bytes]:
    """Label and fields that a site signs when it says that it takes part, or why not.

    Flower does not tie a reply to a hospital. The node's number is in it, so no other node can
    say the same in this site's name.

    Args:
        site: the site's id.
        node: Flower's id of the node that answers.
        word: ``taking_part``, or the reason.
    """
    return "cloister/answer/v1", site.encode(), node.to_bytes(8, "big"), word.encode()


def taking_part(run: str, study_digest: str, ledger: str) -> str:
    """What a site signs that takes part in a run, with the ledger that counts it."""
    return " ".join(one for one in (run, study_digest, ledger) if one)


_DTYPES: dict[str, np.dtype[Any]] = {
    "vector": np.dtype("<f4"),
    "counts": np.dtype("<i8"),
    "exchange": np.dtype("u1"),
}


def message_kinds(base: type[RoundMessage] = RoundMessage) -> dict[str, type[RoundMessage]]:
    """The messages that can be sent, by their kinds: those below ``base`` that have one."""
    found: dict[str, type[RoundMessage]] = {}
    for message in base.__subclasses__():
        if "kind" in vars(message):
            found[message.kind] = message
        found.update(message_kinds(message))
    return found


_KINDS = message_kinds()


def _shape(kind: type[RoundMessage]) -> tuple[dict[str, type], set[str]]:
    """Scalar fields with their types, and arrays."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    arrays = {name for name in names if name in _DTYPES}
    return {name: hints[name] for name in names if name not in arrays}, arrays


_SHAPES = {kind: _shape(kind) for kind in _KINDS.values()}


def octets(data: bytes = b"") -> Octets:
    """Bytes as a message carries them."""
    return np.frombuffer(data, np.uint8)


def pack(message: RoundMessage, *, log_head: str = "") -> RecordDict:
    """Turn a message into Flower's records; see ``pack_all``."""
    return pack_all([message], log_head=log_head)[0]


def pack_all(messages: Iterable[RoundMessage], *, log_head: str = "") -> list[RecordDict]:
    """Turn messages into Flower's records; an array that several share is held once.

    ``log_head`` is what the sender says of its audit log, for the receiver to note; see
    ``AuditLog.note``.
    """
    known: dict[int, Array] = {}
    held = []
    packed = []
    for message in messages:
        head: dict[str, str | int | bytes] = {
            "version": VERSION,
            "kind": message.kind,
            _LOG_HEAD: log_head,
        }
        arrays: dict[str, Array] = {}
        for field in dataclasses.fields(message):
            value = getattr(message, field.name)
            if field.name not in _DTYPES:
                head[field.name] = value
                continue
            if id(value) not in known:
                held.append(value)  # An id means something for as long as its object lives.
                flat = np.ascontiguousarray(value, dtype=_DTYPES[field.name]).reshape(-1)
                # A bundle is a view of bytes, which are as many as the model's and go as they are.
                data: Any = value.base
                if (
                    not isinstance(data, bytes)
                    or len(data) != flat.nbytes
                    or flat.base is not value
                ):
                    data = flat.tobytes()
                known[id(value)] = Array(str(flat.dtype), (flat.size,), _STYPE, data)
            arrays[field.name] = known[id(value)]
        records = RecordDict()
        if arrays:
            records[_BODY] = ArrayRecord(arrays)
        records[_HEAD] = ConfigRecord(head)  # type: ignore[arg-type]
        packed.append(records)
    return packed


def unpack(records: RecordDict, *kinds: type[MessageT]) -> MessageT:
    """Read one of the expected messages out of Flower's records.

    Raises:
        MessageInvalid: it is none of them, or not exactly so.
    """
    head = records.get(_HEAD)
    if not isinstance(head, ConfigRecord) or head.get("version") != VERSION:
        raise MessageInvalid("A message has another version of the protocol.", remedy=_SAME_VERSION)
    kind = next((kind for kind in kinds if kind.kind == head.get("kind")), None)
    if kind is None:
        raise MessageInvalid("A message is not of the expected kind.", remedy=_SAME_VERSION)
    scalars, arrays = _SHAPES[kind]
    if set(head) != {"version", "kind", _LOG_HEAD, *scalars} or set(records) != {_HEAD} | (
        {_BODY} if arrays else set()
    ):
        raise MessageInvalid(
            f"A message '{kind.kind}' has other fields than agreed.", remedy=_SAME_VERSION
        )
    values: dict[str, Any] = {}
    for name, expected in scalars.items():
        value = head[name]
        if type(value) is not expected:
            raise MessageInvalid(
                f"'{name}' of a message '{kind.kind}' has another type.", remedy=_SAME_VERSION
            )
        values[name] = value
    if arrays:
        values.update(_read_arrays(records[_BODY], arrays))
    return kind(**values)


def with_log_head(records: RecordDict, log_head: str) -> RecordDict:
    """The same packed message, with another head of the sender's audit log."""
    head = records[_HEAD]
    assert isinstance(head, ConfigRecord)
    head[_LOG_HEAD] = log_head
    return records


def described(records: RecordDict) -> dict[str, str | int]:
    """What an audit log records of a message: its kind, size and hash."""
    return {
        "message": kind_of(records),
        "bytes": payload_bytes(records),
        "sha256": payload_hash(records),
    }


def head_of(records: RecordDict) -> str:
    """The sender's audit head as a message tells it; empty where it tells none."""
    head = records.get(_HEAD)
    told = head.get(_LOG_HEAD) if isinstance(head, ConfigRecord) else None
    return told if isinstance(told, str) and len(told) <= _MOST_LOG_HEAD else ""


def kind_of(records: RecordDict) -> str:
    """What a message says it is, cut to the kinds that exist; empty for anything else."""
    head = records.get(_HEAD)
    told = head.get("kind") if isinstance(head, ConfigRecord) else None
    return told if isinstance(told, str) and told in _KINDS else ""


def reason_of(records: RecordDict) -> str:
    """The reason that a refusal gives, cut to the closed list; empty for anything else."""
    head = records.get(_HEAD)
    if not isinstance(head, ConfigRecord) or head.get("kind") != Refusal.kind:
        return ""
    told = head.get("reason")
    known = {reason.value for reason in Refused}
    return told if isinstance(told, str) and told in known else Refused.DECLINED.value


def payload_hash(records: RecordDict) -> str:
    """SHA-256 over what a message says, 64 hexadecimal digits; its audit head is left out."""
    digest = hashlib.sha256(b"cloister/payload/v1\0")
    for name in sorted(records):
        record = records[name]
        for key in sorted(record):
            if key == "log_head":
                continue
            value = record[key]
            data = value.data if isinstance(value, Array) else repr(value).encode()
            for part in (name.encode(), str(key).encode(), data):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
    return digest.hexdigest()


def payload_bytes(records: RecordDict) -> int:
    """Bytes of what a message says: arrays, names and values.

    Flower's framing and the audit head, which stand around it, are left out.
    """
    total = 0
    for record in records.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + len(array.data) for name, array in record.items())
        else:
            total += sum(
                len(str(name)) + len(str(value))
                for name, value in record.items()
                if name != _LOG_HEAD
            )
    return total


def _read_arrays(record: object, names: set[str]) -> dict[str, npt.NDArray[Any]]:
    if not isinstance(record, ArrayRecord) or set(record) != names:
        raise MessageInvalid("A message has other arrays than agreed.", remedy=_SAME_VERSION)
    return {name: _read_array(record[name], _DTYPES[name]) for name in names}


def _read_array(array: Array, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    agreed = (
        array.stype == _STYPE
        and array.dtype == str(dtype)
        and len(array.shape) == 1
        and len(array.data) == array.shape[0] * dtype.itemsize
    )
    if not agreed:
        raise MessageInvalid(
            "An array of a message does not have the agreed form.", remedy=_SAME_VERSION
        )
    return np.frombuffer(array.data, dtype=dtype)
