"""A hold-out is divided by patients, each once, and each part has every label."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.tasks.divided_holdout import Holdout, HoldoutPatient, HoldoutUnit, division
from support import studies
from support.holdouts import holdout_patients

TASK = studies.study().task


@given(st.lists(st.integers(0, 2), max_size=40))
def test_half_of_each_label_chooses_and_no_part_lacks_one(labels: list[int]) -> None:
    chosen = division(holdout_patients(labels))
    assert len(chosen) == len(labels)
    counts = {label: labels.count(label) for label in set(labels)}
    if any(count < 2 for count in counts.values()):
        assert not any(chosen)
        return
    for label, count in counts.items():
        of_label = [yes for yes, one in zip(chosen, labels, strict=True) if one == label]
        assert sum(of_label) == count // 2


@given(st.permutations(range(12)))
def test_who_chooses_follows_the_images_and_not_the_order(order: list[int]) -> None:
    given_in_order = holdout_patients([0, 1] * 6)
    chosen = division(given_in_order)
    moved = [given_in_order[place] for place in order]
    assert division(moved) == tuple(chosen[place] for place in order)


def test_each_part_is_measured_on_its_own_patients() -> None:
    held = holdout_patients([0, 1] * 10, images=2)
    # Right for who chooses, wrong for the others.
    right = np.array([one.label for one in held]) == 1
    told = np.where(division(held), right, ~right).astype(float)
    holdout = Holdout(TASK, held, lambda model: np.stack([1 - told, told], axis=1))
    found = holdout.measure(np.zeros(1, np.float32))
    assert found.selecting is not None
    assert found.selecting.auroc is not None
    assert found.reported.auroc is not None
    assert (found.selecting.auroc.value, found.reported.auroc.value) == (1.0, 0.0)
    assert (found.reported.patients, found.reported.images) == (10, 20)
    assert holdout.part(selecting=True).class_counts == (5, 5)


def test_a_label_of_one_patient_leaves_the_hold_out_whole() -> None:
    held = holdout_patients([0, 0, 0, 1])
    holdout = Holdout(TASK, held, lambda model: np.full((4, 2), 0.5))
    assert not holdout.is_divided
    found = holdout.measure(np.zeros(1, np.float32))
    assert found.selecting is None
    assert found.reported.patients == 4


def test_groups_do_not_move_anybody() -> None:
    held = holdout_patients([0, 1] * 4)
    told = tuple(dataclasses.replace(one, groups={"sex": "F"}) for one in held)
    assert division(held) == division(told)


def test_a_patient_is_in_one_part_with_all_units() -> None:
    examinations = studies.study(target={"unit": "examination"}).task
    units = tuple(HoldoutUnit(label, 3) for label in (0, 1, 0))
    held = tuple(HoldoutPatient(f"p{i}", 1, units, f"mark {i}") for i in range(6))
    told = np.array([0.2, 0.9, 0.4] * 6)
    holdout = Holdout(examinations, held, lambda model: np.stack([1 - told, told], axis=1))
    assert len(holdout.labels) == 18
    part = holdout.part(selecting=True)
    assert (part.patients, part.images, part.class_counts) == (3, 27, (6, 3))
    found = holdout.measure(np.zeros(1, np.float32))
    assert found.selecting is not None
    assert (found.reported.patients, found.reported.images) == (3, 27)
    assert found.reported.class_counts == (6, 3)
    assert found.reported.auroc is not None
    assert found.reported.auroc.value == 1.0
    owners = set(holdout.owners[holdout.places(selecting=True)])
    assert owners.isdisjoint(holdout.owners[holdout.places(selecting=False)])
