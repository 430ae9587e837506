"""The machine's registry: who counts whose patients, and what happens where it cannot be used."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.machine_registry import (
    Registry,
    RegistryUnusableError,
    has_spending,
    ledger_id,
    state_folder,
)
from cloister_fl.privacy.dp_events import Mechanism

JANE = ("person", "f" * 64)
ONE, TWO, THREE = (("record", "", f"CANARY{number}") for number in range(3))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOISTER_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def _registry() -> Registry:
    registry = Registry.open()
    assert registry is not None
    return registry


def _shared(root: Path, *traits: tuple[str, ...]) -> dict[str, int]:
    return {one.entry.site: one.patients for one in _registry().overlaps(root, traits)}


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOISTER_STATE", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home" / ".local" / "state" / "cloister"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_folder() == tmp_path / "xdg" / "cloister"
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    assert state_folder() == tmp_path / "home" / ".local" / "state" / "cloister"
    monkeypatch.setenv("CLOISTER_STATE", str(tmp_path / "given"))
    assert state_folder() == tmp_path / "given"
    monkeypatch.setenv("CLOISTER_STATE", "none")
    assert state_folder() is None
    assert Registry.open() is None


def test_a_second_folder_for_the_same_patients_is_noticed(tmp_path: Path, state: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    _registry().register(first, "north", "1" * 64, [ONE, TWO, JANE])
    assert _shared(second, TWO, THREE) == {"north": 1}
    # By name and birth date, where the numbers are others.
    assert _shared(second, THREE, JANE) == {"north": 1}
    assert _shared(second, ONE, TWO, JANE) == {"north": 2}
    assert _shared(second, THREE) == {}
    assert _shared(first, ONE, TWO) == {}
    # Another folder that is the same one.
    (tmp_path / "link").symlink_to(first)
    assert _shared(tmp_path / "link", ONE) == {}


def test_what_was_noted_stays_and_more_is_added(tmp_path: Path, state: Path) -> None:
    first = tmp_path / "a"
    _registry().register(first, "north", "", [ONE])
    _registry().register(first, "north", "1" * 64, [TWO])
    (entry,) = _registry().entries()
    assert (entry.ledger, len(entry.tags)) == ("1" * 64, 2)


def test_patients_that_are_said_to_be_others_are_not_reported_on_either_side(
    tmp_path: Path, state: Path
) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    for root, site in ((first, "north"), (second, "south"), (third, "east")):
        _registry().register(root, site, "", [ONE])
    _registry().separate(second, "south", first)
    assert _shared(second, ONE) == {"east": 1}
    assert _shared(first, ONE) == {"east": 1}
    assert _shared(third, ONE) == {"north": 1, "south": 1}
    # Noted anew, it is still said.
    _registry().register(second, "south", "", [TWO])
    assert _shared(second, ONE) == {"east": 1}


def test_it_holds_no_patient_and_only_its_owner_reads_it(tmp_path: Path, state: Path) -> None:
    _registry().register(tmp_path / "a", "north", "1" * 64, [ONE, JANE])
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for path in state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"CANARY" not in path.read_bytes()
        assert b"f" * 16 not in path.read_bytes()
    assert "CANARY" not in repr(_registry().entries())


def test_a_key_that_is_lost_is_not_replaced_in_silence(tmp_path: Path, state: Path) -> None:
    _registry().register(tmp_path / "a", "north", "1" * 64, [ONE])
    (state / "machine.key").unlink()
    with pytest.raises(RegistryUnusableError, match=r"machine\.key is missing"):
        Registry.open()
    assert not (state / "machine.key").exists()


@pytest.mark.parametrize("text", ["", "{}\n", '{"version":2}\n', "\x00\xff"])
def test_a_file_that_is_damaged_is_told_and_not_passed_over(
    tmp_path: Path, state: Path, text: str
) -> None:
    _registry().register(tmp_path / "a", "north", "1" * 64, [ONE])
    (path,) = state.glob("*.ledger")
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RegistryUnusableError):
        _registry().overlaps(tmp_path / "b", [ONE])


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLOISTER_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(RegistryUnusableError):
        Registry.open()


def test_many_at_once_lose_nothing(tmp_path: Path, state: Path) -> None:
    def note(number: int) -> None:
        _registry().register(tmp_path / "a", "north", "", [("record", "", str(number))])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(40)))
    (entry,) = _registry().entries()
    assert len(entry.tags) == 40


def test_a_kill_while_it_is_written_leaves_the_file_as_it_was(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _registry().register(tmp_path / "a", "north", "", [ONE])
    before = {path.name: path.read_bytes() for path in state.glob("*.ledger")}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    registry = _registry()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.register(tmp_path / "a", "north", "", [TWO])
    assert {path.name: path.read_bytes() for path in state.glob("*.ledger")} == before
    _registry().register(tmp_path / "a", "north", "", [TWO])
    assert len(_registry().entries()[0].tags) == 2


def test_what_tells_a_ledger_and_whether_it_spent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert ledger_id(path) == ""
    assert not has_spending(path)
    ledger = Ledger.open(path, delta=1e-6)
    assert ledger_id(path) == ledger.hashes()[0]
    assert not has_spending(path)
    ledger.reserve("a" * 64, "r", Mechanism(10.0, 1.0), 5, 1e-5, 8.0, 8.0)
    assert has_spending(path)
    path.write_bytes(b"no ledger")
    assert ledger_id(path) == ""
    # Nobody can tell, so it may have.
    assert has_spending(path)
