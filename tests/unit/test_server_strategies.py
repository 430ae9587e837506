"""Each row of the table of strategies is a study's, takes what it says, and is documented."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.errors import StudyInvalid
from cloister_fl.server_strategies import MOST_MOMENTS, STRATEGIES
from cloister_fl.study.schema import Aggregation, Study, study_from_canonical
from support import studies

ROOT = Path(__file__).parents[2]
PROXIMAL = {"proximal_mu": 0.1}
OTHER = {"server_learning_rate": 0.5, "beta1": 0.5, "beta2": 0.5, "tau": 0.5}
"""For each parameter another value than the default."""


def _asked(name: str) -> Study:
    more = PROXIMAL if STRATEGIES[name].proximal else {}
    return studies.study(aggregation={"strategy": name, **more})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_study_may_name_it(name: str) -> None:
    asked = _asked(name)
    assert asked.aggregation.strategy == name == STRATEGIES[name].name
    assert study_from_canonical(asked.canonical()) == asked


@pytest.mark.parametrize("name", STRATEGIES)
def test_its_parameters_are_keys_of_a_study_and_change_its_step(name: str) -> None:
    row = STRATEGIES[name]
    assert {*row.parameters} <= {*Aggregation.model_fields} & {*OTHER}
    named = inspect.signature(row.step).parameters.values()
    assert {one.name for one in named if one.kind is one.KEYWORD_ONLY} == {*row.parameters}
    rng = np.random.default_rng(1)
    model, mean, *moments = np.abs(rng.normal(size=(2 + MOST_MOMENTS, 9))).astype(np.float32)
    kept = tuple(moments[: row.moments])
    usual = {key: np.float32(getattr(Aggregation(), key)) for key in row.parameters}
    moved, after = row.step(model, mean, kept, **usual)
    assert len(after) == row.moments <= MOST_MOMENTS
    for key in row.parameters:
        other, _ = row.step(model, mean, kept, **{**usual, key: np.float32(OTHER[key])})
        assert not np.allclose(moved, other), key


def test_no_name_goes_that_a_study_was_approved_with() -> None:
    assert {"fedavg", "fedprox", "fedadam", "fedyogi"} <= STRATEGIES.keys()
    assert Aggregation().strategy == "fedavg"
    assert STRATEGIES["fedprox"].proximal


@pytest.mark.parametrize("name", ["no-such-strategy", "FedAvg", "fedavg ", ""])
def test_another_name_is_a_fault_of_the_study(name: str) -> None:
    with pytest.raises(StudyInvalid, match=f"must be one of {', '.join(STRATEGIES)}"):
        studies.study(aggregation={"strategy": name})
    text = _asked("fedavg").canonical().replace('"fedavg"', json.dumps(name))
    with pytest.raises(StudyInvalid):
        study_from_canonical(text)


def test_a_strategy_that_another_version_has_is_refused_in_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = _asked("fedadam").canonical()
    monkeypatch.delitem(STRATEGIES, "fedadam")
    with pytest.raises(StudyInvalid, match="Install the same version"):
        study_from_canonical(theirs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_is_documented(name: str) -> None:
    example = (ROOT / "common/cloister_fl/study/example_study.toml").read_text("utf-8")
    (line,) = (line for line in example.splitlines() if line.startswith("# strategy = "))
    assert name in line.replace(",", " ").split()
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    assert f"`{name}`" in next(x for x in glossary.splitlines() if x.startswith("**strategy.**"))


@pytest.mark.process
def test_a_study_is_checked_without_numpy() -> None:
    code = "import sys, cloister_fl.study.schema; print('numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
