"""Server optimisers: against Flower's own strategies and against hand-made figures."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.errors import UpdateInvalid
from cloister_fl.server.rounds.strategies import OptimizerState, averaged, step, weighted_mean
from cloister_fl.server_strategies import STRATEGIES
from cloister_fl.study.schema import Aggregation

SIZE = 50


def _settings(strategy: str, **other: float) -> Aggregation:
    return Aggregation.model_validate({"strategy": strategy, **other})


def test_fedavg_adds_the_scaled_mean() -> None:
    settings = _settings("fedavg", server_learning_rate=0.5)
    model = np.array([1.0, -2.0], np.float32)
    mean = np.array([0.5, 0.25], np.float32)
    moved, _ = step(model, mean, OptimizerState.fresh(2, settings), settings)
    np.testing.assert_array_equal(moved, np.array([1.25, -1.875], np.float32))


@pytest.mark.parametrize(("name", "flower"), [("fedadam", FedAdam), ("fedyogi", FedYogi)])
def test_adaptive_strategies_equal_flowers_over_several_rounds(name: str, flower: type) -> None:
    theirs = flower(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    rng = np.random.default_rng(7)
    model = rng.normal(size=SIZE).astype(np.float32)
    state = OptimizerState.fresh(SIZE, _settings(name))
    for number in range(1, 6):
        rate = 0.1
        if name == "fedadam":
            # Flower corrects FedAdam's rate for the start, which algorithm 2 does not.
            rate *= np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        settings = _settings(name, server_learning_rate=rate, beta1=0.9, beta2=0.99, tau=1e-3)
        updates = [rng.normal(scale=0.1, size=SIZE).astype(np.float32) for _ in range(3)]
        theirs.current_arrays = {"0": model.copy()}
        answer, _ = theirs.aggregate_train(
            number, [_reply(model + update, node) for node, update in enumerate(updates)]
        )
        model, state = step(model, weighted_mean(updates, [1.0] * 3), state, settings)
        np.testing.assert_allclose(model, answer.to_numpy_ndarrays()[0], rtol=1e-3, atol=1e-4)


def _reply(array: np.ndarray, node: int) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    arrays = ArrayRecord({"0": Array(array)})
    records = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    request = Message(content=RecordDict(), dst_node_id=node + 2, message_type="train")
    return Message(content=records, reply_to=request)


def test_fedadam_follows_algorithm_2_by_hand() -> None:
    settings = _settings("fedadam", server_learning_rate=1.0, beta1=0.5, beta2=0.75, tau=0.5)
    model, mean = np.zeros(1, np.float32), np.array([2.0], np.float32)
    model, state = step(model, mean, OptimizerState.fresh(1, settings), settings)
    # m = 0.5 * 2 = 1; v = 0.25 * 4 = 1; step 1 / (1 + 0.5)
    np.testing.assert_allclose(model, [2 / 3], rtol=1e-6)
    model, state = step(model, mean, state, settings)
    # m = 1.5; v = 0.75 + 1 = 1.75
    np.testing.assert_allclose(model, [2 / 3 + 1.5 / (np.sqrt(1.75) + 0.5)], rtol=1e-6)


def test_fedyogi_moves_its_second_moment_by_the_sign() -> None:
    settings = _settings("fedyogi", server_learning_rate=1.0, beta1=0.0, beta2=0.5, tau=1.0)
    state = OptimizerState(np.zeros(1, np.float32), np.array([9.0], np.float32))
    _, state = step(np.zeros(1, np.float32), np.array([2.0], np.float32), state, settings)
    # v = 9 - 0.5 * 4 * sign(9 - 4) = 7
    np.testing.assert_allclose(state.second, [7.0])


@pytest.mark.parametrize("bad", [np.array([np.nan], np.float32), np.array([np.inf], np.float32)])
def test_a_mean_that_is_not_finite_is_refused(bad: np.ndarray) -> None:
    settings = _settings("fedavg")
    with pytest.raises(UpdateInvalid, match="CLO-403"):
        step(np.zeros(1, np.float32), bad, OptimizerState.fresh(1, settings), settings)


def test_a_mean_of_another_length_is_refused() -> None:
    settings = _settings("fedavg")
    state = OptimizerState.fresh(2, settings)
    with pytest.raises(UpdateInvalid, match="another length"):
        step(np.zeros(2, np.float32), np.zeros(3, np.float32), state, settings)


def test_the_moving_average_weighs_rounds_as_it_says() -> None:
    models = [np.array([value, -value], np.float32) for value in (1.0, 2.0, 4.0)]
    average = np.full(2, 77.0, np.float32)
    for rounds, model in enumerate(models, start=1):
        average = averaged(average, model, 0.5, rounds)
        if rounds == 1:
            np.testing.assert_array_equal(average, model)
    # (0.25 x 1 + 0.5 x 2 + 4) / 1.75
    np.testing.assert_allclose(average, [3.0, -3.0], rtol=1e-6)


def test_weighted_mean_uses_the_public_weights() -> None:
    updates = [np.array([1.0, 0.0], np.float32), np.array([4.0, 8.0], np.float32)]
    np.testing.assert_allclose(weighted_mean(updates, [2.0, 1.0]), [2.0, 8 / 3], rtol=1e-6)


def test_weighted_mean_sums_in_double_precision() -> None:
    updates = [np.array([1e8], np.float32), np.array([1.0], np.float32)]
    updates.append(np.array([-1e8], np.float32))
    np.testing.assert_allclose(weighted_mean(updates, [1.0] * 3), [1 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_a_study_has_a_step(name: str) -> None:
    other = {"proximal_mu": 0.1} if name == "fedprox" else {}
    settings = _settings(name, **other)
    model = np.zeros(2, np.float32)
    moved, _ = step(model, np.ones(2, np.float32), OptimizerState.fresh(2, settings), settings)
    assert (moved > 0).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_keeps_what_a_checkpoint_has_a_place_for(name: str) -> None:
    settings = _settings(name, **({"proximal_mu": 0.1} if name == "fedprox" else {}))
    rng = np.random.default_rng(3)
    model, mean = rng.normal(size=(2, SIZE)).astype(np.float32)
    fresh = OptimizerState.fresh(SIZE, settings)
    kept = STRATEGIES[name].moments
    sizes = (SIZE if kept > 0 else 0, SIZE if kept > 1 else 0)
    before = [one.copy() for one in (model, mean, fresh.first, fresh.second)]
    moved, state = step(model, mean, fresh, settings)
    moved, state = step(moved, mean, state, settings)
    for one in (moved, state.first, state.second):
        assert one.dtype == np.float32
    assert (fresh.first.size, fresh.second.size) == sizes
    assert (state.first.size, state.second.size) == sizes
    for one, old in zip((model, mean, fresh.first, fresh.second), before, strict=True):
        np.testing.assert_array_equal(one, old)
