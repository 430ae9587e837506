"""Fetch of what is missing from a site's PACS into its encrypted store.

Each instance is kept as soon as it is there, so a fetch that fails or is killed goes on where it
ended. An archive that cannot be reached, refuses, or answers nonsense ends a fetch with an error
that says which.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Protocol

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_FILE_BYTES
from cloister_fl.client.dicom.structure import dissect
from cloister_fl.client.dicom.transfer_syntaxes import TRANSFER_SYNTAXES
from cloister_fl.client.pacs.sealed_store import Store
from cloister_fl.client.site.archive_settings import SECRET, CGet, DicomWeb, NotSent, Query
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import (
    CloisterError,
    DataError,
    FetchUnfinished,
    FileUnreadable,
    OptionInvalid,
    OutputInTheWay,
)
from cloister_fl.system.files import locked, read_secret, sweep, write_atomic

_MAX_SECRET = 4096
_SOP_INSTANCE = 0x00080018
UNFINISHED = "fetch.unfinished"
"""Lies in the site folder from a fetch's first file to its end, and names what was asked for, one
hash a line: the end of another query's fetch makes nothing whole."""
_LOCK = "fetch.lock"
FREE_BYTES = 1 << 30
"""What a fetch leaves free on the disk: the ledger and the audit log may lie on the same."""
MAX_INSTANCES = 1_000_000
"""Most images of one query: a list without end must not fill the memory."""


class _Archive(Protocol):
    def find(self, query: Query) -> Iterator[tuple[str, str, str]]: ...

    def get(self, study: str, series: str, instance: str) -> bytes: ...


@dataclass(frozen=True)
class Fetched:
    """What a fetch did.

    Attributes:
        found: instances that fit the query.
        new: of them, fetched now.
        there: of them, in the store before.
        too_large: of them, larger than a file may be.
        not_sent: of them, what the archive cannot send, such as a coding that it does not know,
            or what came was another file.
    """

    found: int = 0
    new: int = 0
    there: int = 0
    too_large: int = 0
    not_sent: int = 0


def fetch(site: Site, *, progress: Callable[[int, int], None] | None = None) -> Fetched:
    """Fetch what fits the site's query and is not in its store.

    Args:
        site: the opened site.
        progress: called with (instances done, instances in all).

    Raises:
        OptionInvalid: site.toml names no archive.
        FetchUnfinished: another fetch runs.
        FileUnreadable: the secret or the authority's file cannot be used.
        ArchiveUnreachable: it does not answer, or not in time.
        ArchiveRefused: it does not accept the password, the token or the AE title.
        ArchiveAnswerInvalid: an answer is cut short, too large or malformed.
        OutputInTheWay: the store cannot be written, or the disk is nearly full.
    """
    if site.archive is None:
        raise OptionInvalid(
            "site.toml names no archive.",
            remedy="Write a table [data.dicomweb] or [data.cget]; see docs/sources.md.",
        )
    with _alone(site):
        # What earlier fetches were killed over.
        sweep(site.store)
        return _fetch(site, site.archive, progress)


def _fetch(
    site: Site, settings: DicomWeb | CGet, progress: Callable[[int, int], None] | None
) -> Fetched:
    store = Store(site.store, site.cache_key())
    end = "InternalError"
    done = {"found": 0, "new": 0, "there": 0, "too_large": 0, "not_sent": 0}
    asked = _asked(settings, site.query)
    try:
        with _archive(site) as archive:
            found = list(dict.fromkeys(islice(archive.find(site.query), MAX_INSTANCES + 1)))
            if len(found) > MAX_INSTANCES:
                raise OptionInvalid(
                    f"More than {MAX_INSTANCES} images match the query.",
                    remedy="Narrow [data.query] in site.toml.",
                )
            done["found"] = len(found)
            if any(listed not in store for listed in found):
                # Before the first file: what a kill leaves is a part, and a study that froze it
                # would be held to it.
                _mark(site, _marked(site) | {asked})
            for number, listed in enumerate(found, start=1):
                if listed in store:
                    done["there"] += 1
                else:
                    try:
                        data = archive.get(*listed)
                        if _instance(data) != listed[2]:
                            raise NotSent
                        _require_room(site)
                        store.put(listed, data)
                        done["new"] += 1
                    except RejectedFile:
                        done["too_large"] += 1
                    except NotSent:
                        done["not_sent"] += 1
                if progress is not None:
                    progress(number, len(found))
        _mark(site, _marked(site) - {asked})
        end = "ok"
    except CloisterError as error:
        end = error.code
        raise
    finally:
        # Also of a fetch that failed: what was asked, and what it brought.
        kind = "dicomweb" if isinstance(settings, DicomWeb) else "cget"
        log_of(site).append("fetched", source=kind, end=end, **done)
    return Fetched(**done)


