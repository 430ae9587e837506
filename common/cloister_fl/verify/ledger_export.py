"""Reader of a ledger's export: chain, signature, and what was spent.

The reader is another one than the site's own on purpose: it knows the format (JSON Lines of
``body``, ``previous`` and ``hash``, and a last line that signs the site's name and the head) and
adds up what was started, so that a fault in the site's code does not vouch for itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cloister_fl.encoding.canonical_json import GENESIS, HASH, canonical_json, entry_hash
from cloister_fl.encoding.framing import u64
from cloister_fl.errors import CertificateInvalid, PrivacyError
from cloister_fl.membership.identity import usable_public_key, verify
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose

CHAIN_LABEL = b"cloister/ledger/v2\0"
SIGN_LABEL = "cloister/ledger/export/v3"
FORMAT = 3


@dataclass(frozen=True)
class Spent:
    """Steps that a run of a study started.

    Attributes:
        study: its hash.
        run: the run that started them.
        mechanism: of each step.
        started: how many; they are spent.
        release: of the study's release, where the run charged it; else None.
    """

    study: str
    run: str
    mechanism: Mechanism
    started: int
    release: Mechanism | None = None

    def composition(self) -> Composition:
        """All that was spent, as accountants take it."""
        release = () if self.release is None else ((self.release, 1),)
        return compose(((self.mechanism, self.started),), release)


@dataclass(frozen=True)
class LedgerExport:
    """An export whose chain and signature hold.

    Attributes:
        site: the site's name, as its key signed it.
        key: its public key, 64 hexadecimal digits.
        hashes: of the entries, first to last.
        delta: of the lifetime's filter.
        orders: of the lifetime's filter.
        bodies: of the entries.
        unsupported: hashes of the studies whose engine does not support their privacy claim, as
            far as the site knows them: their steps are counted, and their epsilon does not hold.
    """

    site: str
    key: str
    hashes: tuple[str, ...]
    delta: float
    orders: tuple[float, ...]
    bodies: tuple[dict[str, Any], ...]
    unsupported: tuple[str, ...] = ()

    def spent(self, up_to: int | None = None) -> tuple[Spent, ...]:
        """What was started by entry ``up_to`` (all where it is None), by study and run."""
        held: dict[tuple[str, str], Mechanism] = {}
        noise: dict[tuple[str, str], float] = {}
        count: dict[tuple[str, str], int] = {}
        released: dict[tuple[str, str], Mechanism] = {}
        for body in self.bodies[:up_to]:
            key = (str(body.get("study")), str(body.get("run")))
            match body["kind"]:
                case "reserved":
                    held[key] = Mechanism(body["noise_multiplier"], body["sampling_rate"])
                    if body["release_noise_multiplier"] is not None:
                        noise[key] = float(body["release_noise_multiplier"])
                case "adopted":
                    before = (key[0], str(body["from"]))
                    held[key] = held.pop(before)
                    if before in noise:
                        noise[key] = noise.pop(before)
                case "started":
                    count[key] = count.get(key, 0) + int(body["steps"])
                case "evaluated":
                    if key in released:
                        raise ValueError("a noised evaluation was charged twice")
                    released[key] = Mechanism(noise[key], 1.0)
        return tuple(
            Spent(*key, held[key], count.get(key, 0), released.get(key))
            for key in dict.fromkeys((*count, *released))
        )

    def linked(self, up_to: int | None = None, *, study: str | None = None) -> Composition:
        """What other ledgers of the same patients had reserved, and count here as spent."""
        rows = [
            row
            for body in self.bodies[:up_to]
            if body["kind"] == "linked"
            for row in body["steps"]
            if study in {None, row["study"]}
        ]
        return compose(
            *(
                ((Mechanism(row["noise_multiplier"], row["sampling_rate"]), int(row["steps"])),)
                for row in rows
            )
        )

    def composition(self, up_to: int | None = None) -> Composition:
        """All that was started, and what counts as such, as accountants take it."""
        return compose(self.linked(up_to), *(one.composition() for one in self.spent(up_to)))


def read(data: bytes) -> LedgerExport:
    """Read an export, and believe nothing that is not chained and signed.

    Raises:
        CertificateInvalid: naming the first line that does not hold.
    """
    lines = data.splitlines(keepends=True)
    bodies: list[dict[str, Any]] = []
    hashes: list[str] = []
    for number, line in enumerate(lines[:-1], start=1):
        held = _object(line, number)
        body, previous = held.get("body"), hashes[-1] if hashes else GENESIS
        if not isinstance(body, dict) or held.get("previous") != previous:
            raise _invalid(f"Line {number} does not follow the line before it.")
        try:
            text = canonical_json(body)
        except ValueError:
            raise _invalid(f"Line {number} has a number that is not finite.") from None
        digest = entry_hash(CHAIN_LABEL, text, beside=previous)
        if held.get("hash") != digest or body.get("seq") != number:
            raise _invalid(f"The hash of line {number} is wrong.")
        if not HASH.fullmatch(str(body.get("salt"))):
            raise _invalid(f"Line {number} has no salt, as a ledger of an earlier version.")
        bodies.append(body)
        hashes.append(digest)
    if not bodies:
        raise _invalid("It has no entry.")
    last = _object(lines[-1], len(lines))
    try:
        key, signature = bytes.fromhex(last["key"]), bytes.fromhex(last["signature"])
        head = last["head"]
        content = hashlib.sha256(b"".join(lines[:-1])).digest()
        unsupported = tuple(map(str, last["unsupported"]))
        named = "".join(unsupported).encode()
        site = str(last["site"])
        fields = (site.encode(), u64(len(bodies)), hashes[-1].encode(), content, named)
        signed = (
            last["format"] == FORMAT
            and head == {"seq": len(bodies), "hash": hashes[-1]}
            and all(HASH.fullmatch(study) for study in unsupported)
            and verify(key, signature, SIGN_LABEL, *fields)
        )
        made = bodies[0]
        found = LedgerExport(
            site=site,
            key=last["key"],
            hashes=tuple(hashes),
            delta=float(made["delta"]),
            orders=tuple(float(order) for order in made["orders"]),
            bodies=tuple(bodies),
            unsupported=unsupported,
        )
        found.composition()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _invalid("It is not in the format of a ledger's export.") from None
    if not signed or not usable_public_key(key):
        raise _invalid("The signature in its last line does not match the entries before it.")
    return found


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        held = json.loads(line)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise _invalid(f"Line {number} is not an entry.")
    return held


def _invalid(why: str) -> PrivacyError:
    return CertificateInvalid(
        "The ledger's export is not valid.",
        why=why,
        remedy="Ask the site for a new copy: cloister client budget export",
    )
