"""The toy of docs/guides/add-a-strategy.md: a study names it, a federation trains with it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM
from flwr.supercore.task_identity import TaskIdentity
from safetensors import safe_open

from cloister_fl.cli.study_commands import app
from cloister_fl.errors import StudyInvalid
from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from cloister_fl.server.rounds.events import Event, Measured
from cloister_fl.server.rounds.strategies import OptimizerState, step
from cloister_fl.server_strategies import STRATEGIES
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Aggregation, Study
from support import studies
from support.commands import invoke
from support.federations import study, write_federation
from toys.fedavgm import AGGREGATION, ROW

TABLE = tomllib.loads(AGGREGATION)["aggregation"]
OPEN = {"enabled": False}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands in the product's table."""
    monkeypatch.setitem(STRATEGIES, ROW.name, ROW)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("fedavgm") / "sites", patients=20, images=1)


def test_the_product_does_not_offer_it(tmp_path: Path) -> None:
    with pytest.raises(StudyInvalid, match="must be one of fedavg, "):
        studies.study(aggregation=TABLE)


@pytest.mark.usefixtures("added")
def test_study_check_accepts_it(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f"{studies.study_text()}\n{AGGREGATION}")
    said = invoke(app, "check", file)
    assert said.exit_code == 0
    assert "  sites      fedavgm, at least 5" in said.stdout
    assert studies.study(aggregation=TABLE).digest in said.stdout


@pytest.mark.usefixtures("added")
def test_its_step_by_hand() -> None:
    settings = Aggregation.model_validate(TABLE)
    model, mean = np.zeros(1, np.float32), np.array([2.0], np.float32)
    model, state = step(model, mean, OptimizerState.fresh(1, settings), settings)
    # m = 2; 0.5 x 2
    np.testing.assert_allclose(model, [1.0], rtol=1e-6)
    model, state = step(model, mean, state, settings)
    # m = 0.8 x 2 + 2 = 3.6; 1 + 0.5 x 3.6
    np.testing.assert_allclose(model, [2.8], rtol=1e-6)
    np.testing.assert_allclose(state.first, [3.6], rtol=1e-6)
    assert state.second.size == 0


@pytest.mark.usefixtures("added")
def test_its_steps_are_those_of_another_implementation() -> None:
    settings = Aggregation.model_validate(TABLE)
    theirs = FedAvgM(server_learning_rate=0.5, server_momentum=0.8)
    rng = np.random.default_rng(7)
    model = rng.normal(size=40).astype(np.float32)
    theirs.current_arrays = ArrayRecord({"0": Array(model.copy())})
    state = OptimizerState.fresh(40, settings)
    for number in range(1, 6):
        mean = rng.normal(scale=0.1, size=40).astype(np.float32)
        # It is given models, and takes the difference from its own.
        mine = theirs.current_arrays.to_numpy_ndarrays()[0]
        answer, _ = theirs.aggregate_train(number, [_reply(mine + mean)])
        model, state = step(model, mean, state, settings)
        np.testing.assert_allclose(model, answer.to_numpy_ndarrays()[0], rtol=1e-4, atol=1e-5)


def _reply(array: np.ndarray) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = {
        "arrays": ArrayRecord({"0": Array(array.astype(np.float32))}),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    request = Message(content=RecordDict(), dst_node_id=2, message_type="train")
    return Message(content=RecordDict(records), reply_to=request)


def _weights(out: Path) -> dict[str, bytes]:
    with safe_open(out / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _asked(**aggregation: object) -> Study:
    return study(privacy=OPEN, aggregation={**TABLE, **aggregation})


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_a_federation_trains_with_it(sites: Path, tmp_path: Path) -> None:
    for name, asked in (
        ("momentum", _asked()),
        ("none", _asked(beta1=0.0)),
        ("fedavg", study(privacy=OPEN, aggregation={"server_learning_rate": 0.5})),
    ):
        summary = run_simulation(Simulation(asked, sites, tmp_path / name))
        assert summary["rounds"] == 3
        assert summary["secure_aggregation"] is True
    # Without momentum it is FedAvg to the bit; with it, it is not.
    assert _weights(tmp_path / "none") == _weights(tmp_path / "fedavg")
    assert _weights(tmp_path / "momentum").keys() == _weights(tmp_path / "none").keys()
    assert _weights(tmp_path / "momentum") != _weights(tmp_path / "none")
    state, _ = Checkpoints(tmp_path / "momentum" / CHECKPOINT_FOLDER).load(_asked())
    assert state.optimizer.first.shape == state.model.shape
    assert state.optimizer.first.any()
    assert state.optimizer.second.size == 0


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_its_momentum_is_kept_over_a_crash(sites: Path, tmp_path: Path) -> None:
    def die(event: Event) -> None:
        if isinstance(event, Measured) and event.figures.round == 2:
            raise Killed

    run_simulation(Simulation(_asked(), sites, tmp_path / "whole"))
    with pytest.raises(Killed):
        run_simulation(Simulation(_asked(), sites, tmp_path / "cut"), notify=die)
    run_simulation(Simulation(_asked(), sites, tmp_path / "cut", resume=True))
    assert _weights(tmp_path / "cut") == _weights(tmp_path / "whole")
