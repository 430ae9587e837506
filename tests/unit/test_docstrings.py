"""Docstrings name modules, functions and fields that exist.

A name in double backticks is what a reader searches for next. Those that look like names of ours
are looked up in the sources, which are parsed and not imported.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cloister_fl.study.schema import Study

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("common", "server", "client")
PLACES = (*SIDES, "tests", "benchmarks", "scripts")

FORMER = frozenset(
    {
        *("aborts", "audit", "authority", "automatic", "binomial", "book_keeping", "bounds"),
        *("bundle", "cache", "canonical", "certifying", "charges", "check", "children"),
        *("cli_audit", "cli_budget", "cli_certificate", "cli_certificate_check"),
        *("cli_confirm", "cli_data", "cli_explain", "cli_folder", "cli_join"),
        *("cli_privacy_audit", "cli_runs", "cli_server", "cli_service", "cli_steward"),
        *("cli_study", "cli_verify", "clock", "cloister_client", "cloister_common"),
        *("cloister_server", "cohort_faults", "collection", "cores", "dealing", "decode"),
        *("deployment", "dial", "dial_errors", "discover", "display", "eckeys", "enrolling"),
        *("epoch", "extras", "features", "filter", "finding", "gathering", "grad_sample"),
        *("grid_sum", "high_water", "hospitals", "hours", "index", "inspection", "joining"),
        *("kept", "keys", "ledger_gates", "ledger_schema", "ledger_state", "listener"),
        *("locks", "mailbox", "manifest", "masked", "memory", "modelfile", "network_checks"),
        *("network_entry", "noised_metrics", "noted", "notices", "objective", "one_run_words"),
        *("optimizers", "outlines", "outputs", "pinned", "precheck", "preflight_network"),
        *("process", "randomness", "reader", "records", "recovery", "refusals", "reject"),
        *("release", "replies", "requests", "round_memory", "running", "runs"),
        *("segmentation_vector", "signing", "site_template", "sources", "store", "sums"),
        *("superexec", "supernode", "tags", "terms", "tomlfile", "vectors", "wire", "words"),
    }
)
"""Names that modules and packages had once, and that none has today."""

FILE_ENDS = frozenset({"csv", "high", "json", "jsonl", "pem", "safetensors", "sqlite", "toml"})
"""Ends of the names of files."""

SPAN = re.compile(r"``([A-Za-z_][\w.]*\w|[A-Za-z_])(?:\(\))?``")
PYTHON_FILE = re.compile(r"(?<![\w*{}<>-])(\w+)\.py\b")


def modules() -> dict[str, Path]:
    """Every module and package of ours by its dotted name."""
    found = {"cloister_fl": ROOT / "common" / "cloister_fl"}
    for side in SIDES:
        for path in (ROOT / side / "cloister_fl").rglob("*.py"):
            parts = path.relative_to(ROOT / side).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or a class defines or imports, by name; fields set on ``self`` as well."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[node.name] = node
            case ast.Import() | ast.ImportFrom():
                found |= {(each.asname or each.name).split(".")[0]: node for each in node.names}
            case ast.Assign() | ast.AnnAssign():
                for part in ast.walk(node):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        found[part.id] = node
            case ast.If() | ast.Try() | ast.With():
                found |= members(node.body)
        if isinstance(node, ast.FunctionDef):
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    found.setdefault(part.attr, node)
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree; that of a folder without ``__init__.py`` is empty."""
    return ast.parse(path.read_text("utf-8") if path.is_file() else "")


@cache
def by_last_parts() -> dict[str, list[str]]:
    """Dotted names of modules by each of their ends, such as ``dicom.header`` and ``header``."""
    found = defaultdict(list)
    for name in modules():
        parts = name.split(".")
        for start in range(len(parts)):
            found[".".join(parts[start:])].append(name)
    return found


