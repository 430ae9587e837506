"""The error with which ``cloister server run`` ends: the one that the run executor recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.errors import DataError, RunStopped, TooFewSites
from cloister_fl.server.cli.run_commands import _ended
from cloister_fl.server.coordinator.run_queue import RunFolder, Status


@pytest.mark.parametrize(
    ("code", "family", "shown"),
    [
        ("CLO-203", DataError, "CLO-203"),
        ("CLO-501", TooFewSites, "CLO-501"),
        ("", RunStopped, "CLO-507"),
    ],
)
def test_the_end_of_a_run_has_the_code_and_exit_status_of_its_error(
    tmp_path: Path, code: str, family: type[DataError | TooFewSites | RunStopped], shown: str
) -> None:
    status = Status(state="failed", told="It ended so.", code=code)
    error = _ended(RunFolder(tmp_path / "runs" / "lungs-1"), tmp_path, status)
    assert type(error) is family
    assert error.exit_status == family.exit_status
    assert str(error).startswith(f"{shown}: The run lungs-1 ended: It ended so. ")
