"""The warnings of a summary: chance, and a model that was not measured."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.results.artifacts import CHANCE, NOT_MEASURED, NOT_RELEASED, warnings
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
