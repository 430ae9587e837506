"""The layout of the packages: no cycles, small packages, few names twice, layers."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("common", "server", "client")
CONTRACTS = ROOT / ".importlinter"

MOST_MODULES = 15
"""Modules that a package holds directly, at most: more cannot be taken in at a glance."""

TWICE = {
    "app": "Flower's own terms: each side has one app",
    "audit_log": "the format that both sides write, and a site's own log",
    "classification": "the task, and its figures",
    "folder": "each side keeps its state in one folder",
    "ledger": "the class, in the package that is named after it",
    "segmentation": "the task, and the reader of DICOM Segmentations",
    "server": "one of the two parties of secure aggregation, and the coordinating side",
    "service": "each side has one service",
}
"""Names that two modules or packages share, and why; no name stands for three."""

MOST_TWICE = 8
MOST_LEVELS = {"cloister_fl": 9, "cloister_fl.client": 9, "cloister_fl.server": 6}
FEWEST_CONTRACTS = 5


@cache
def graph() -> grimp.ImportGraph:
    """All imports of ours: at the top of a module, inside functions, and for types alone."""
    return grimp.build_graph("cloister_fl", exclude_type_checking_imports=False, cache_dir=None)


def files() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for side in SIDES:
        for path in (ROOT / side / "cloister_fl").rglob("*.py"):
            parts = path.relative_to(ROOT / side).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def cycles(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules each of which reaches the others."""
    found = networkx.strongly_connected_components(networkx.DiGraph(edges))
    return sorted(sorted(group) for group in found if len(group) > 1)


def test_the_graph_knows_every_module() -> None:
    assert graph().modules - {"cloister_fl"} == set(files())


def test_no_modules_import_each_other() -> None:
    edges = [
        (name, other)
        for name in sorted(graph().modules)
        for other in sorted(graph().find_modules_directly_imported_by(name))
    ]
    assert len(edges) > 1000
    assert cycles(edges) == []


def test_a_cycle_is_found() -> None:
    assert cycles([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == [["b", "c"]]


def test_no_packages_import_each_other() -> None:
    found = []
    for package in [name for name, path in files().items() if path.name == "__init__.py"]:
        parts = package.split(".")
        edges = set()
        for name in graph().find_descendants(package):
            for other in graph().find_modules_directly_imported_by(name):
                mine, theirs = name.split("."), other.split(".")
                if theirs[: len(parts)] == parts and len(theirs) > len(parts):
                    edges.add((mine[len(parts)], theirs[len(parts)]))
        found += [(package, group) for group in cycles([(a, b) for a, b in edges if a != b])]
    assert found == []


def test_no_package_holds_too_many_modules() -> None:
    held = Counter(path.parent for path in files().values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in held.items() if count > MOST_MODULES} == {}


def test_few_names_stand_for_two_modules_and_none_for_three() -> None:
    modules = Counter(path.stem for path in files().values() if path.name != "__init__.py")
    packages = {path.parent.name for path in files().values() if path.name == "__init__.py"}
    both = {name: count + (name in packages) for name, count in modules.items()}
    assert {name for name, count in both.items() if count > 1} == set(TWICE)
    assert max(both.values()) == 2
    assert len(TWICE) <= MOST_TWICE


# Purity of secure aggregation, as far as imports do not show it

BUILT_IN = {"open", "exec", "eval", "compile", "__import__", "input", "print", "breakpoint"}
"""Functions of every module that reach a file or a terminal, or run what no import shows."""

OF_ARRAYS = {
    *("load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt"),
    *("fromfile", "tofile", "memmap", "dump", "open_memmap", "DataSource"),
}
"""Names of numpy, and of its arrays, that read or write a file."""


def reaches_out(text: str) -> list[str]:
    """What a module's text uses of these, whether it calls it or hands it on."""
    names = {"np", "numpy"}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id in BUILT_IN:
            found.append(node.id)
        if isinstance(node, ast.Attribute) and node.attr in OF_ARRAYS:
            of_numpy = isinstance(node.value, ast.Name) and node.value.id in names
            if of_numpy or node.attr in {"tofile", "dump"}:
                found.append(node.attr)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            found += [one.name for one in node.names if one.name in OF_ARRAYS]
    return found


def test_secure_aggregation_reaches_no_file_without_an_import() -> None:
    paths = [path for name, path in files().items() if "cloister_fl.secagg" in name]
    assert len(paths) > 20
    told = {path.name: reaches_out(path.read_text("utf-8")) for path in paths}
    assert {name: found for name, found in told.items() if found} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(p):\n    with open(p) as file: return file.read()", ["open"]),
        ("read = open", ["open"]),
        ("eval('1')", ["eval"]),
        ("import numpy as np\nnp.load(x)", ["load"]),
        ("from numpy import memmap as m", ["memmap"]),
        ("made.tofile(x)", ["tofile"]),
        ("store.load(x); reopen(x); self.open(x)", []),
    ],
)
def test_what_reaches_a_file_is_found(text: str, found: list[str]) -> None:
    assert reaches_out(text) == found


