"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_fl.errors import ExtraMissing
from support.errors import raises

INIT = """
from cloister_fl.system.libraries.lazy_names import lazy_names
__getattr__, __dir__ = lazy_names(
    __name__,
    {"here": "inner:real", "far": "needy:far", "lost": "broken:lost"},
    extra="client",
)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "lazypack"
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    (folder / "inner.py").write_text("COUNT = [0]\nCOUNT[0] += 1\nreal = 'value'\n")
    (folder / "needy.py").write_text("import not_installed_anywhere.deeper\nfar = 1\n")
    (folder / "broken.py").write_text("import lazypack.gone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "lazypack"
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazypack"]:
        del sys.modules[name]


def test_a_name_is_imported_when_it_is_asked_for_and_once(package: str) -> None:
    found = importlib.import_module(package)
    assert f"{package}.inner" not in sys.modules
    assert {"here", "far", "lost"} <= set(dir(found))
    assert found.here == "value"
    assert vars(found)["here"] == "value"


def test_other_names_are_missing(package: str) -> None:
    found = importlib.import_module(package)
    assert not hasattr(found, "real")
    with pytest.raises(ImportError, match="cannot import name 'real' from 'lazypack'"):
        exec("from lazypack import real")


def test_a_package_that_is_not_installed_has_its_remedy(package: str) -> None:
    found = importlib.import_module(package)
    with raises(ExtraMissing, "lazypack.far needs not_installed_anywhere.* install.*client"):
        found.far  # noqa: B018


def test_a_module_of_ours_that_is_missing_is_no_missing_extra(package: str) -> None:
    found = importlib.import_module(package)
    with pytest.raises(ModuleNotFoundError, match=r"lazypack\.gone"):
        found.lost  # noqa: B018
