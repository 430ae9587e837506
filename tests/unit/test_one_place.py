"""What must be done alike everywhere is done in one module, and nowhere else."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def _calls() -> list[tuple[str, str, set[str | None]]]:
    """Every call of a method: its file's name, the method's name and its keywords."""
    calls = []
    for side in ("common", "server", "client"):
        for path in (ROOT / side).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    given = {word.arg for word in node.keywords}
                    calls.append((path.name, node.func.attr, given))
    return calls


def _files(*methods: str, keywords: frozenset[str] = frozenset()) -> set[str]:
    return {file for file, method, given in _calls() if method in methods and keywords <= given}


def test_files_are_locked_in_one_module() -> None:
    assert _files("flock", "lockf") == {"files.py"}


def test_canonical_json_is_written_in_one_module() -> None:
    assert _files("dumps", keywords=frozenset({"separators"})) == {"canonical_json.py"}


def test_times_are_taken_and_written_in_one_module() -> None:
    assert _files("strftime", "isoformat", "fromtimestamp", "utcnow") == {"utc.py"}
