"""The files that pydicom brings along, read as the product reads them, and the tables of it.

``python tests/support/bundled_files.py`` writes the tables into docs/dicom.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID

from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.file_finder import discover
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.dicom.transfer_syntaxes import TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Input

PAGE = Path(__file__).parents[2] / "docs" / "dicom.md"
# Not through pydicom's own functions, which download what is not there.
DATA = Path(pydicom.__file__).parent / "data"
FOLDERS = ("charset_files", "palettes", "test_files")
SPEC = Input(size=32, modalities=("CR", "DX", "MG", "CT", "MR", "US"))
NO_SYNTAX = "none told"


@dataclass(frozen=True, eq=False)
class Bundled:
    """A file and how reading it ends: the facts and the image, or a reason."""

    path: Path
    data: bytes
    transfer_syntax: str
    end: tuple[Facts, NDArray[np.uint16]] | Reject


def read_bundled(pool: Pool) -> list[Bundled]:
    """Read every file through the workers."""
    paths = [
        found.path
        for folder in FOLDERS
        for found in discover(DATA / folder)
        if found.path.suffix not in (".py", ".pyc")
    ]
    files = [path.read_bytes() for path in paths]
    futures = [pool.submit(data, SPEC) for data in files]
    done = []
    for path, data, future in zip(paths, files, futures, strict=True):
        try:
            end: tuple[Facts, NDArray[np.uint16]] | Reject = future.result()
        except RejectedFile as rejected:
            end = rejected.reason
        done.append(Bundled(path, data, _transfer_syntax(path, data), end))
    return done


def _transfer_syntax(path: Path, data: bytes) -> str:
    if data[128:132] != b"DICM":
        return NO_SYNTAX
    return str(read_file_meta_info(path).get("TransferSyntaxUID", NO_SYNTAX))


def _name(uid: str) -> str:
    if uid in TRANSFER_SYNTAXES:
        return TRANSFER_SYNTAXES[uid].name
    return uid if uid == NO_SYNTAX else UID(uid).name


def tables(files: Iterable[Bundled]) -> dict[str, str]:
    """The generated parts of the page, by the name of their marks."""
    ends: dict[str, Counter[Reject | None]] = defaultdict(Counter)
    for file in files:
        ends[file.transfer_syntax][file.end if isinstance(file.end, Reject) else None] += 1
    total: Counter[Reject | None] = Counter()
    for counted in ends.values():
        total += counted
    read = f"pydicom {pydicom.__version__}: {total.total()} files, {total[None]} accepted."
    return {
        "decoders": _table(
            ("transfer syntax", "UID", "decoder"),
            [
                (_name(uid), f"`{uid}`", TRANSFER_SYNTAXES[uid].family.decoder)
                for uid in _order(TRANSFER_SYNTAXES)
            ],
        ),
        "files": f"{read}\n\n"
        + _table(
            ("transfer syntax", "files", "accepted", "refused"),
            [
                (_name(uid), str(counted.total()), str(counted[None]), _reasons(counted))
                for uid in _order({*TRANSFER_SYNTAXES, *ends})
                for counted in (ends[uid],)
            ],
        ),
        "reasons": _table(
            ("code", "reason", "files"),
            [
                (f"[{reason.value}](errors/{reason.value}.md)", reason.title, str(total[reason]))
                for reason in Reject
                if total[reason]
            ],
        ),
    }


def _order(uids: Iterable[str]) -> list[str]:
    return sorted(uids, key=lambda uid: [int(n) if n.isdigit() else 10**9 for n in uid.split(".")])


def _reasons(counted: Counter[Reject | None]) -> str:
    return ", ".join(f"{counted[one]} {one.value}" for one in Reject if counted[one]) or "none"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: str, made: Mapping[str, str]) -> str:
    """Put the generated parts between their marks."""
    for name, text in made.items():
        start, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        before, found, rest = page.partition(start)
        assert found, f"{PAGE.name} has no mark for {name}"
        page = before + start + text + rest[rest.index(end) :]
    return page


def main() -> None:
    pool = Pool(1)
    try:
        PAGE.write_text(fill(PAGE.read_text(), tables(read_bundled(pool))))
    finally:
        pool.close()


if __name__ == "__main__":
    main()
