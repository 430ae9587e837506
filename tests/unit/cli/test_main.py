"""The root command: quick, and honest about how it ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from cloister_fl.cli import main
from cloister_fl.errors import BudgetExhausted, CloisterError, TooFewSites
from cloister_fl.study.file import parse_study
from cloister_fl.version import __version__

pytestmark = pytest.mark.process


HEAVY = ("torch", "flwr", "opacus", "pydicom", "numpy", "matplotlib", "monai", "ray")


def end(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line: exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(arguments))
    told = capsys.readouterr()
    status = caught.value.code
    return (0 if status is None else int(status)), told.out, told.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Add a command, `cloister act`, that does what the test says."""

    def add(act: Callable[[], None]) -> None:
        real = main.own_entry_points

        class Fake:
            name = "act"

            def load(self) -> Callable[[], None]:
                return act

        monkeypatch.setattr(main, "own_entry_points", lambda group: [*real(group), Fake()])

    return add


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


# Quick


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys; from cloister_fl.cli import main as cli; app = cli.build();"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    start = time.monotonic()
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert time.monotonic() - start < 15  # under a second on an idle core


def test_a_study_is_checked_where_only_the_base_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    code = (
        "import sys; from cloister_fl.cli import main as cli\n"
        "for what in ('new', 'check'):\n"
        "    try: cli.main(['study', what, sys.argv[1]])\n"
        "    except SystemExit as end: assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = run("-c", code, str(file))
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_as_a_process() -> None:
    done = run("-m", "cloister_fl.cli.main", "--help")
    assert done.returncode == 0
    assert "no image leaves its hospital" in done.stdout
    assert "study" in done.stdout
    assert done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(capsys, "--version") == (0, f"cloister {__version__}\n", "")


def test_groups_stand_in_a_fixed_order() -> None:
    names = ["verify", "zebra", "study", "simulate", "apple", "demo"]
    entries = [EntryPoint(name, "x:y", main.GROUP) for name in names]
    ordered = [entry.name for entry in sorted(entries, key=main._position)]
    assert ordered == ["demo", "simulate", "study", "verify", "apple", "zebra"]


# Bad command lines


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["no-such-command"],
        ["study", "no-such-command"],
        ["study", "check", "--no-such-option"],
        ["study", "check", "one.toml", "two.toml"],
    ],
)
def test_a_bad_command_line_gives_usage_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    status, out, err = end(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert "Usage: cloister" in err
    assert "Traceback" not in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = end(capsys)
    assert status == 2
    assert "Usage: cloister" in out + err


# How commands end


@pytest.mark.parametrize("error", [BudgetExhausted("No."), TooFewSites("No.")])
def test_an_intended_error_prints_its_message_and_its_page(
    capsys: pytest.CaptureFixture[str], command: Callable[..., None], error: CloisterError
) -> None:
    def act() -> None:
        raise error

    command(act)
    status, out, err = end(capsys, "act")
    assert status == error.exit_status
    assert out == ""
    assert err == f"{error.code}: No.\nMore: cloister explain {error.code}\n"


class _Odd(Exception):
    pass


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, RecursionError, _Odd])
def test_an_unexpected_error_is_901_without_its_text(
    capsys: pytest.CaptureFixture[str],
    command: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
) -> None:
    monkeypatch.delenv("CLOISTER_TRACEBACK", raising=False)

    def act() -> None:
        try:
            raise kind("inner Doe^Jane")
        except kind as inner:
            raise kind("Doe^Jane 4711") from inner

    command(act)
    status, out, err = end(capsys, "act")
    assert status == 70
    assert out == ""
    assert "CLO-901" in err
    assert kind.__name__ in err
    assert "Doe" not in err
    assert "4711" not in err
    assert "Traceback" not in err