# The contracts


def contracts() -> configparser.ConfigParser:
    """The contracts as they are written."""
    parser = configparser.ConfigParser()
    parser.read_string(CONTRACTS.read_text("utf-8"))
    return parser


def test_the_layers_are_exhaustive_and_few() -> None:
    parser = contracts()
    levels = {}
    for name in parser.sections():
        section = parser[name]
        if section.get("type") == "layers":
            assert section["exhaustive"] == "True", name
            levels[section["containers"].strip()] = len(section["layers"].split("\n")) - 1
    assert levels.keys() >= MOST_LEVELS.keys()
    assert {name: levels[name] for name, most in MOST_LEVELS.items() if levels[name] > most} == {}
    assert len(parser.sections()) - 1 >= FEWEST_CONTRACTS


PLANTED = {
    "server imports client": (
        "server/cloister_fl/server/rounds/events.py",
        "def late():\n    from cloister_fl.client import predict\n",
    ),
    "client imports server, for types": (
        "client/cloister_fl/client/site/policy.py",
        "if TYPE_CHECKING:\n    from cloister_fl.server.rounds import events\n",
    ),
    "common imports client": (
        "common/cloister_fl/errors/families.py",
        "from cloister_fl.client.site import policy\n",
    ),
    "upwards within the client": (
        "client/cloister_fl/client/ledger/chain.py",
        "from cloister_fl.client.steward import budget\n",
    ),
    "secagg reads a file": (
        "common/cloister_fl/secagg/fixed_point.py",
        "from pathlib import Path\n",
    ),
    "secagg reads a folder": (
        "common/cloister_fl/secagg/crypto/shamir.py",
        "def late():\n    import os\n",
    ),
    "secagg copies a file": (
        "common/cloister_fl/secagg/unmasking.py",
        "from shutil import copyfile\n",
    ),
    "secagg imports torch": (
        "common/cloister_fl/secagg/crypto/shamir.py",
        "def late():\n    import torch\n",
    ),
    "the ledger imports Flower": (
        "client/cloister_fl/client/ledger/chain.py",
        "from flwr.app import Message\n",
    ),
    "the worker imports torch": (
        "client/cloister_fl/client/dicom/pixels/decoders.py",
        "import torch\n",
    ),
    "a module in no layer": ("client/cloister_fl/client/new.py", ""),
}


@pytest.mark.process
@pytest.mark.parametrize("planted", [None, *PLANTED], ids=lambda name: name or "as it is")
def test_the_contracts_hold_and_a_forbidden_import_breaks_them(
    tmp_path: Path, planted: str | None
) -> None:
    for side in SIDES:
        shutil.copytree(ROOT / side, tmp_path / side, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONTRACTS, tmp_path)
    if planted:
        file, text = PLANTED[planted]
        with (tmp_path / file).open("a") as target:
            target.write(f"\n{text}")
    # Ours are imported from the copy alone, wherever the tests take them from.
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        f"sys.path[:] = {[str(tmp_path / side) for side in SIDES]!r} + [entry for entry in sys.path"
        f" if not any(entry.rstrip('/').endswith('/' + side) for side in {SIDES!r})];"
        "sys.exit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is (planted is None), done.stdout + done.stderr
    if planted and PLANTED[planted][1]:
        assert "BROKEN" in done.stdout
