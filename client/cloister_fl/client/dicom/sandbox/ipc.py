"""Messages between the process with the data and a worker that reads its files.

A worker has met hostile bytes, so what it says is judged like them: every length, range, code and
character is checked here before anything is made of it. Numbers are big endian; each message is
one datagram. A file and an image do not travel in messages but in memory that both hold.

    hello    "cloister/read/v1", then each transfer syntax whose decoder is unfit, NUL before each
    request  serial u64, bytes of the file u64, what the study reads as JSON
    answer   serial u64, kind u8, then
             image: rows u32, columns u32, SHA-256, lengths u16 and as many texts in UTF-8
             masks: bytes of their table u32, then as for an image
             reject: the code in ASCII        unfit: the transfer syntax in ASCII
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass

from cloister_fl.client.dicom import mask_table
from cloister_fl.client.dicom.facts import TEXTS, Facts
from cloister_fl.client.dicom.rejection import RejectedFile, unfit
from cloister_fl.client.dicom.size_limits import (
    MAX_FILE_BYTES,
    MAX_KEY_BYTES,
    MAX_OUT_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
)
from cloister_fl.errors import Reject
from cloister_fl.system.text import is_blank

HELLO = b"cloister/read/v1"
MAX_MESSAGE = 16 << 10
"""Longest message, in bytes."""

_IMAGE, _REJECT, _UNFIT, _MASKS = 0, 1, 2, 3
_REQUEST = struct.Struct(">QQ")
_ANSWER = struct.Struct(">QB")
_LENGTH = struct.Struct(">I")
_FACTS = struct.Struct(f">II32s{len(TEXTS)}H")
_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9.1
_YEAR = re.compile(r"([0-9]{4})?")
_SEX = re.compile(r"[FMO]?")
_AGE = re.compile(r"([0-9]{1,3})?")
_PERSON = re.compile(r"([0-9a-f]{64})?")
_SAYABLE = frozenset(Reject) - {
    Reject.DUPLICATE,
    Reject.UNREADABLE,
    Reject.OUTSIDE_ROOT,
    Reject.VOLUME_INCOMPLETE,
    Reject.VOLUME_UNPLACED,
    Reject.VOLUME_MIXED,
    Reject.VOLUME_DOUBLED,
    Reject.VOLUME_TILTED,
    Reject.VOLUME_UNEVEN,
}
"""A worker sees no path and no second file, so it has no say in these."""


class InvalidMessage(Exception):
    """A message that no sound worker sends; says nothing of it."""


@dataclass(frozen=True)
class Request:
    """One file to read, and what the study makes of it; a ``preprocess.Recipe``."""

    serial: int
    length: int
    modalities: tuple[str, ...]
    size: int
    windowing: str
    percentiles: tuple[float, float]
    window: tuple[float, float] | None
    released: bool = False
    segment: str = ""


def pack_hello(unfit_decoders: Collection[str]) -> bytes:
    return HELLO + b"".join(b"\0" + uid.encode("ascii") for uid in sorted(unfit_decoders))


def parse_hello(message: bytes) -> frozenset[str]:
    """Return the transfer syntaxes whose decoder is unfit.

    Raises:
        InvalidMessage: this is no worker's hello.
    """
    start, *uids = message.split(b"\0")
    if start != HELLO or len(uids) > 64:
        raise InvalidMessage
    return frozenset(_uid(uid) for uid in uids)


def pack_request(request: Request) -> bytes:
    text = json.dumps(
        {
            "modalities": request.modalities,
            "size": request.size,
            "windowing": request.windowing,
            "percentiles": request.percentiles,
            "window": request.window,
            "released": request.released,
            "segment": request.segment,
        }
    )
    return _REQUEST.pack(request.serial, request.length) + text.encode()


def parse_request(message: bytes) -> Request:
    """Read what the process with the data asks; it is trusted."""
    serial, length = _REQUEST.unpack_from(message)
    asked = json.loads(message[_REQUEST.size :])
    assert length <= MAX_FILE_BYTES
    low, high = asked["percentiles"]
    window = asked["window"]
    return Request(
        serial,
        length,
        tuple(asked["modalities"]),
        asked["size"],
        asked["windowing"],
        (low, high),
        None if window is None else (window[0], window[1]),
        asked["released"],
        asked["segment"],
    )


def pack_facts(serial: int, facts: Facts) -> bytes:
    """Say that the image lies in the shared memory.

    Raises:
        RejectedFile: ``TRUNCATED`` for an identifier that is too long or is no text.
    """
    return _ANSWER.pack(serial, _IMAGE) + _told(facts)


def pack_masks(serial: int, facts: Facts, length: int) -> bytes:
    """Say that a table of ``length`` bytes lies in the shared memory; see ``pack_facts``."""
    return _ANSWER.pack(serial, _MASKS) + _LENGTH.pack(length) + _told(facts)


def _told(facts: Facts) -> bytes:
    try:
        texts = [text.encode() for text in facts.texts]
    except UnicodeEncodeError:
        raise RejectedFile(Reject.TRUNCATED) from None
    if any(len(text) > MAX_KEY_BYTES for text in texts):
        raise RejectedFile(Reject.TRUNCATED)
    lengths = [len(text) for text in texts]
    head = _FACTS.pack(facts.rows, facts.columns, bytes.fromhex(facts.pixels), *lengths)
    return head + b"".join(texts)


def pack_reject(serial: int, reason: Reject) -> bytes:
    return _ANSWER.pack(serial, _REJECT) + reason.value.encode("ascii")


def pack_unfit(serial: int, transfer_syntax: str) -> bytes:
    return _ANSWER.pack(serial, _UNFIT) + transfer_syntax.encode("ascii")


def parse_answer(
    message: bytes, request: Request, unfit_decoders: Collection[str]
) -> tuple[Facts, int]:
    """Judge what a worker answers to a request.

    Args:
        message: its bytes.
        request: what it was asked.
        unfit_decoders: what it said in its hello, before it had met a file.

    Returns:
        What is known of an image, and 0; or of a segmentation, and the bytes of its table.

    Raises:
        RejectedFile: the file is turned away.
        DecoderUnfit: the file needs a decoder that failed its known-answer test.
        InvalidMessage: no sound worker answers this.
    """
    if not _ANSWER.size < len(message) <= MAX_MESSAGE:
        raise InvalidMessage
    serial, kind = _ANSWER.unpack_from(message)
    if serial != request.serial:
        raise InvalidMessage
    rest = message[_ANSWER.size :]
    if kind == _REJECT:
        raise RejectedFile(_reason(rest))
    if kind == _UNFIT:
        transfer_syntax = _uid(rest)
        if transfer_syntax not in unfit_decoders:
            raise InvalidMessage
        raise unfit(transfer_syntax)
    if kind == _MASKS and request.segment:
        return _segmented(rest, request)
    if kind != _IMAGE:
        raise InvalidMessage
    facts = _facts(rest)
    sound = (
        facts.rows >= 1
        and facts.columns >= 1
        and facts.rows * facts.columns <= MAX_PIXELS
        and request.size <= MAX_SIDE
        and facts.modality in request.modalities
        and _plausible(facts)
    )
    if not sound:
        raise InvalidMessage
    return facts, 0


def _segmented(rest: bytes, request: Request) -> tuple[Facts, int]:
    if len(rest) < _LENGTH.size:
        raise InvalidMessage
    (length,) = _LENGTH.unpack_from(rest)
    facts = _facts(rest[_LENGTH.size :])
    sound = (
        0 < length <= MAX_OUT_BYTES
        and length % 2 == 0
        and 1 <= facts.rows * facts.columns <= MAX_PIXELS
        and facts.modality == mask_table.MODALITY
        and _plausible(facts)
    )
    if not sound:
        raise InvalidMessage
    return facts, length


def _plausible(facts: Facts) -> bool:
    return bool(
        _YEAR.fullmatch(facts.year)
        and _PERSON.fullmatch(facts.person)
        and _SEX.fullmatch(facts.sex)
        and _AGE.fullmatch(facts.age)
        and _UID.fullmatch(facts.sop_instance)
        and not is_blank(facts.patient_id)
        and (not facts.study_instance or _UID.fullmatch(facts.study_instance))
        and facts.place.sound
    )


def _facts(rest: bytes) -> Facts:
    if len(rest) < _FACTS.size:
        raise InvalidMessage
    rows, columns, digest, *lengths = _FACTS.unpack_from(rest)
    if max(lengths) > MAX_KEY_BYTES or len(rest) != _FACTS.size + sum(lengths):
        raise InvalidMessage
    texts, at = [], _FACTS.size
    for length in lengths:
        try:
            texts.append(rest[at : at + length].decode())
        except UnicodeDecodeError:
            raise InvalidMessage from None
        at += length
    return Facts(rows, columns, digest.hex(), *texts)


def _reason(rest: bytes) -> Reject:
    try:
        reason = Reject(rest.decode("ascii"))
    except (UnicodeDecodeError, ValueError):
        raise InvalidMessage from None
    if reason not in _SAYABLE:
        raise InvalidMessage
    return reason


def _uid(content: bytes) -> str:
    text = content.decode("ascii", "replace")
    if not _UID.fullmatch(text):
        raise InvalidMessage
    return text
