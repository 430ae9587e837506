"""No text tells a person to install `cloister` by name: the index has another project's."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml"),
    *("docs", "deploy", "scripts", ".ci", "common", "server", "client", "benchmarks"),
)

_INSTALL = r"(?:pip[\d.]*|pipx|uv(?:\s+tool)?|poetry|pdm|conda|mamba)\s+(?:install|add|download)\b"
_REST = r"[^`;|&\n]*?"
_VERSION = r"(?:\s*[=<>~!]=?[^\s'\"`]*)?"
_NAME = rf"(?<![\w./\\-])cloister(?:[-_.]+fl)?(?:\[[^\]]*\])?{_VERSION}(?=['\")`,;:\s]|\.?$)"
BY_NAME = re.compile(_INSTALL + _REST + _NAME, re.IGNORECASE)


def commands(text: str) -> Iterator[str]:
    """Each line, with the lines that go on after a backslash; and each span of code."""
    joined = re.sub(r"\\\n\s*", " ", text)
    yield from joined.splitlines()
    # A span, or a comment, may be broken over lines.
    unbroken = re.sub(r"\s*\n[ \t]*(?:#|//)?[ \t]*", " ", joined)
    yield from re.findall(r"`[^`]+`", unbroken)


def literals(source: str) -> Iterator[str]:
    """The strings of a Python file, joined as it joins them, with ``x`` for what is put in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield "".join(literals_of(node))


def literals_of(node: ast.AST) -> Iterator[str]:
    """The strings of an expression in the order in which they stand."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    for child in ast.iter_child_nodes(node):
        yield from literals_of(child)


def by_name(name: str, text: str) -> list[str]:
    """The places of a text where something is installed by our name alone."""
    texts = [text]
    if name.endswith(".py"):
        texts += literals(text)
    every = (command for one in texts for command in commands(one))
    return [command for command in every if BY_NAME.search(command)]


def shipped() -> Iterator[Path]:
    for place in PLACES:
        start = ROOT / place
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


@pytest.mark.long
def test_no_shipped_text_installs_by_name() -> None:
    faults = []
    looked = 0
    for path in shipped():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        looked += 1
        faults += [f"{path.relative_to(ROOT)}: {one}" for one in by_name(path.name, text)]
    assert faults == []
    assert looked > 250


@pytest.mark.parametrize(
    "text",
    [
        "pip install cloister",
        "pip install 'cloister[client]'",
        'Install it with: pip install "cloister[client]"',
        "/opt/cloister/bin/pip install -c constraints.txt 'cloister[client,server]'",
        "python -m pip install --force-reinstall cloister-fl==0.1.0",
        "pip install -U cloister_fl[pretrained]",
        "pip install Cloister",
        "pip install 'cloister >= 0.1'",
        "(size 224, pip install 'cloister[pretrained]'); filter-bank",
        "RUN pip install --no-cache-dir \\\n    -c constraints.txt \\\n    cloister[server]",
        "its weights: `pip install\n'cloister[pretrained]'`.",
        "uv tool install cloister",
        "pip install cloister.",
        "pip download cloister-fl",
    ],
)
def test_an_installation_by_name_is_found(text: str) -> None:
    assert by_name("README.md", text)


@pytest.mark.parametrize(
    "text",
    [
        "remedy = 'Run: pip install -c c.txt '\\\n    \"'cloister[client]'\"",
        "f\"Run: pip install 'cloister[{extra}]'\"",
        '"pip install " + "cloister"',
        "('pip install -c c.txt '\n 'cloister-fl')",
    ],
)
def test_an_installation_by_name_is_found_in_the_strings_of_a_program(text: str) -> None:
    assert by_name("a.py", text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install -c constraints.txt 'cloister_fl-0.1.0-py3-none-any.whl[client]'",
        "/opt/cloister/bin/pip install torch",
        "pip install 'torch'\ncloister client init",
        ".venv/bin/pip install torch && .venv/bin/cloister demo",
        "`pip install torch`, and Cloister keeps it",
        "pip install -e '/srv/cloister[client]'",
        "scripts/install client",
    ],
)
def test_an_installation_of_something_else_is_none(text: str) -> None:
    assert by_name("README.md", text) == []


def test_no_requirement_is_the_foreign_distribution() -> None:
    """An extra that names ours by the old name would fetch the other project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
        *(ROOT / "constraints.txt").read_text().splitlines(),
        *(ROOT / "constraints-torch.txt").read_text().splitlines(),
    ]
    names = [match[0].lower() for one in asked if (match := re.match(r"[\w.-]+", one))]
    assert len(names) > 60
    assert "cloister" not in names


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/deploy-hospital.md",
        "docs/deploy-coordinator.md",
        "docs/errors/CLO-601.md",
    ],
)
def test_the_pages_that_say_how_to_install_warn_of_the_name(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert "distribution called `cloister` on the package index is not this project" in text