@cache
def keys_and_groups() -> frozenset[str]:
    """Keys of a study, and groups of entry points: they have a dot and are no Python names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    keys = set(project["entry-points"])
    for name, field in Study.model_fields.items():
        keys |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", ())}
    return frozenset(keys)


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or what one defines, or a field of its class."""
    parts = dotted.split(".")
    known = modules()
    for end in range(len(parts), 0, -1):
        for name in by_last_parts().get(".".join(parts[:end]), ()):
            body = parsed(known[name]).body
            for rest in parts[end:]:
                node = members(body).get(rest)
                if node is None:
                    break
                body = node.body if isinstance(node, ast.ClassDef) else []
            else:
                return True
    return False


def is_stale(dotted: str) -> bool:
    """Whether a name with a dot starts as one of ours does, or did, and leads nowhere."""
    first, _, rest = dotted.partition(".")
    ours = first in by_last_parts() or first in FORMER
    if not rest or not ours or rest in FILE_ENDS or dotted in keys_and_groups():
        return False
    return not resolves(dotted)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The docstrings of modules, classes, functions and fields, each with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def spans(*places: str) -> Iterator[tuple[str, str]]:
    """Names in double backticks in docstrings, each with its file and line."""
    for place in places:
        for path in sorted((ROOT / place).rglob("*.py")):
            for line, text in docstrings(parsed(path)):
                for found in SPAN.finditer(text):
                    at = line + text.count("\n", 0, found.start())
                    yield f"{path.relative_to(ROOT)}:{at}", found[1]


@cache
def identifiers() -> frozenset[str]:
    """Names of modules, all identifiers, and all strings of our sources but docstrings."""
    found = {part for name in modules() for part in name.split(".")}
    for path in modules().values():
        documented = {text for _, text in docstrings(parsed(path))}
        for node in ast.walk(parsed(path)):
            for field in ("id", "name", "attr", "arg", "asname", "value"):
                value = getattr(node, field, None)
                if isinstance(value, str) and value not in documented:
                    found.add(value)
    return frozenset(found)


@pytest.mark.long
def test_dotted_names_lead_somewhere() -> None:
    every = list(spans(*PLACES))
    assert len(every) > 800
    assert [f"{at}: {name}" for at, name in every if is_stale(name)] == []


@pytest.mark.long
def test_plain_names_are_identifiers_of_ours() -> None:
    plain = [(at, name) for at, name in spans(*SIDES) if re.fullmatch(r"[a-z][a-z_0-9]*", name)]
    assert len(plain) > 300
    assert [f"{at}: {name}" for at, name in plain if name not in identifiers()] == []


def test_python_files_that_are_named_exist() -> None:
    names = {path.stem for place in PLACES for path in (ROOT / place).rglob("*.py")}
    texts = [ROOT / "pyproject.toml", *(path for path in modules().values() if path.is_file())]
    missing = [
        f"{path.relative_to(ROOT)}: {name}.py"
        for path in texts
        for name in PYTHON_FILE.findall(path.read_text("utf-8"))
        if name not in names
    ]
    assert missing == []


def test_no_former_name_is_in_use_again() -> None:
    assert sorted(FORMER & set(by_last_parts())) == []


@pytest.mark.parametrize(
    "name",
    [
        *("acceptance.precheck", "dicom.acceptance", "cloister_fl.secagg", "file_finder.Found"),
        *("file_finder.Found.stamp", "client.site.folder", "site.folder.pseudonym"),
        *("privacy.epsilon", "training.engine", "cloister_fl.holdout"),
        *("site.toml", "ledger.high", "torch.func", "p.grad_sample", "Cohort.images", "plain"),
    ],
)
def test_sound_names_pass(name: str) -> None:
    assert not is_stale(name)


@pytest.mark.parametrize(
    "name",
    [
        *("precheck.TRANSFER_SYNTAXES", "tags.person", "discover.Found.stamp", "wire.Request"),
        *("acceptance.tags", "file_finder.Found.gone", "site.pseudonym", "training.train_round"),
        *("cloister_client.site", "cloister_fl.client.cohort", "privacy.epsilons"),
    ],
)
def test_stale_names_are_found(name: str) -> None:
    assert is_stale(name)
