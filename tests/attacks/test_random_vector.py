"""A hospital that sends a random element of the ring in place of its masked vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloister_fl.client import app
from cloister_fl.errors import SumOutsideBound
from cloister_fl.secagg import participant_epoch
from cloister_fl.server.results.audit_report import account
from cloister_fl.server.rounds.checkpoint import Checkpoints
from cloister_fl.server.rounds.events import Event, Lost
from cloister_fl.simulation.run_folder import FEDERATION
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.errors import raises
from support.federations import NAMES, study, write_federation
from support.message_tap import charges

STUDY = study(training="rounds = 4\nsteps = 1\nsampling_rate = 1.0")
HOSTILE = "esche"
_MARK = np.float32(0.015625)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("ring") / "sites", patients=20, images=1)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The rounds in which the hostile hospital signs and sends a random element of the ring."""
    rounds: set[int] = set()
    trained, encoded = app._trained, participant_epoch.encode_into

    def marked(kept: Any, session: Any, admission: Any, network: Any, number: int) -> Any:
        vector = trained(kept, session, admission, network, number)
        if session.site.name == HOSTILE and number in rounds:
            return np.full_like(vector, _MARK)
        return vector

    def random(out: NDArray[np.uint32], values: NDArray[Any], **how: Any) -> None:
        encoded(out, values, **how)
        if (values == _MARK).all():
            out[:] = np.random.default_rng(0).integers(0, 2**32, out.size, dtype=np.uint32)

    monkeypatch.setattr(app, "_trained", marked)
    monkeypatch.setattr(participant_epoch, "encode_into", random)
    return rounds


def test_a_random_ring_element_does_not_spoil_a_round_unnoticed(
    sites: Path, tmp_path: Path, spoil: set[int]
) -> None:
    out, told = tmp_path / "run", list[Event]()
    spoil.add(2)
    summary = run_simulation(Simulation(STUDY, sites, out), notify=told.append)
    assert (summary["rounds"], summary["rounds_lost"]) == (4, [2])
    assert summary["rounds_discarded"] == [2]
    assert any("honest sites can send: 2." in one for one in summary["warnings"])  # type: ignore[attr-defined]
    assert Lost(2, is_discarded=True) in told
    # Charged at everybody, and the rounds after it have a model that is none the worse.
    for name in NAMES:
        assert charges(out, name) == [1, 2, 3, 4]
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 3, 4]
    norms = {row["round"]: row["update_norm"] for row in rows}
    assert norms[3] < 3 * norms[1]
    (run,) = account(out / FEDERATION / "audit.jsonl").runs
    assert (run.summed, run.lost, run.discarded, run.ended) == ([1, 3, 4], [], [2], "done")


def test_two_such_rounds_in_a_row_end_the_run_for_the_stewards_to_decide(
    sites: Path, tmp_path: Path, spoil: set[int]
) -> None:
    out = tmp_path / "run"
    spoil.update((2, 3))
    with raises(SumOutsideBound, match="rounds 2 and 3"):
        run_simulation(Simulation(STUDY, sites, out))
    state, _ = Checkpoints(out / "checkpoint").load(STUDY)
    assert (state.completed, state.lost, state.discarded) == (3, (2, 3), (2, 3))
    assert charges(out, "anker") == [1, 2, 3]
    # They decided: it goes on with the next round, and the model of round 1.
    summary = run_simulation(Simulation(STUDY, sites, out, resume=True))
    assert summary["rounds_discarded"] == [2, 3]
    assert charges(out, "anker") == [1, 2, 3, 4]


@pytest.mark.slow
def test_spoilt_rounds_that_are_not_in_a_row_end_nothing(
    sites: Path, tmp_path: Path, spoil: set[int]
) -> None:
    spoil.update((1, 3))
    summary = run_simulation(Simulation(STUDY, sites, tmp_path / "run"))
    assert summary["rounds_discarded"] == [1, 3]
