"""A hold-out belongs to no site: the coordinating site measures the model on it.

A simulation, which sees all folders, holds its user to that. Only images that are the same to the
byte are found. The same patient in other images is not: hospitals number their patients
independently, so equal numbers mean nothing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cloister_fl.errors import ExtraMissing, InternalError, OptionInvalid
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study.schema import Study
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.metrics.classification import Metrics

    Reader: TypeAlias = Callable[[Study, Path, Path], Callable[[Vector], Metrics]]

GROUP = "cloister.holdout"
NAME = "measure"
_PREFIX = 128
_MAGIC = b"DICM"


def measure_on(study: Study, folder: Path, out: Path) -> Callable[[Vector], Metrics]:
    """Read a hold-out once, as a site would, and return what measures a flat model on it.

    The client reads it; it is found as an entry point, for the server imports nothing of the
    client.

    Args:
        study: what is trained.
        folder: holds ``dicom/`` and ``labels.csv``.
        out: the run's folder; a site folder ``holdout`` is made in it, with keys and a cache.

    Raises:
        ExtraMissing: see ``load_reader``.
        DataError: the hold-out cannot be used.
    """
    return load_reader()(study, folder, out)


def load_reader() -> Reader:
    """Import what reads a hold-out: the one entry point ``measure`` of ``cloister.holdout``.

    A distribution that is found twice on the path counts once (``importlib.metadata``).

    Raises:
        ExtraMissing: no installed package reads hold-outs, or what it needs is not installed.
        InternalError: several packages offer to read them.
    """
    found = entry_points(group=GROUP, name=NAME)
    if not found:
        raise _missing("the client of Cloister")
    if len(found) > 1:
        named = ", ".join(sorted(entry.value for entry in found))
        raise InternalError(
            "Several packages offer to read a hold-out.",
            why=f"The entry point {NAME!r} of {GROUP} is {named}.",
            remedy="Uninstall the package that is not Cloister.",
        )
    (entry,) = found
    try:
        reader: Reader = entry.load()
    except ModuleNotFoundError as error:
        raise _missing(error.name or "a package") from None
    return reader


def _missing(what: str) -> ExtraMissing:
    return ExtraMissing(
        f"Measuring on a hold-out needs {what}, which is not installed.",
        remedy="Run: pip install 'cloister[client,server]'",
    )


def refuse_overlap(holdout: Path, sites: Mapping[str, Path]) -> None:
    """Refuse a hold-out that shares an image with a site.

    Args:
        holdout: folder of the hold-out's images.
        sites: folder of images by site.

    Raises:
        OptionInvalid: names the site, and how many images it shares.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path, size in _files(holdout):
        by_size[size].append(path)
    known: dict[int, set[bytes]] = {}
    for site, folder in sites.items():
        shared = 0
        for path, size in _files(folder):
            if size in by_size:
                if size not in known:
                    known[size] = {digest for one in by_size[size] if (digest := _digest(one))}
                shared += _digest(path) in known[size]
        if shared:
            raise OptionInvalid(
                f"The hold-out shares {counted(shared, 'image')} with {site}.",
                why="A model that is measured on patients it was trained on looks better than it "
                "is, and with privacy on, such figures are not charged.",
                remedy="Name a hold-out of patients of no site.",
            )


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                yield path, path.stat().st_size
        except OSError:
            continue


def _digest(path: Path) -> bytes:
    """SHA-256 of a DICOM file; empty for anything else, and for what cannot be read."""
    try:
        with path.open("rb") as file:
            if file.read(_PREFIX + len(_MAGIC))[_PREFIX:] != _MAGIC:
                return b""
            file.seek(0)
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""
