"""How many modules and functions of ours a train message goes through: ``scripts/trace``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    known = sys.modules.pop("trace", None)  # The standard library has one, too.
    yield
    sys.modules.pop("trace", None)
    if known is not None:
        sys.modules["trace"] = known


def test_a_train_message_goes_through_few_modules_and_functions(
    scripts: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trace

    monkeypatch.setattr(sys, "argv", ["trace", "--names"])
    status = trace.main()  # type: ignore[attr-defined]
    told = capsys.readouterr().out
    for step in (
        "answer",
        "Exchange.open",
        "charge",
        "Ledger.start_round",
        "SiteSession.note",
        "train_round",
        "Exchange.mask",
        "SiteEpoch.mask",
        "_logged",
    ):
        assert f"        {step}\n" in told or f".{step}\n" in told, step
    # Threads, too: the masks are drawn in one.
    assert "_apply_from\n" in told
    assert "_compare\n" not in told
    assert status == 0, told.splitlines()[-1]
