"""Registry of the ledgers of one machine, and of whose patients each of them counts.

A second site folder for the same patients would have a second ledger, and neither would know of the
other's spending. So each folder that freezes a study's data leaves a file here: where it is, which
ledger is its own, and a keyed hash of each patient. The key is the machine's and never leaves it; a
file tells of no patient without it.

The registry decides nothing and is no account: where it is lost, ledgers are as they were, and only
what would have been noticed is not. It is one user's, as the site folders are.

::

    machine.key      32 bytes, mode 0600
    HASH.ledger      one for each site folder: a line of JSON, then a tag a line
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloister_fl.client.ledger import chain
from cloister_fl.encoding.canonical_json import HASH, canonical_json
from cloister_fl.errors import CloisterError
from cloister_fl.system.files import (
    create_secret,
    locked,
    make_private_dir,
    read_secret,
    write_atomic,
)

VARIABLE = "CLOISTER_STATE"
OFF = "none"
"""What the variable says where no registry is kept."""

_VERSION = 1
_KEY = "machine.key"
_KEY_BYTES = 32
_END = ".ledger"
_LABEL = b"cloister/registry/v1"

_Change = Callable[["Entry"], "Entry"]
Trait = tuple[str, ...]
"""What tells a patient on this machine: a kind and words; it is hashed before it is written."""


class RegistryUnusableError(Exception):
    """The registry cannot be read or written; its text is for a person and names no patient."""


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a site folder.

    Attributes:
        folder: the site folder, resolved.
        site: the site's name.
        ledger: ``ledger_id`` of its ledger, or empty where it had none.
        separate: folders whose patients its steward said are others, though they look alike.
        tags: keyed hashes of its patients' traits, 32 hexadecimal digits each.
    """

    folder: Path
    site: str
    ledger: str
    separate: frozenset[str] = frozenset()
    tags: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class Overlap:
    """Another folder that counts some of the same patients.

    Attributes:
        entry: what is known of it.
        patients: how many, at least.
    """

    entry: Entry
    patients: int


def state_folder() -> Path | None:
    """Where the registry lies: ``$CLOISTER_STATE``, else ``cloister`` in the user's state folder
    (``$XDG_STATE_HOME``, else ``~/.local/state``); None where it is switched off.

    Raises:
        RegistryUnusableError: the user has no home.
    """
    given = os.environ.get(VARIABLE, "")
    if given:
        return None if given == OFF else Path(given).absolute()
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if base.is_absolute():
        return base / "cloister"
    try:
        return Path.home() / ".local" / "state" / "cloister"
    except RuntimeError:
        raise RegistryUnusableError("the user has no home folder") from None


