"""A study with some keys changed is judged as a file is."""

from __future__ import annotations

import pytest

from cloister_fl.errors import StudyInvalid
from cloister_fl.study import load, privacy_cost, replace
from cloister_fl.study.cost import charges
from support.studies import study


def test_it_is_the_study_that_a_file_with_these_keys_would_give() -> None:
    asked = study(training={"rounds": 7, "epochs": 2}, privacy={"epsilon": 2.0})
    changed = replace(asked, privacy={"epsilon": 1.0}, training={"rounds": 4})
    assert changed == study(training={"rounds": 4, "epochs": 2}, privacy={"epsilon": 1.0})
    assert (
        changed.digest == study(training={"rounds": 4, "epochs": 2}, privacy={"epsilon": 1}).digest
    )
    assert (asked.privacy.epsilon, asked.training.rounds) == (2.0, 7)


def test_nothing_changed_is_the_same_study() -> None:
    segments = study(
        target={"kind": "segmentation", "segment": "Lung", "column": None, "classes": None},
        network={"name": "unet"},
    )
    for asked in (study(), segments):
        assert replace(asked).digest == asked.digest
        assert replace(asked, training={}).digest == asked.digest


def test_a_key_with_none_has_its_default_again() -> None:
    assert replace(study(training={"steps": 9}), training={"steps": None}).training.steps == 1
    changed = replace(study(training={"steps": 9}), training={"steps": None, "epochs": 2.0})
    assert (changed.training.steps, changed.training.epochs) == (None, 2.0)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(StudyInvalid) as caught:
        replace(study(), privcy={}, training={"rounds": -1, "epochs": 2.0}, study={"name": "A B"})
    assert [fault.key for fault in caught.value.faults] == [
        *("privcy", "study.name", "training.epochs", "training.rounds")
    ]
    assert {fault.line for fault in caught.value.faults} == {0}
    assert "CLO-101: The changed study has 4 faults:" in str(caught.value)
    assert "Did you mean 'privacy'?" in str(caught.value)


def test_a_network_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StudyInvalid, match=r"The changed study has 1 fault:\n  network\.name: .*3"):
        replace(study(), network={"name": "small-cnn-3d"})


def test_engines_that_a_file_may_not_name_are_refused() -> None:
    with pytest.raises(StudyInvalid, match=r"training\.engine"):
        replace(study(), training={"engine": "book-keeping"})


def test_a_path_may_be_a_string(tmp_path: object) -> None:
    asked = load("docs/studies/pneumonia.toml")
    assert asked.study.name == "pneumonia"


def test_the_cost_is_that_of_the_charges_and_none_without_privacy() -> None:
    assert privacy_cost(study()) == charges(study())
    assert privacy_cost(study(privacy={"enabled": False})) is None
