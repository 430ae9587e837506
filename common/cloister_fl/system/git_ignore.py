"""Files that keep secrets and patients' data out of a git repository around them.

A folder that Cloister makes gets a ``.gitignore`` that covers all of it. In a folder that is a
person's, single files are covered by name. What a person wrote into a ``.gitignore`` is never
changed, and git itself is never run: a repository can name programs that git starts.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from cloister_fl.errors import OutputInTheWay
from cloister_fl.system.files import GIT_IGNORE, create_secret, write_atomic

_HEADER = "# Written by Cloister: what lies here is secret, or of patients, and is no source."
_SPECIAL = re.compile(r"([\\*?\[])")


def keep_out_of_git(folder: Path) -> None:
    """Keep a folder of keys, ledgers or patients' data out of any git repository around it.

    It gets a ``.gitignore`` that covers all of it, itself too. One that is there is left
    untouched. Call it before the folder holds anything else.

    Args:
        folder: made by Cloister, and holding nothing that a person would commit.

    Raises:
        OutputInTheWay: it cannot be written.
    """
    create_secret(folder / GIT_IGNORE, f"{_HEADER}\n*\n".encode())


def keep_file_out_of_git(path: Path) -> None:
    """Keep one file out of the git repository around it, if there is one. Can be repeated.

    Unless a ``.gitignore`` covers it, its name is written to one beside it, which covers itself
    too. Call it before the file is written, and before the work that it is the result of.

    Args:
        path: a file of secrets or of patients, in any folder that exists.

    Raises:
        OutputInTheWay: the ``.gitignore`` beside it is a person's and does not cover it, or
            cannot be read or written.
    """
    folder = path.parent.resolve()
    above = (folder, *folder.parents)
    top = next((one for one in above if os.path.lexists(one / ".git")), None)
    if top is None or _is_covered(folder / path.name, top):
        return
    ignore, line = folder / GIT_IGNORE, "/" + _SPECIAL.sub(r"\\\1", path.name)
    lines = _lines(ignore)
    if lines is not None and line in lines:
        return
    if lines is None:
        lines = [_HEADER, f"/{GIT_IGNORE}"]
    elif lines[0] != _HEADER:
        raise OutputInTheWay(
            f"{path} would lie in a git repository, and {ignore} does not cover it.",
            why="It is secret or shows patients, and must not be committed.",
            remedy="Name another folder, or run: "
            f"printf '\\n%s\\n' {shlex.quote(line)} >> {shlex.quote(str(ignore))}",
        )
    written = [*lines, line] if lines[-1] else [*lines[:-1], line]
    write_atomic(ignore, "\n".join([*written, ""]).encode("utf-8", "surrogateescape"))


def uncovered_by_git_ignore(folder: Path) -> str:
    """Say what to do where a person's own ``.gitignore`` does not cover all of a folder.

    Args:
        folder: as for ``keep_out_of_git``, after it.

    Returns:
        Two sentences; empty where a line of it is ``*``, or it cannot be read.
    """
    try:
        lines = _lines(folder / GIT_IGNORE)
    except OutputInTheWay:
        return ""
    if lines is None or "*" in (line.strip() for line in lines):
        return ""
    return (
        f"{folder / GIT_IGNORE} was here before and does not cover the ledgers and logs of this "
        "folder. If it lies in a git repository, add a line with * to it."
    )


def _lines(ignore: Path) -> list[str] | None:
    """The lines of a ``.gitignore``; None where there is none."""
    try:
        return ignore.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputInTheWay(
            f"{ignore} cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name another folder.",
        ) from None


def _is_covered(path: Path, top: Path) -> bool:
    """Whether a ``.gitignore`` from ``top`` down covers a file, or a folder that it lies in."""
    parts = path.relative_to(top).parts
    return any(
        _is_ignored(top, parts[:depth], is_folder=depth < len(parts))
        for depth in range(1, len(parts) + 1)
    )


def _is_ignored(top: Path, parts: Sequence[str], *, is_folder: bool) -> bool:
    ignored = False
    for above in range(len(parts)):
        # The last pattern that matches decides; one of a deeper folder comes later.
        for line in _lines(top.joinpath(*parts[:above], GIT_IGNORE)) or ():
            pattern = line.removesuffix("\r").rstrip(" ")
            if pattern.startswith("#"):
                continue
            negated = pattern.startswith("!")
            # What is not understood covers nothing, and takes back what was covered.
            if _matches(pattern.removeprefix("!"), parts[above:], is_folder, unknown=negated):
                ignored = not negated
    return ignored


def _matches(pattern: str, parts: Sequence[str], is_folder: bool, *, unknown: bool) -> bool:
    """Whether a pattern means the path ``parts`` below its own folder.

    As git reads it, but for ``**``, sets of characters and quoted ones: ``unknown`` for these.
    """
    if "**" in pattern or "[" in pattern or "\\" in pattern:
        return unknown
    if pattern.endswith("/") and not is_folder:
        return False
    pattern = pattern.removesuffix("/")
    words = pattern.removeprefix("/").split("/")
    named = parts if "/" in pattern else parts[-1:]
    return len(words) == len(named) and all(
        re.fullmatch(re.escape(word).replace(r"\*", ".*").replace(r"\?", "."), name, re.DOTALL)
        for word, name in zip(words, named, strict=True)
    )