class Registry:
    """The registry; make it with ``open``.

    Several processes may use it: files are written whole, and one process at a time changes them.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder = folder
        self._key = key

    @classmethod
    def open(cls) -> Registry | None:
        """Open the machine's registry, made where there is none; None where it is switched off.

        Raises:
            RegistryUnusableError: it cannot be read or written.
        """
        folder = state_folder()
        if folder is None:
            return None
        with _as_unusable(folder):
            make_private_dir(folder)
            path = folder / _KEY
            if not os.path.lexists(path):
                if any(folder.glob(f"*{_END}")):
                    # With a new key no patient would be known again, in silence.
                    raise RegistryUnusableError(f"{path} is missing")
                create_secret(path, secrets.token_bytes(_KEY_BYTES))
            key = read_secret(path)
            if len(key) != _KEY_BYTES:
                raise RegistryUnusableError(f"{path} does not hold {_KEY_BYTES} bytes")
            return cls(folder, key)

    def entries(self) -> tuple[Entry, ...]:
        """All that is known, by folder.

        Raises:
            RegistryUnusableError: a file cannot be read.
        """
        with _as_unusable(self._folder):
            found = [_parsed(path) for path in self._folder.glob(f"*{_END}")]
        return tuple(sorted(found, key=lambda one: one.folder))

    def overlaps(self, root: Path, traits: Collection[Trait]) -> tuple[Overlap, ...]:
        """Other folders that know some of these patients, and that nobody said are others.

        Args:
            root: the site folder that asks.
            traits: of its patients.

        Raises:
            RegistryUnusableError: see ``entries``.
        """
        own, tags = root.resolve(), self._tags(traits)
        entries = self.entries()
        mine = next((one for one in entries if one.folder == own), None)
        found = []
        for one in entries:
            apart = str(own) in one.separate or (
                mine is not None and str(one.folder) in mine.separate
            )
            shared = 0 if one.folder == own or apart else _patients(one.tags & tags)
            if shared:
                found.append(Overlap(one, shared))
        return tuple(found)

    def register(self, root: Path, site: str, ledger: str, traits: Collection[Trait]) -> None:
        """Note a folder and its patients; those that were noted before stay.

        Raises:
            RegistryUnusableError: it cannot be written.
        """
        tags = self._tags(traits)
        self._change(root, site, lambda one: replace(one, ledger=ledger, tags=one.tags | tags))

    def separate(self, root: Path, site: str, other: Path) -> None:
        """Note that a folder's patients are not those of another, on its steward's word.

        Raises:
            RegistryUnusableError: it cannot be written.
        """
        name = str(other.resolve())
        self._change(root, site, lambda one: replace(one, separate=one.separate | {name}))

    def _change(self, root: Path, site: str, change: _Change) -> None:
        folder = root.resolve()
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        path = self._folder / f"{name}{_END}"
        with _as_unusable(self._folder), locked(self._folder / "registry.lock"):
            before = _parsed(path) if path.exists() else Entry(folder, site, "")
            after = change(replace(before, site=site))
            head = {
                "version": _VERSION,
                "folder": str(after.folder),
                "site": after.site,
                "ledger": after.ledger,
                "separate": sorted(after.separate),
            }
            lines = [canonical_json(head), *sorted(after.tags)]
            write_atomic(path, "\n".join(lines).encode() + b"\n")

    def _tags(self, traits: Collection[Trait]) -> frozenset[str]:
        return frozenset(_tag(self._key, trait) for trait in traits)


def ledger_id(path: Path) -> str:
    """What tells a ledger from others, and not from its copies: the hash of its first entry.

    Nothing is verified. Empty where there is no ledger, or it cannot be read.
    """
    if not path.exists():
        return ""
    with contextlib.suppress(sqlite3.Error, OSError):
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as rows:
            first = rows.execute("SELECT hash FROM entries WHERE seq = 1").fetchone()
        if first and HASH.fullmatch(str(first[0])):
            return str(first[0])
    return ""


def has_spending(path: Path) -> bool:
    """Whether a ledger holds a reservation, or may: where it cannot be read, nobody can tell."""
    if not path.exists():
        return False
    entries = _entries_of(path)
    return entries is None or any(one.kind in {"reserved", "linked"} for one in entries)


def continued_in(path: Path) -> str:
    """``ledger_id`` of the ledger that counts this one's spending; empty for none."""
    entries = (_entries_of(path) if path.exists() else None) or ()
    return next((str(one.body.get("ledger")) for one in entries if one.kind == "continued"), "")


def _entries_of(path: Path) -> tuple[chain.Entry, ...] | None:
    """The entries of a ledger whose chain holds; None where it cannot be read."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as rows:
            return chain.read(rows)
    except (sqlite3.Error, OSError, CloisterError):
        return None


def _tag(key: bytes, trait: Trait) -> str:
    message = bytearray(_LABEL)
    for word in trait:
        data = word.encode("utf-8", "surrogatepass")
        message += len(data).to_bytes(8, "big") + data
    # The kind stands before it, for the count.
    return trait[0][:1] + hmac.new(key, bytes(message), hashlib.sha256).hexdigest()[:31]


def _patients(shared: frozenset[str]) -> int:
    """At least so many patients: a patient has one trait of each kind or more."""
    kinds = [tag[:1] for tag in shared]
    return max((kinds.count(kind) for kind in set(kinds)), default=0)


def _parsed(path: Path) -> Entry:
    head, *tags = path.read_text("utf-8").splitlines()
    try:
        told = json.loads(head)
        if told["version"] != _VERSION:
            raise ValueError
        return Entry(
            Path(told["folder"]),
            str(told["site"]),
            str(told["ledger"]),
            frozenset(map(str, told["separate"])),
            frozenset(tags),
        )
    except (ValueError, KeyError, TypeError):
        raise RegistryUnusableError(f"{path} is not in the registry's format") from None


@contextlib.contextmanager
def _as_unusable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, CloisterError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise RegistryUnusableError(f"{folder}: {why or 'it cannot be used'}") from None
