"""Fetch what is missing from a site's archive into its sealed store.

Each instance is kept as soon as it is there, so a fetch that fails or is killed goes on where it
ended. An archive that cannot be reached, refuses, or answers nonsense ends a fetch with an error
that says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Protocol

from cloister_client.audit import log_of
from cloister_client.dicom.precheck import TRANSFER_SYNTAXES
from cloister_client.dicom.reject import RejectedFile
from cloister_client.dicom.structure import dissect
from cloister_client.site import Site
from cloister_client.sources.settings import SECRET, CGet, DicomWeb, NotSent, Query
from cloister_client.store import Store
from cloister_common.errors import CloisterError, FetchUnfinished, FileUnreadable, OptionInvalid
from cloister_common.files import read_secret, write_atomic

_MAX_SECRET = 4096
_SOP_INSTANCE = 0x00080018
UNFINISHED = "fetch.unfinished"
"""Lies in the site folder from a fetch's first file to its end."""
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
        FileUnreadable: the secret or the authority's file cannot be used.
        ArchiveUnreachable: it does not answer, or not in time.
        ArchiveRefused: it does not accept the password, the token or the AE title.
        ArchiveAnswerInvalid: an answer is cut short, too large or malformed.
        OutputInTheWay: the store cannot be written.
    """
    if site.archive is None:
        raise OptionInvalid(
            "site.toml names no archive.",
            remedy="Write a table [data.dicomweb] or [data.cget]; see docs/sources.md.",
        )
    store = Store(site.store, site.cache_key())
    end = "InternalError"
    done = {"found": 0, "new": 0, "there": 0, "too_large": 0, "not_sent": 0}
    unfinished = site.root / UNFINISHED
    try:
        with _archive(site) as archive:
            found = list(dict.fromkeys(islice(archive.find(site.query), MAX_INSTANCES + 1)))
            if len(found) > MAX_INSTANCES:
                raise OptionInvalid(
                    f"More than {MAX_INSTANCES} images fit the query.",
                    remedy="Narrow [data.query] in site.toml.",
                )
            done["found"] = len(found)
            if any(instance not in store for _, _, instance in found):
                # Before the first file: what a kill leaves is a part, and a study that froze it
                # would be held to it.
                write_atomic(unfinished, b"")
            for number, (study, series, instance) in enumerate(found, start=1):
                if instance in store:
                    done["there"] += 1
                else:
                    try:
                        data = archive.get(study, series, instance)
                        if _instance(data) != instance:
                            raise NotSent
                        store.put(instance, data)
                        done["new"] += 1
                    except RejectedFile:
                        done["too_large"] += 1
                    except NotSent:
                        done["not_sent"] += 1
                if progress is not None:
                    progress(number, len(found))
        unfinished.unlink(missing_ok=True)
        end = "ok"
    except CloisterError as error:
        end = error.code
        raise
    finally:
        # Also of a fetch that failed: what was asked, and what it brought.
        kind = "dicomweb" if isinstance(site.archive, DicomWeb) else "cget"
        log_of(site).append("fetched", source=kind, end=end, **done)
    return Fetched(**done)


def require_whole(site: Site) -> FetchUnfinished | None:
    """What keeps a site's data from being frozen while a fetch has begun and not ended."""
    if site.archive is None or not (site.root / UNFINISHED).exists():
        return None
    return FetchUnfinished(
        "A fetch from the archive has begun and not ended.",
        why="It was cut off or runs at this moment; the store holds a part of what fits the query.",
        remedy="Run 'cloister client fetch' to its end; it goes on with what is missing.",
    )


def _instance(data: bytes) -> str:
    """The SOP Instance UID that a file says it has; empty for what is no file that is read here."""
    try:
        parts = dissect(data, frozenset(), TRANSFER_SYNTAXES, {_SOP_INSTANCE})
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
        from cloister_client.sources.cget import GetArchive

        with GetArchive(settings, site.root) as archive:
            yield archive
        return
    from cloister_client.sources.dicomweb import WebArchive

    assert settings is not None
    secret = None if settings.auth == "none" else _secret(site)
    with WebArchive(settings, secret, site.root) as web:
        yield web


def _secret(site: Site) -> str:
    path = site.keys / SECRET
    if not path.exists():
        raise FileUnreadable(
            "The archive's password or token was not set.",
            remedy="Set it: cloister client fetch --ask-secret",
        )
    return read_secret(path).decode("ascii", "replace")
