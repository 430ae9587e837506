"""What a report says of a hold-out: calls, classes, groups, scores; each with its patients."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cloister_fl.server.results.holdout_details import describe, scores_table
from cloister_fl.tasks.classification import Classification
from cloister_fl.tasks.divided_holdout import Holdout, HoldoutPatient, HoldoutUnit
from support.holdouts import holdout_patients

TWO = Classification("finding", ("no", "yes"))
THREE = Classification("finding", ("no", "old", "new"))


def held(
    task: Classification, labels: Sequence[int], rows: Sequence[Sequence[float]]
) -> tuple[Holdout, np.ndarray]:
    scores = np.asarray(rows, float)
    return Holdout(task, holdout_patients(labels), lambda _: scores), scores


def test_three_classes_have_a_confusion_matrix_and_figures_each() -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    calls = [0, 0, 1, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    rows = np.full((12, 3), 0.1)
    rows[np.arange(12), calls] = 0.8
    holdout, scores = held(THREE, labels, rows.tolist())
    found = describe(holdout, scores)
    places = [place for place in range(12) if not holdout.selecting[place]]
    table = np.zeros((3, 3), int)
    for place in places:
        table[labels[place], calls[place]] += 1
    assert np.array_equal(found.confusion, table)
    assert table.sum() == found.reported.patients == 6
    assert (found.calls, found.operating_point) == (None, None)
    assert [one.name for one in found.classes] == ["no", "old", "new"]
    for number, one in enumerate(found.classes):
        assert one.metrics.patients == 6
        assert one.metrics.class_counts == (4, 2)
        area = one.metrics.auroc
        assert area is not None
        # All of a class called rightly, and none beside it: its area is 1.
        right = table[number, number] == 2 and table[:, number].sum() == 2
        assert (area.value == 1.0) is bool(right)
    told = found.to_json()
    assert told["confusion"] == tuple(map(tuple, table.tolist()))


def test_the_operating_point_is_chosen_by_others_than_those_who_are_told() -> None:
    labels = [0, 1] * 20
    holdout, scores = held(TWO, labels, [[1 - 0.3 * one, 0.3 * one] for one in labels])
    choosing = holdout.places(selecting=True)
    scores[choosing] = [[0.2, 0.8] if labels[place] else [0.4, 0.6] for place in choosing]
    found = describe(holdout, scores)
    assert found.operating_point is not None
    assert found.operating_point.threshold == pytest.approx(0.7)
    assert found.operating_point.patients == len(choosing) == 20
    # None of the reported reaches it: a point that they had chosen would call all rightly.
    assert found.calls is not None
    assert (found.calls.true_positive, found.calls.false_negative) == (0, 10)
    assert [one.units for one in found.calls.rates] == [10, 10, 0, 20]


def test_examinations_are_counted_and_their_patients_told() -> None:
    task = Classification("finding", ("no", "yes"), "examination")
    patients = tuple(
        HoldoutPatient(f"p{n}", n % 2, (HoldoutUnit(n % 2, 1), HoldoutUnit(0, 2)), f"mark {n}")
        for n in range(16)
    )
    scores = np.array(
        [[0.2, 0.8] if label else [0.9, 0.1] for n in range(16) for label in (n % 2, 0)]
    )
    found = describe(Holdout(task, patients, lambda _: scores), scores)
    assert (found.reported.patients, found.reported.images) == (8, 24)
    assert found.calls is not None
    sensitivity, specificity = found.calls.rates[:2]
    assert (sensitivity.units, sensitivity.patients) == (4, 4)
    assert (specificity.units, specificity.patients) == (12, 8)
    (one,) = found.classes
    assert (one.metrics.patients, one.metrics.class_counts) == (8, (12, 4))
    assert sum(each.units for each in one.calibration) == 16


def test_groups_are_those_of_the_reported_patients() -> None:
    labels = [0, 1] * 20
    groups = [
        {"sex": "F" if place % 4 < 2 else "M", **({"age": "40-59"} if place < 30 else {})}
        for place in range(40)
    ]
    patients = tuple(
        replace(one, groups=told)
        for one, told in zip(holdout_patients(labels), groups, strict=True)
    )
    scores = np.array([[0.2, 0.8] if label else [0.7, 0.3] for label in labels])
    holdout = Holdout(TWO, patients, lambda _: scores)
    found = describe(holdout, scores)
    reported = [groups[place] for place in holdout.places(selecting=False)]
    told = {(one.kind, one.name): one.metrics.patients for one in found.groups}
    assert told == {
        ("age", "40-59"): sum("age" in one for one in reported),
        ("age", "not told"): sum("age" not in one for one in reported),
        ("sex", "F"): sum(one["sex"] == "F" for one in reported),
        ("sex", "M"): sum(one["sex"] == "M" for one in reported),
    }
    assert all(one.metrics.auroc and one.metrics.auroc.value == 1.0 for one in found.groups)


def test_a_group_without_a_class_has_no_figure_and_still_its_patients() -> None:
    labels = [0, 1] * 10
    patients = tuple(
        replace(one, groups={"sex": "F" if one.label else "M"}) for one in holdout_patients(labels)
    )
    scores = np.array([[0.5, 0.5]] * 20)
    found = describe(Holdout(TWO, patients, lambda _: scores), scores)
    assert [(one.name, one.metrics.auroc, one.metrics.class_counts) for one in found.groups] == [
        ("F", None, (0, 5)),
        ("M", None, (5, 0)),
    ]


def test_scores_are_a_table_that_no_spreadsheet_computes() -> None:
    task = Classification("finding", ("=no", "yes"))
    patients = (
        replace(holdout_patients([0])[0], groups={"maker": "=HYPERLINK(1)"}),
        replace(holdout_patients([1])[0], name="p1", groups={}),
    )
    rows = np.array([[0.75, 0.25], [0.5, 0.5]])
    table = scores_table(Holdout(task, patients, lambda _: rows), rows).decode()
    assert list(csv.DictReader(io.StringIO(table))) == [
        {
            "patient": "p0", "part": "reported", "label": "'=no",
            "score_=no": "0.75", "score_yes": "0.25",
            "images": "1", "maker": "'=HYPERLINK(1)",
        },
        {
            "patient": "p1", "part": "reported", "label": "yes",
            "score_=no": "0.5", "score_yes": "0.5",
            "images": "1", "maker": "",
        },
    ]  # fmt: skip
