"""Whether a study is bound to its initial model, and the line of its file that says so.

Here is what needs no network: a study is checked, signed and read where numpy is not installed.
``initial_model`` draws the weights.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cloister_fl.errors import InitialModelUnfit, OutputInTheWay, StudyInvalid
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.system.toml import read_text
from cloister_fl.system.toml_positions import key_lines

_KEY = "initial_model"
_HEADER = re.compile(r"\s*\[\s*training\s*\]")


def bind_command(file: Path | None = None) -> str:
    """The command that binds a study, for a remedy."""
    return f"cloister study bind {'STUDY' if file is None else shlex.quote(str(file))}"


def require_bound(study: Study, file: Path | None = None) -> None:
    """Refuse a study without the hash of its initial model.

    Args:
        study: the study.
        file: its file, for the remedy.

    Raises:
        InitialModelUnfit: it has none.
    """
    if not study.training.initial_model:
        raise InitialModelUnfit(
            "The study does not carry the hash of its initial model.",
            why="Without it, the coordinator could begin with any model.",
            remedy="Whoever proposes the study writes it, which makes it another study, to be "
            f"approved anew: {bind_command(file)}",
        )


def write_initial_model(file: Path, study: Study) -> None:
    """Write the hash of a bound study into its file; all other lines stay as they are.

    Args:
        file: the study's file, which says all that the study says but for this hash.
        study: the study, bound.

    Raises:
        OutputInTheWay: the file cannot be written, or is of a form that has no place for the line.
        FileUnreadable, StudyInvalid: the file cannot be read, or has faults.
    """
    line = f'{_KEY} = "{study.training.initial_model}"'
    text = _with_line(read_text(file), line)
    try:
        is_same = parse_study(text, file.name) == study
    except StudyInvalid:
        is_same = False
    if not is_same:
        raise OutputInTheWay(
            f"{file.name} has no place where the hash of the initial model can be written.",
            why="Its training settings do not stand below a line [training].",
            remedy=f"Write it into the table training by hand: {line}",
        )
    write_atomic(file, text.encode(), mode=0o644)


def _with_line(text: str, line: str) -> str:
    """The text with the line in its table, in the place of the one that is there."""
    known = key_lines(text)
    lines = text.split("\n")
    stated, table = known.get(("training", _KEY), 0), known.get(("training",), 0)
    if stated:
        lines[stated - 1] = line
    elif table and _HEADER.match(lines[table - 1]):
        lines.insert(table, line)
    else:
        lines = [*text.rstrip("\n").split("\n"), "", "[training]", line, ""]
    return "\n".join(lines)
