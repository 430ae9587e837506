"""The public names: all there, all explained, all on the page of the API, and light to import."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import griffe
import pytest

from support.host_state import changes_of, modules_after

pytestmark = pytest.mark.process  # griffe asks git about the sources that it reads

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
HEAVY = ("torch", "flwr", "opacus", "pydicom", "matplotlib", "monai", "ray", "rich")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def package() -> griffe.Module:
    """Our sources as griffe reads them."""
    read: griffe.Module = _script().load()
    return read


@cache
def on_the_page() -> tuple[tuple[str, str], ...]:
    """The names on the page of the API, each with its module."""
    found, module = [], ""
    for line in PAGE.read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"(##|###) `([\w.]+)`", line):
            if heading[1] == "##":
                module = heading[2]
            else:
                found.append((module, heading[2]))
    return tuple(found)


def modules() -> list[str]:
    """The public modules."""
    return list(dict.fromkeys(module for module, _ in on_the_page()))


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text("utf-8") == _script().render()


def test_the_page_has_what_a_researcher_needs() -> None:
    assert {
        ("cloister_fl.study", "load"),
        ("cloister_fl.simulation", "simulate"),
        ("cloister_fl.simulation", "generate_sites"),
        ("cloister_fl.client.predict", "predict"),
        ("cloister_fl.metrics", "measure"),
        ("cloister_fl.networks", "build"),
        ("cloister_fl.privacy", "calibrate"),
        ("cloister_fl.secagg", "ServerEpoch"),
        ("cloister_fl.errors", "CloisterError"),
    } <= set(on_the_page())


@pytest.mark.parametrize(("module", "name"), on_the_page())
def test_every_name_on_the_page_can_be_imported(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is not None


def test_nothing_public_lacks_a_docstring() -> None:
    assert _script().undocumented(package()) == []


def test_a_missing_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script()
    read = script.load()
    found = read["simulation"]["simulate"].final_target
    monkeypatch.setattr(found, "docstring", None)
    assert script.undocumented(read) == ["cloister_fl.simulation.from_python.simulate"]


def test_a_docstring_that_griffe_cannot_read_stops_the_script() -> None:
    script = _script()
    read = script.load()
    docstring = read["simulation"]["simulate"].final_target.docstring
    docstring.value += "\n\nRaises:\n    One, Other.\n"
    with pytest.raises(ValueError, match="exception: description"):
        script._docstring(read["simulation"]["simulate"].final_target)


@pytest.mark.parametrize("module", modules())
def test_a_name_is_the_same_to_the_type_checker_and_when_it_is_used(module: str) -> None:
    """An ``__init__`` names each twice: for the type checker, and for its import when asked for."""
    found = import_module(module)
    read = package()[module.removeprefix("cloister_fl.")]
    stated = {str(name) for name in read.exports}
    assert {name for where, name in on_the_page() if where == module} == stated
    assert stated == set(found.__all__)
    for name in stated:
        member = read.members[name]
        target = member.final_target if member.is_alias else member
        value = getattr(found, name)
        if isinstance(value, type) or callable(value):
            own = f"{value.__module__}.{getattr(value, '__qualname__', '')}"
            # An alias of a type has no name of its own.
            assert own == target.path or not own.startswith("cloister_fl."), name
        assert value is getattr(import_module(target.parent.path), target.name)
    assert stated <= set(dir(found))


@pytest.mark.parametrize("module", modules())
def test_no_public_name_is_that_of_a_module_beside_it(module: str) -> None:
    """The module would take the name's place as soon as anybody imports it."""
    found = import_module(module)
    beside = {one.name for one in pkgutil.iter_modules(getattr(found, "__path__", []))}
    assert beside & set(found.__all__) == set()


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    found = import_module("cloister_fl.study")
    with pytest.raises(AttributeError, match=r"'cloister_fl\.study' has no attribute 'lod'"):
        found.lod  # noqa: B018


def _packages() -> Iterator[str]:
    for name in modules():
        if hasattr(import_module(name), "__path__"):
            yield name


def test_a_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "\n".join(f"import {name}" for name in _packages())
    code += "\nfrom cloister_fl.simulation import *\nfrom cloister_fl.study import *"
    assert modules_after(code, folder=tmp_path) & set(HEAVY) == set()


def test_the_public_names_change_nothing_of_the_program_that_imports_them(tmp_path: Path) -> None:
    code = "\n".join(f"from {module} import {name}" for module, name in on_the_page())
    assert changes_of(code, folder=tmp_path) == {}
