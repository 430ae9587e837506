"""Which model a run hands out, and when it stops for want of a better one."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.errors import OptionInvalid
from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.rounds.checkpoint import Figures, RunState
from cloister_fl.server.rounds.model_choice import (
    best_round,
    chosen,
    delivered,
    is_stalled,
    require_who_chooses,
)
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from cloister_fl.tasks.divided_holdout import Holdout
from support import studies
from support.errors import raises
from support.holdouts import holdout_patients

STUDY = studies.study(training="rounds = 9", evaluation={"stop_after": 2})


def metrics(value: float) -> Metrics:
    return Metrics({"auroc": Estimate(value, 0.0, 1.0)}, 10, (5, 5))


def run(study: Study, *values: float | None, initial: float = 0.5) -> RunState:
    """The state after rounds whose models have these values on the patients who choose."""
    empty = OptimizerState(np.zeros(0, np.float32), np.zeros(0, np.float32))
    state = RunState("ab", 0, np.zeros(2, np.float32), empty)
    for number, value in enumerate((initial, *values)):
        told = None if value is None else metrics(value)
        figures = Figures(number, 5, 1.0, 1.0, metrics=metrics(0.9), selecting=told)
        state = RunState(
            **{
                **vars(state),
                "completed": number,
                "model": np.full(2, number, np.float32),
                "figures": (*state.figures, figures),
            }
        )
        state = chosen(study, state)
    return state


def test_the_model_of_the_best_round_is_delivered_and_the_reason_told() -> None:
    state = run(STUDY, 0.7, 0.955, 0.8, 0.495)
    found = delivered(STUDY, state)
    assert found.figures.round == 2
    np.testing.assert_array_equal(found.model, np.full(2, 2, np.float32))
    assert "that of round 2 had the best AUROC (0.955) on the 10 patients" in found.why


def test_the_earliest_of_equals_stays_and_nobody_hands_out_the_untrained_model() -> None:
    assert run(STUDY, 0.7, 0.7).best_round == 1
    assert run(STUDY, 0.4, 0.3, initial=0.99).best_round == 1


def test_of_equal_headlines_the_next_figure_decides() -> None:
    def told(number: int, called: float) -> Figures:
        figures = {"auroc": Estimate(1.0, 1.0, 1.0), "auprc": Estimate(1.0, 1.0, 1.0)}
        selecting = Metrics(
            {**figures, "balanced_accuracy": Estimate(called, 0.0, 1.0)}, 10, (5, 5)
        )
        return Figures(number, 5, 1.0, 1.0, selecting=selecting)

    # Where a class is rare, AUROC is 1 long before a patient is called at 0.5.
    rows = [told(1, 0.5), told(2, 0.9), told(3, 0.9), told(4, 0.7)]
    assert best_round(STUDY, rows) == 2


def test_what_is_reported_does_not_choose() -> None:
    state = run(STUDY, None, None)
    assert state.best_round == 0
    assert delivered(STUDY, state).figures.round == 2
    assert delivered(STUDY, state).why.startswith("The last model")


@pytest.mark.parametrize(
    ("values", "stalled"),
    [((0.7, 0.6), False), ((0.7, 0.6, 0.7), True), ((0.7, 0.6, 0.8), False), ((0.7, None), False)],
)
def test_a_run_stalls_after_so_many_evaluations(
    values: tuple[float | None, ...], stalled: bool
) -> None:
    assert is_stalled(STUDY, run(STUDY, *values)) is stalled
    without = studies.study(training="rounds = 9")
    assert not is_stalled(without, run(without, *values))


def test_a_study_that_stops_by_a_hold_out_needs_one_that_can_choose() -> None:
    with raises(OptionInvalid, match="needs a hold-out, and none was named"):
        require_who_chooses(STUDY, None)
    few = holdout_patients(range(2))
    with raises(OptionInvalid, match="two patients of each label"):
        require_who_chooses(STUDY, Holdout(STUDY.task, few, lambda model: np.zeros((2, 2))))
    require_who_chooses(studies.study(), None)
