"""Images that a hold-out shares with a site: a simulation, which sees all folders, refuses them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cloister_fl.errors import OptionInvalid
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study.schema import Study
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.metrics.figures import Metrics

    Reader: TypeAlias = Callable[[Study, Path, Path], Callable[[Vector], Metrics]]


_PREFIX = 128


_MAGIC = b"DICM"


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
