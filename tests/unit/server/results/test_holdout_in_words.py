"""What report and terminal say of a hold-out: beside every figure stands of how many it is."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from rich.console import Console

from cloister_fl.metrics.figures import Metrics
from cloister_fl.server.results import report_plots, summary_table
from cloister_fl.server.results.artifacts import summarise
from cloister_fl.server.results.holdout_details import Details, describe
from cloister_fl.server.results.report import RunReport, render
from cloister_fl.server.rounds.checkpoint import Figures, RunState
from cloister_fl.server.rounds.run import Outcome
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from cloister_fl.tasks.divided_holdout import Holdout, HoldoutPatient, HoldoutUnit
from support import studies
from support.holdouts import holdout_patients

THREE = ("no", "old", "new")


def scores_of(labels: list[int], classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = rng.dirichlet(np.ones(classes), len(labels))
    drawn[np.arange(len(labels)), labels] += 0.4
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))


def described(study: Study, patients: tuple[HoldoutPatient, ...]) -> tuple[Details, Metrics]:
    labels = [unit.label for one in patients for unit in one.units]
    rows = scores_of(labels, len(study.task.strata))
    holdout = Holdout(study.task, patients, lambda _: rows)
    return describe(holdout, rows), holdout.measured(rows, holdout.places(selecting=False))


def pages(study: Study, details: Details, metrics: Metrics) -> tuple[str, str]:
    """The text of the report, and that of the terminal."""
    zeros = np.zeros(4, np.float32)
    figures = (Figures(0, 0, 0.0, 0.0, metrics=metrics), Figures(1, 2, 1.0, 0.1, 0.9, metrics))
    state = RunState(
        run="ab" * 16, completed=1, model=zeros, optimizer=OptimizerState(zeros, zeros),
        figures=figures, invited=tuple("abcde"), started=dict.fromkeys("abcde", 1),
    )  # fmt: skip
    summary = summarise(study, Outcome(state, state.invited, {}), seconds=1, details=details)
    html = render(RunReport(study, summary, figures, (), (), (), details))
    text = " ".join(re.sub(r"<[^>]+>", " ", unescape(html)).split())
    console = Console(width=160, file=io.StringIO())
    with console.capture() as shown:
        console.print(summary_table._results(summary))
    return text, " ".join(shown.get().split())


@pytest.fixture(autouse=True)
def _plots_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_plots, "_svg", lambda *_: "data:,")


def cells(section: str, text: str) -> str:
    """What follows a heading, up to a screen's worth."""
    return text[text.index(section) :][:1200]


def test_of_two_classes_each_share_and_group_says_of_how_many() -> None:
    study = studies.study(target={"column": "finding", "classes": ("no", "yes")})
    patients = tuple(
        replace(one, groups={"sex": "FM"[place % 2 ^ place // 2 % 2]})
        for place, one in enumerate(holdout_patients([0, 1] * 20, images=2))
    )
    details, metrics = described(study, patients)
    report, terminal = pages(study, details, metrics)
    assert "20 patients with 40 images are reported: no 10, yes 10." in report
    assert "20 patients with 40 images chose the model and its operating point" in report
    assert details.calls is not None
    point = cells("Called at the operating point", report)
    for rate in details.calls.rates:
        assert rate.estimate is not None
        one = rate.estimate
        row = f"{rate.title} {one.value:.3f} {one.low:.3f} to {one.high:.3f} {rate.patients}"
        assert row in point
    for title in ("sensitivity", "specificity"):
        rate = next(one for one in details.calls.rates if one.name == title)
        told = re.search(rf"{title} [\d.]+ \(95 % interval [\d.]+ to [\d.]+\), (\d+) pat", terminal)
        assert told is not None
        assert int(told[1]) == rate.patients
    assert "Patients measured 20, 40 images (no 10, yes 10)" in terminal
    assert re.search(r"Operating point yes at [\d.]+, chosen on 20 other patients", terminal)
    groups = cells("By group", report)
    for group in details.groups:
        area = group.metrics.auroc
        assert area is not None
        row = f"sex: {group.name} {area.value:.3f} {area.low:.3f} to {area.high:.3f} "
        no, yes = group.metrics.class_counts
        assert f"{row}{group.metrics.patients} no {no}, yes {yes}" in groups


def test_of_three_classes_each_class_says_of_how_many() -> None:
    study = studies.study(target={"column": "finding", "classes": THREE})
    details, metrics = described(study, holdout_patients([0, 1, 2] * 8))
    report, terminal = pages(study, details, metrics)
    assert "12 patients with 12 images are reported: no 4, old 4, new 4." in report
    confusion = cells("Called as the most probable class", report)
    for name, row in zip(THREE, details.confusion, strict=True):
        assert f"{name} {' '.join(map(str, row))}" in confusion
        assert sum(row) == 4
    for one in details.classes:
        area, precision = one.metrics.auroc, one.metrics.auprc
        assert area is not None
        assert precision is not None
        row = f"{one.name} {area.value:.3f} {area.low:.3f} to {area.high:.3f}"
        assert f"{row} {precision.value:.3f} 12 4" in confusion
    assert "Patients measured 12, 12 images (no 4, old 4, new 4)" in terminal
    assert "Operating point" not in terminal


def test_of_examinations_both_are_told_and_chance_is_a_share() -> None:
    study = studies.study(
        target={"column": "finding", "classes": ("no", "yes"), "unit": "examination"}
    )
    patients = tuple(
        HoldoutPatient(f"p{n}", n % 2, (HoldoutUnit(n % 2, 1), HoldoutUnit(1, 1)), f"mark {n}")
        for n in range(24)
    )
    details, metrics = described(study, patients)
    report, terminal = pages(study, details, metrics)
    assert "12 patients with 24 images are reported: by examination, no 6, yes 18." in report
    assert details.calls is not None
    for rate in details.calls.rates[:2]:
        assert f"{rate.units} {rate.patients} " in cells("Share Value 95 % interval", report)
        assert f"{rate.units} examinations of {rate.patients} patients" in terminal
    assert "An examination is called" in report
    # The dashed line is the share of the examinations; of the patients it would be 1.5.
    assert "knows nothing, 0.750" in report
    assert "24 examinations of 12 patients, 18 with “yes”" in report


def test_json_says_of_how_many() -> None:
    study = studies.study(target={"column": "finding", "classes": ("no", "yes")})
    details, _ = described(study, holdout_patients([0, 1] * 20))
    told = details.to_json()
    assert told["reported"] == {"patients": 20, "images": 20, "class_counts": (10, 10)}
    called = told["calls"]
    assert isinstance(called, Mapping)
    assert [(one["name"], one["units"], one["patients"]) for one in called["rates"]][:2] == [
        ("sensitivity", 10, 10),
        ("specificity", 10, 10),
    ]
    assert all(one["estimate"]["value"] <= 1 for one in called["rates"])
