"""Reader of a hold-out, whose patients belong to no site.

The client reads it; it is found as an entry point, for the server imports nothing of the client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from cloister_fl.errors import ExtraMissing, InstallError, InternalError
from cloister_fl.study.schema import Study
from cloister_fl.system.installation import install_command, own_entry_points
from cloister_fl.tasks.divided_holdout import Holdout

Reader: TypeAlias = Callable[[Study, Path, Path], Holdout]

GROUP = "cloister_fl.holdout"
NAME = "read"


def read_holdout(study: Study, folder: Path, out: Path) -> Holdout:
    """Read a hold-out once, as a site would.

    A simulation, which sees all folders, holds its user to that the patients are of no site. Only
    images that are the same to the byte are found. The same patient in other images is not:
    hospitals number their patients independently, so equal numbers mean nothing.

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
    """Import what reads a hold-out: the one entry point ``read`` of ``cloister_fl.holdout``.

    A distribution that is found twice on the path counts once (``importlib.metadata``).

    Raises:
        ExtraMissing: no installed package reads hold-outs, or what it needs is not installed.
        InternalError: several packages offer to read them.
    """
    found = [entry for entry in own_entry_points(GROUP) if entry.name == NAME]
    if not found:
        raise _missing("the client of Cloister")
    if len(found) > 1:
        named = ", ".join(sorted(entry.value for entry in found))
        raise InternalError(
            "Several packages provide the reader of a hold-out.",
            why=f"The entry point {NAME!r} of {GROUP} is {named}.",
            remedy="Uninstall the package that is not Cloister.",
        )
    (entry,) = found
    try:
        reader: Reader = entry.load()
    except ModuleNotFoundError as error:
        raise _missing(error.name or "a package") from None
    return reader


def _missing(what: str) -> InstallError:
    return ExtraMissing(
        f"Evaluation on a hold-out needs {what}, which is not installed.",
        remedy=f"Run: {install_command('client,server')}",
    )
