"""Entries of the ledger that a steward signs: the closing of a study, and an acceptance.

Each is signed for its place in its chain. The signature holds under the key that the entry names,
and anybody has a key: whose it is, ``replay.State.foreign`` compares with the site's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloister_fl.audit_log import Head
from cloister_fl.encoding.framing import u64
from cloister_fl.membership.identity import Identity, verify

CLOSE_LABEL = "cloister/ledger/close/v1"
ACCEPT_LABEL = "cloister/ledger/accept/v2"
"""What the signatures under ``closed`` and ``accepted`` entries are over, first."""


@dataclass(frozen=True)
class Acceptance:
    """The steward's word that a ledger, as it is up to here, is the newest.

    Attributes:
        key: public key that signed it, 32 bytes.
        log: head of the audit log then: what was noted of the ledger up to there is void.
        claimed: entries that the coordinator noted of the audit log, and that are lost.
    """

    key: bytes
    log: Head
    claimed: frozenset[str]


def close_body(study: str, released: int, previous: str, steward: Identity) -> dict[str, Any]:
    """The entry that closes a study, signed for this place in this chain.

    Args:
        study: the study's hash.
        released: steps that were reserved and never started.
        previous: hash of the ledger's last entry.
        steward: signs it: the site's identity, which the steward's command can read.
    """
    signature = steward.sign(CLOSE_LABEL, study.encode(), u64(released), previous.encode())
    return {
        "study": study,
        "released": released,
        "key": steward.public.hex(),
        "signature": signature.hex(),
    }


def closer_of(body: Mapping[str, Any], previous: str) -> bytes:
    """The public key that an entry of ``close_body`` is signed with.

    Raises:
        KeyError, TypeError, ValueError: it is no such entry, or not validly signed.
    """
    fields = (str(body["study"]).encode(), u64(int(body["released"])), previous.encode())
    return _signer(body, CLOSE_LABEL, fields)


def accept_body(
    missed: int,
    previous: str,
    steward: Identity,
    *,
    log: Head,
    claimed: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The entry by which the steward takes a ledger for the newest; signed for this place.

    Args:
        missed: number of the newest entry that was noted elsewhere, 0 for none.
        previous: hash of the ledger's last entry.
        steward: signs it, see ``close_body``.
        log, claimed: see ``Acceptance``.
    """
    said = " ".join(sorted(claimed))
    signature = steward.sign(ACCEPT_LABEL, *_accepted(missed, log, said, previous))
    return {
        "missed": missed,
        "log_seq": log.seq,
        "log_hash": log.hash,
        "claimed": said,
        "key": steward.public.hex(),
        "signature": signature.hex(),
    }


def acceptance_of(body: Mapping[str, Any], previous: str) -> Acceptance:
    """What an entry of ``accept_body`` says.

    Raises:
        KeyError, TypeError, ValueError: it is no such entry, or not validly signed.
    """
    missed, claimed = int(body["missed"]), str(body["claimed"])
    log = Head(int(body["log_seq"]), str(body["log_hash"]))
    if missed < 0 or log.seq < 0:
        raise ValueError("a number of an entry is negative")
    key = _signer(body, ACCEPT_LABEL, _accepted(missed, log, claimed, previous))
    return Acceptance(key, log, frozenset(claimed.split()))


def _accepted(missed: int, log: Head, claimed: str, previous: str) -> tuple[bytes, ...]:
    """What the signature of an acceptance is over."""
    return (u64(missed), u64(log.seq), log.hash.encode(), claimed.encode(), previous.encode())


def _signer(body: Mapping[str, Any], label: str, fields: tuple[bytes, ...]) -> bytes:
    key, signature = bytes.fromhex(body["key"]), bytes.fromhex(body["signature"])
    if not verify(key, signature, label, *fields):
        raise ValueError("an entry is not validly signed")
    return key