def test_a_developer_may_ask_for_the_traceback(
    capsys: pytest.CaptureFixture[str],
    command: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOISTER_TRACEBACK", "1")

    def act() -> None:
        raise ValueError("the text")

    command(act)
    status, _, err = end(capsys, "act")
    assert status == 70
    assert "ValueError: the text" in err


def test_a_group_that_cannot_be_loaded_is_901(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("broken", "cloister_no_such_module:app", main.GROUP)
    monkeypatch.setattr(main, "own_entry_points", lambda group: [broken])
    status, _, err = end(capsys, "--help")
    assert status == 70
    assert "CLO-901" in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_and_a_read_only_file_system_are_no_internal_error(
    capsys: pytest.CaptureFixture[str], command: Callable[..., None], number: int
) -> None:
    def act() -> None:
        raise OSError(number, "whatever", "/data/Doe^Jane")

    command(act)
    status, _, err = end(capsys, "act")
    assert status == 2
    assert err.startswith(f"CLO-104: A file cannot be written or read. {os.strerror(number)}.")
    assert "df -h" in err
    assert "Doe" not in err


def test_an_interrupt_ends_with_130(
    capsys: pytest.CaptureFixture[str], command: Callable[..., None]
) -> None:
    def act() -> NoReturn:
        raise KeyboardInterrupt

    command(act)
    status, _, err = end(capsys, "act")
    assert status == 130
    assert "Traceback" not in err


def test_a_commands_own_status_is_kept(
    capsys: pytest.CaptureFixture[str], command: Callable[..., None]
) -> None:
    def act() -> None:
        raise typer.Exit(3)

    command(act)
    assert end(capsys, "act")[0] == 3


def test_flower_is_told_to_stay_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        # Set first, so that whatever the command leaves is undone after the test.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    end(capsys, "--version")
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


# cloister study


def test_new_then_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = end(capsys, "study", "new")
    assert status == 0
    assert "cloister study check study.toml" in out
    study = parse_study((tmp_path / "study.toml").read_text())
    status, out, err = end(capsys, "study", "check")
    assert (status, err) == (0, "")
    assert study.digest in out
    assert "patient-level differential privacy, epsilon 3 at delta 1e-05" in out


def test_new_replaces_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("mine")
    status, _, err = end(capsys, "study", "new", str(file))
    assert status == 2
    assert err.startswith("CLO-104")
    assert file.read_text() == "mine"
    status, _, err = end(capsys, "study", "new", str(tmp_path / "none" / "study.toml"))
    assert status == 2
    assert "No such file or directory." in err


def test_check_tells_all_faults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('[study]\nname = "a"\n[training]\nround = 1\n')
    status, out, err = end(capsys, "study", "check", str(file))
    assert (status, out) == (2, "")
    assert err.startswith("CLO-101: study.toml has 3 faults:\n")
    assert "Did you mean 'rounds'?" in err
    status, out, err = end(capsys, "study", "check", "--json", str(file))
    assert (status, err) == (2, "")
    told = json.loads(out)
    assert (told["valid"], told["code"]) == (False, "CLO-101")
    assert [fault["line"] for fault in told["faults"]] == [0, 1, 4]


def test_check_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    end(capsys, "study", "new", str(file))
    status, out, _ = end(capsys, "study", "check", "--json", str(file))
    told = json.loads(out)
    assert status == 0
    assert told["valid"] is True
    assert told["hash"] == parse_study(file.read_text()).digest
    assert told["study"]["training"]["rounds"] == 20


def test_check_says_loudly_that_privacy_is_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "study.toml"
    end(capsys, "study", "new", str(file))
    file.write_text(file.read_text().replace("# enabled = true", "enabled = false"))
    _, out, _ = end(capsys, "study", "check", str(file))
    assert "NO differential privacy" in out


RAISED = "min_sites is 1, and secure aggregation needs colluders + 3"


@pytest.mark.parametrize(
    ("aggregation", "fewest"),
    [
        ("min_sites = 7", "7"),
        ("min_sites = 1", f"4: {RAISED}"),
        ("min_sites = 1\ncolluders = 0", f"3: {RAISED}"),
        ("min_sites = 1\ncolluders = 4", f"7: {RAISED}"),
        ("min_sites = 1\nsecure = false", "1"),
    ],
)
def test_check_says_how_few_sites_can_train_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, aggregation: str, fewest: str
) -> None:
    file = tmp_path / "study.toml"
    end(capsys, "study", "new", str(file))
    head = file.read_text().partition("[training]")[0]
    file.write_text(f"{head}[training]\nrounds = 1\n[aggregation]\n{aggregation}\n")
    _, out, _ = end(capsys, "study", "check", str(file))
    assert f"at least {fewest}\n" in out
    assert "1 round of 1 step, " in out


def test_a_missing_file_is_103(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = end(capsys, "study", "check", str(tmp_path / "none.toml"))
    assert status == 2
    assert err.startswith("CLO-103: none.toml cannot be read.")


# What a person sees


def test_an_interrupt_says_what_happened(
    capsys: pytest.CaptureFixture[str], command: Callable[[Callable[[], None]], None]
) -> None:
    def act() -> None:
        raise KeyboardInterrupt

    command(act)
    status, _, err = end(capsys, "act")
    assert status == 130
    assert err.strip() == "Stopped."


@pytest.mark.parametrize(
    "arguments", [(), ("simulate",), ("demo",), ("predict",), ("study", "new"), ("client", "check")]
)
def test_help_holds_no_stray_backslash(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    status, out, _ = end(capsys, *arguments, "--help")
    assert status == 0
    assert "\\[" not in out


def test_a_wrong_option_ends_with_2_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = end(capsys, "simulate", "--nonsense")
    assert status == 2
    assert "--help" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("code", ["CLO-104", "clo-104", "104", "CLO-210"])
def test_explain_shows_the_page(capsys: pytest.CaptureFixture[str], code: str) -> None:
    status, out, _ = end(capsys, "explain", code)
    assert status == 0
    assert out.startswith("# CLO-104" if "210" not in code else "# CLO-210")


@pytest.mark.parametrize("code", ["CLO-999", "nonsense", "../../README", ""])
def test_explain_of_no_code_is_a_named_error(capsys: pytest.CaptureFixture[str], code: str) -> None:
    status, _, err = end(capsys, "explain", code)
    assert status == 2
    assert err.startswith("CLO-106: ")
