"""Server and client never import each other, and what both stand on imports neither.

Every import counts: at the top, inside a function, for types only, and a module's name in a string
that something could import or run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "server": ("cloister_fl.client", "cloister_fl.simulation"),
    "client": ("cloister_fl.server", "cloister_fl.simulation"),
    "common": ("cloister_fl.client", "cloister_fl.server", "cloister_fl.simulation"),
}
STARTS_BOTH = "server/cloister_fl/simulation/"
"""The simulation: the one package that runs both sides in a process."""

NAMES_BOTH = {
    # The bundle that Flower is given names the two apps.
    "common/cloister_fl/protocol/app_bundle.py",
}
"""Modules that hold the names of both sides as data, and import neither."""


def reached(source: str, packages: tuple[str, ...], *, strings: bool = True) -> Iterator[int]:
    """The lines of a module that name one of these packages other than in its documentation."""
    named = re.compile(rf"(?<![\w.])({'|'.join(packages)})(?!\w)")
    tree = ast.parse(source)
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and strings:
            found = [] if id(node) in texts else [node.value]
        if any(named.search(each) for each in found):
            yield node.lineno


@pytest.mark.parametrize("side", FORBIDDEN)
def test_no_module_reaches_over_to_the_other_side(side: str) -> None:
    files = sorted((ROOT / side).rglob("*.py"))
    assert len(files) > 30
    found = []
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(STARTS_BOTH):
            lines = reached(
                file.read_text("utf-8"), FORBIDDEN[side], strings=name not in NAMES_BOTH
            )
            found += [f"{name}:{line}" for line in lines]
    assert found == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import cloister_fl.client.app", [1]),
        ("from cloister_fl.client import app", [1]),
        ("def act():\n    from cloister_fl.client.site.folder import Site", [2]),
        ("if TYPE_CHECKING:\n    from cloister_fl.client.site.folder import Site", [2]),
        ('run(["-m", "cloister_fl.client.worker"])', [1]),
        ('code = "import cloister_fl.client"', [1]),
        ('"""Sites run cloister_fl.client."""', []),
        ("import cloister_clients, cloister_fl", []),
    ],
)
def test_every_kind_of_import_counts(source: str, lines: list[int]) -> None:
    assert list(reached(source, ("cloister_fl.client",))) == lines
