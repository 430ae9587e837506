"""The command that adds an extra names a checkout or a file, whatever the metadata says."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from cloister_fl.errors import ExtraMissing, WeightsUnfit
from cloister_fl.networks import pretrained
from cloister_fl.system import installation
from cloister_fl.system.installation import DISTRIBUTION, WHEEL, install_command, own_entry_points
from cloister_fl.system.optional import require
from cloister_fl.version import __version__
from support.errors import raises

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIP = [sys.executable, "-P", "-m", "pip", "install"]
UNKNOWN = [*PIP, f"{WHEEL}[client]"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata folder that is found for our distribution."""
    home = tmp_path / "cloister_fl-0.1.0.dist-info"
    home.mkdir()

    def find(name: str) -> metadata.Distribution:
        assert name == DISTRIBUTION
        return metadata.PathDistribution(home)

    monkeypatch.setattr(installation.metadata, "distribution", find)
    return home


def told(home: Path, url: str, **about: object) -> list[str]:
    """Write what PEP 610 records, and return the command's words."""
    (home / "direct_url.json").write_text(json.dumps({"url": url, **about}))
    return shlex.split(install_command("client"))


def checkout(folder: Path) -> Path:
    (folder / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "constraints-torch.txt", "scripts/install"):
        (folder / name).touch()
    return folder


PINS = ("constraints.txt", "constraints-torch.txt")


def test_the_names_are_those_of_the_project() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "cloister-fl"
    assert PROJECT["version"] == __version__
    assert f"cloister_fl-{PROJECT['version']}-py3-none-any.whl" == WHEEL
    assert list(PROJECT["scripts"]) == ["cloister"]


def test_a_checkout_with_its_own_environment_uses_its_script(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "a 'checkout'")
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    words = told(installed, root.as_uri(), dir_info={"editable": True})
    assert words == [str(root / "scripts" / "install"), "client"]


def test_a_checkout_in_another_environment_uses_its_pip(installed: Path, tmp_path: Path) -> None:
    root = checkout(tmp_path / "a checkout")
    pins = [word for name in PINS for word in ("-c", str(root / name))]
    words = told(installed, root.as_uri(), dir_info={"editable": True})
    assert words == [*PIP, *pins, "-e", f"{root}[client]"]
    words = told(installed, root.as_uri(), dir_info={})
    assert words == [*PIP, *pins, f"{root}[client]"]


def test_a_wheel_is_named_by_its_file_with_the_constraints_beside_it(
    installed: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "the wheels" / WHEEL
    wheel.parent.mkdir()
    wheel.touch()
    assert told(installed, wheel.as_uri(), archive_info={}) == [*PIP, f"{wheel}[client]"]
    (wheel.parent / "constraints.txt").touch()
    pinned = [*PIP, "-c", str(wheel.parent / "constraints.txt"), f"{wheel}[client]"]
    assert told(installed, wheel.as_uri(), archive_info={}) == pinned


@pytest.mark.parametrize(
    ("url", "about"),
    [
        ("file:///nowhere/at/all", {"dir_info": {"editable": True}}),
        (f"file:///nowhere/{WHEEL}", {"archive_info": {}}),
        (f"file://elsewhere/etc/{WHEEL}", {"archive_info": {}}),
        (f"https://example.org/{WHEEL}", {"archive_info": {}}),
        ("https://example.org/cloister.git", {"vcs_info": {"vcs": "git"}}),
        ("file:///%00", {"dir_info": {}}),
        ("http://[", {"archive_info": {}}),
        ("", {}),
        (None, {}),
        (7, {}),
    ],
)
def test_a_source_that_is_not_there_gives_the_wheel_by_its_name(
    installed: Path, url: str, about: dict[str, object]
) -> None:
    assert told(installed, url, **about) == UNKNOWN


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "7", '{"dir_info": []}', "\xff"])
def test_odd_metadata_gives_the_wheel_by_its_name(installed: Path, text: str | None) -> None:
    if text is not None:
        (installed / "direct_url.json").write_bytes(text.encode("latin-1"))
    assert shlex.split(install_command("client")) == UNKNOWN


def test_a_checkout_with_odd_metadata_gives_the_wheel_by_its_name(
    installed: Path, tmp_path: Path
) -> None:
    root = checkout(tmp_path / "checkout")
    for odd in (None, [], "yes"):
        assert told(installed, root.as_uri(), dir_info=odd) == UNKNOWN
    assert told(installed, root.as_uri()) == UNKNOWN


def test_no_metadata_gives_the_wheel_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "distribution", none)
    assert shlex.split(install_command("client")) == UNKNOWN


def test_a_missing_extra_gives_the_command(installed: Path, tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    told(installed, root.as_uri(), dir_info={"editable": True})
    with raises(ExtraMissing) as caught:
        require("server", "no_such_module_of_ours")
    assert caught.value.remedy == f"Run: {install_command('server')}"
    assert str(root) in caught.value.remedy


def test_damaged_weights_are_installed_again_at_their_pinned_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrained, "_packaged", lambda: tmp_path / "none")
    with raises(WeightsUnfit) as caught:
        pretrained.require(pretrained.Weights("efficientnet-lite0", "0" * 64, packaged=True))
    (pinned,) = PROJECT["optional-dependencies"]["pretrained"]
    assert caught.value.remedy.endswith(f"--force-reinstall --no-deps {pinned}")


def test_another_distribution_offers_us_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be loaded by every command, or answer in the place of ours."""
    foreign = tmp_path / "foreign-1.0.dist-info"
    foreign.mkdir()
    (foreign / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (foreign / "entry_points.txt").write_text(
        "[cloister_fl.commands]\nverify = foreign:verify\nclient = foreign:client\n"
    )
    ours = {entry.value for entry in own_entry_points("cloister_fl.commands")}
    assert len(ours) == 8
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    every = {entry.value for entry in metadata.entry_points(group="cloister_fl.commands")}
    assert "foreign:verify" in every
    assert {entry.value for entry in own_entry_points("cloister_fl.commands")} == ours
