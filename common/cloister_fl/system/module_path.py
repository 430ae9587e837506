"""Where modules are imported from: never from the folder that a command happens to be run in.

Python takes an empty part of ``PYTHONPATH``, as an unset variable leaves one in
``PYTHONPATH=$MORE:/opt/lib``, for the working folder, and puts it before its own library; ``-P``
does not change that. A package that lies there would be run in the place of an installed one,
with the keys and patients of the process that imports it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "PYTHONPATH"


def forget_working_folder() -> None:
    """Take the working folder off this process's module path, and off that of its children.

    Only where an empty part of ``PYTHONPATH`` put it there: a folder that is named stays, and so
    does one that Cloister itself is taken from. Call it before other packages are imported.
    """
    given = os.environ.pop(VARIABLE, "")
    if not given:
        return
    parts = given.split(os.pathsep)
    named = [part for part in parts if part]
    if named:
        os.environ[VARIABLE] = os.pathsep.join(named)
    if len(named) == len(parts):
        return
    with contextlib.suppress(FileNotFoundError):  # it is gone, so nothing is imported from it
        here = Path.cwd().resolve()
        if here not in {*_own_folders(), *(Path(part).resolve() for part in named)}:
            sys.path[:] = [one for one in sys.path if not one or Path(one).resolve() != here]


def environment_of_children(base: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose ``PYTHONPATH`` has no empty part, or is not set."""
    parts = [part for part in base.get(VARIABLE, "").split(os.pathsep) if part]
    made = {name: value for name, value in base.items() if name != VARIABLE}
    return {**made, VARIABLE: os.pathsep.join(parts)} if parts else made


def path_of_children() -> list[str]:
    """Return this process's module path for a child that works in another folder.

    An empty entry, which ``python -c`` has, means the working folder of each import, and is left
    out; what is relative to the working folder is made absolute.
    """
    return [os.path.abspath(entry) for entry in sys.path if entry]  # noqa: PTH100 - strings


def _own_folders() -> set[Path]:
    """The folders that Cloister is imported from: that of all packages, or those of a checkout."""
    mine = Path(__file__).resolve().parents[2]
    return {mine, *(mine.with_name(side) for side in ("common", "server", "client"))}
