"""The warnings of a summary: chance, and a model that was not measured."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.results.artifacts import (
    AT_CHANCE,
    CHANCE,
    NOT_MEASURED,
    NOT_RELEASED,
    warnings,
)
from cloister_fl.server.rounds.checkpoint import Figures, Released, RunState
from cloister_fl.server.rounds.run import Outcome
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from support import studies

TOLD = {CHANCE, NOT_MEASURED, NOT_RELEASED}
MASKS = studies.study(
    target={"kind": "segmentation", "segment": "lungs", "column": None, "classes": None},
    network={"name": "unet"},
)
RELEASING = studies.study(evaluation={"release_epsilon": 1.0})


def metrics(name: str, low: float) -> Metrics:
    return Metrics({name: Estimate(0.8, low, 0.9)}, 20, (12, 8))


def outcome(measured: Metrics | None, release: Released | None = None) -> Outcome:
    zeros = np.zeros(4, np.float32)
    state = RunState(
        run="ab" * 16,
        completed=1,
        model=zeros,
        optimizer=OptimizerState(zeros, zeros),
        figures=(Figures(0, 0, 0.0, 0.0), Figures(1, 5, 1.0, 0.1, metrics=measured)),
        invited=("a", "b", "c", "d", "e"),
        release=release,
    )
    return Outcome(state, state.invited, {})


@pytest.mark.parametrize(
    ("study", "measured", "release", "expected"),
    [
        (studies.study(), metrics("auroc", 0.51), None, set()),
        (studies.study(), metrics("auroc", 0.5), None, {CHANCE}),
        # A mask that is met half is no chance.
        (MASKS, metrics("dice", 0.1), None, set()),
        (studies.study(), None, None, {NOT_MEASURED}),
        (RELEASING, None, Released(("a",), 5, 1.0, metrics("auroc", 0.51)), set()),
        (RELEASING, None, Released(("a",), 5, 1.0, metrics("auroc", 0.4)), {CHANCE}),
        (RELEASING, None, Released(("a",)), {NOT_RELEASED}),
    ],
)
def test_what_a_reader_must_not_miss(
    study: Study, measured: Metrics | None, release: Released | None, expected: set[str]
) -> None:
    assert TOLD & set(warnings(study, outcome(measured, release))) == expected


def balanced(value: float, low: float, high: float) -> Metrics:
    figures = {"auroc": Estimate(0.8, 0.7, 0.9), "balanced_accuracy": Estimate(value, low, high)}
    return Metrics(figures, 200, (184, 16), 230)


def test_a_balanced_accuracy_at_chance_beside_a_good_auroc_is_told() -> None:
    """At 8 % prevalence it stayed at 0.500 through all rounds, without a word."""
    told = warnings(studies.study(), outcome(balanced(0.5, 0.5, 0.503)))
    assert AT_CHANCE in told
    assert not any("no width" in one for one in told)
    other = warnings(studies.study(), outcome(balanced(0.62, 0.55, 0.7)))
    assert not any(one.startswith(AT_CHANCE) for one in other)


def test_an_interval_without_width_is_told_with_its_patients() -> None:
    told = [
        one
        for one in warnings(studies.study(), outcome(balanced(1.0, 1.0, 1.0)))
        if "no width" in one
    ]
    assert len(told) == 1
    assert "The interval of balanced accuracy has no width: with 200 patients" in told[0]