def require_whole(site: Site, *, more: bool = False) -> DataError | None:
    """Return the error that keeps a site's data from being frozen while a fetch is incomplete.

    Args:
        site: the opened site.
        more: whether the store is not what it was when the reading began.
    """
    if site.archive is None or not (more or (site.root / UNFINISHED).exists()):
        return None
    return FetchUnfinished(
        "A fetch from the archive is incomplete.",
        why="It was interrupted or is still running; the store has only part of what the query "
        "matches.",
        remedy=f"Complete it, with the same query: {site.command('fetch')}. It continues with what "
        "is missing. To give that query up, remove the folder 'store' and the file "
        f"'{UNFINISHED}' from the site folder, and fetch again.",
    )


def names_stored(site: Site) -> tuple[bytes, ...]:
    """Names of what the store holds: more of them, and a fetch was running."""
    return tuple(one.name for one in Store(site.store, site.cache_key()).items())


def _asked(settings: DicomWeb | CGet, query: Query) -> str:
    """A name for what is asked of whom, 64 hexadecimal digits."""
    archive = settings.url if isinstance(settings, DicomWeb) else f"{settings.host}:{settings.port}"
    text = json.dumps([archive, query.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _marked(site: Site) -> set[str]:
    try:
        return set((site.root / UNFINISHED).read_text("ascii", "replace").split())
    except FileNotFoundError:
        return set()


def _mark(site: Site, unfinished: set[str]) -> None:
    path = site.root / UNFINISHED
    if unfinished:
        write_atomic(path, "\n".join(sorted(unfinished)).encode())
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(site: Site) -> Iterator[None]:
    def taken() -> Exception:
        return FetchUnfinished(
            "Another fetch is running.", remedy="Wait until it has ended, or stop it."
        )

    with locked(site.root / _LOCK, taken):
        yield


def _require_room(site: Site) -> None:
    free = shutil.disk_usage(site.root).free
    if free < FREE_BYTES + MAX_FILE_BYTES:
        raise OutputInTheWay(
            "The disk of the site folder is nearly full.",
            why=f"{free >> 20} MiB are free; the ledger and the audit log need space, too.",
            remedy="Make room, or narrow [data.query] in site.toml. Then continue: "
            + site.command("fetch"),
        )


def _instance(data: bytes) -> str:
    """The SOP Instance UID that a file says it has; empty for what is no file that is read here."""
    try:
        parts = dissect(data, frozenset(), TRANSFER_SYNTAXES.keys(), {_SOP_INSTANCE})
    except RejectedFile:
        return ""
    return parts.aside.get(_SOP_INSTANCE, b"").strip(b"\0 ").decode("ascii", "replace")


def as_dict(fetched: Fetched) -> dict[str, int]:
    """For a script."""
    return asdict(fetched)


def set_secret(site: Site, text: str) -> None:
    """Keep the archive's password or token, mode 0600, in place of one that was there.

    Raises:
        OptionInvalid: it is empty, too long, or more than one line.
        OutputInTheWay: it cannot be written.
    """
    secret = text.removesuffix("\n").removesuffix("\r")
    data = secret.encode("ascii", "replace") if secret.isprintable() and secret.isascii() else b""
    if not 0 < len(data) <= _MAX_SECRET:
        raise OptionInvalid(
            "This cannot be the archive's password or token.",
            remedy=f"Give one line of at most {_MAX_SECRET} ASCII characters.",
        )
    write_atomic(site.keys / SECRET, data)


@contextmanager
def _archive(site: Site) -> Iterator[_Archive]:
    settings = site.archive
    if isinstance(settings, CGet):
        from cloister_fl.client.pacs.cget import GetArchive

        with GetArchive(settings, site.root) as archive:
            yield archive
        return
    from cloister_fl.client.pacs.dicomweb import WebArchive

    assert settings is not None
    secret = None if settings.auth == "none" else _secret(site)
    with WebArchive(settings, secret, site.root) as web:
        yield web


def _secret(site: Site) -> str:
    path = site.keys / SECRET
    if not path.exists():
        raise FileUnreadable(
            "The archive's password or token is not set.",
            remedy=f"Set it: {site.command('fetch --ask-secret')}",
        )
    return read_secret(path).decode("ascii", "replace")
