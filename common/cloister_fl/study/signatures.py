"""Signatures under a study, for hospitals that trust the signers' keys.

An entry is the signer's public key and an Ed25519 signature over a label and the study's hash,
96 bytes. It says that somebody stands for this very study, whoever proposes it; a site counts it
only where its own policy names the key.

They travel with the study's proposal. On disk they lie beside the study, in ``STUDY.sig``: a line
an entry, the key and the signature as hexadecimal digits.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cloister_fl.errors import FileUnreadable, MessageInvalid
from cloister_fl.membership.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    usable_public_key,
    verify,
)
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.system.toml import read_text

LABEL = "cloister/study-signature/v1"
MAX_SIGNATURES = 16
"""Most that a proposal may carry."""

_ENTRY = KEY_BYTES + SIGNATURE_BYTES
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{128})", re.ASCII)


def sign(study: Study, key: Identity) -> bytes:
    """One entry, 96 bytes."""
    return key.public + key.sign(LABEL, bytes.fromhex(study.digest))


def signers(study: Study, entries: bytes) -> tuple[bytes, ...]:
    """Public keys (32 bytes) whose signature under the study holds, in the given order.

    Args:
        study: what is signed.
        entries: entries one behind another, as a proposal carries them.

    Raises:
        MessageInvalid: these are not whole entries, or too many.
    """
    if not is_entries(entries):
        raise MessageInvalid("The signatures under a study do not have the agreed form.")
    found = []
    for start in range(0, len(entries), _ENTRY):
        public = entries[start : start + KEY_BYTES]
        signature = entries[start + KEY_BYTES : start + _ENTRY]
        # Under a key of small order one signature fits every study.
        if usable_public_key(public) and verify(
            public, signature, LABEL, bytes.fromhex(study.digest)
        ):
            found.append(public)
    return tuple(dict.fromkeys(found))


def is_entries(entries: bytes) -> bool:
    """Whether these are whole entries, and not too many, whatever they sign."""
    return len(entries) % _ENTRY == 0 and len(entries) <= MAX_SIGNATURES * _ENTRY


def path_of(study_file: Path) -> Path:
    """Return the path of the signatures of a study file."""
    return study_file.with_name(study_file.name + ".sig")


def load(study_file: Path, study: Study) -> bytes:
    """The entries that lie beside a study file; none where there is no such file.

    Raises:
        FileUnreadable: the file cannot be read, or holds a signature that is not under this
            study: most often the study was changed after it was signed.
    """
    path = path_of(study_file)
    if not path.exists():
        return b""
    rows = [_LINE.fullmatch(line) for line in read_text(path).splitlines()]
    entries = b"".join(bytes.fromhex(row[1] + row[2]) for row in rows if row)
    if None in rows or not rows or len(rows) > MAX_SIGNATURES:
        raise FileUnreadable(
            f"{path.name} is not a file of signatures.",
            remedy="Remove it, and sign again: "
            f"cloister study sign {shlex.quote(str(study_file))} --key KEY",
        )
    if len(signers(study, entries)) != len(rows):
        raise FileUnreadable(
            f"{path.name} has a signature that does not match this study.",
            why="A study that was changed after it was signed is another study.",
            remedy="Remove it, and sign again: "
            f"cloister study sign {shlex.quote(str(study_file))} --key KEY",
        )
    return entries


def add(study_file: Path, study: Study, key: Identity) -> int:
    """Put a signature beside a study file; return how many are there then.

    Signing twice with one key changes nothing. Signatures that are there must be under this study.

    Raises:
        FileUnreadable: see ``load``, or there are too many already.
        OutputInTheWay: the file cannot be written.
    """
    entries = load(study_file, study)
    if key.public not in signers(study, entries):
        entries += sign(study, key)
    count = len(entries) // _ENTRY
    if count > MAX_SIGNATURES:
        raise FileUnreadable(
            f"{path_of(study_file).name} is full.",
            why=f"A study carries at most {MAX_SIGNATURES} signatures.",
            remedy=f"Remove a line that no hospital needs from {path_of(study_file)}.",
        )
    rows = [entries[start : start + _ENTRY].hex() for start in range(0, len(entries), _ENTRY)]
    text = "".join(f"{row[: 2 * KEY_BYTES]} {row[2 * KEY_BYTES :]}\n" for row in rows)
    write_atomic(path_of(study_file), text.encode(), mode=0o644)
    return count
