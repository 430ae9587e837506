"""The threat model names tests that there are, and is found from the pages that lead to it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
NAMED = re.compile(r"([\w/]+\.py)::(\w+)")
ACTORS = ("An outsider", "A hospital", "The coordinator", "Colluders", "A local account", "A file")


@cache
def defined_in(path: str) -> frozenset[str]:
    """The tests that a file defines, below ``tests``; none where there is no such file."""
    file = ROOT / "tests" / path
    if not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text("utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return frozenset(name for name in found if name.startswith("test_"))


def missing(text: str) -> list[str]:
    """The tests that a text names and that do not exist."""
    return [f"{path}::{name}" for path, name in NAMED.findall(text) if name not in defined_in(path)]


def rows_of(actor: str) -> list[list[str]]:
    """The rows of an actor's table, each with its cells."""
    section = PAGE.read_text("utf-8").split(f"\n## {actor}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.mark.long
def test_each_named_test_exists() -> None:
    text = PAGE.read_text("utf-8")
    assert missing(text) == []
    assert len(NAMED.findall(text)) > 80


def test_a_test_that_was_renamed_or_moved_is_missed() -> None:
    here = "unit/test_threat_model.py"
    assert missing(f"{here}::test_each_named_test_exists") == []
    gone = [f"{here}::test_that_is_not_there", "unit/test_gone.py::test_each_named_test_exists"]
    assert missing(", ".join(gone)) == gone


@pytest.mark.parametrize("actor", ACTORS)
def test_each_threat_has_a_control_and_a_test_or_is_open(actor: str) -> None:
    rows = rows_of(actor)
    assert rows
    for row in rows:
        assert len(row) == 3, row
        threat, control, tests = row
        assert threat
        assert control
        assert NAMED.search(tests) or control.startswith("**none**"), threat


def test_security_and_the_documentation_lead_to_it() -> None:
    assert "(docs/threat-model.md)" in (ROOT / "SECURITY.md").read_text("utf-8")
    assert "(docs/threat-model.md)" in (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert "(threat-model.md)" in (ROOT / "docs" / "README.md").read_text("utf-8")
