"""The result of a run, as its files have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloister_fl.errors import FileUnreadable
from cloister_fl.metrics import Estimate, Metrics
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.simulation.result import read_result, round_of

FIRST = Metrics({"auroc": Estimate(0.5, 0.4, 0.6), "auprc": None}, 20, (12, 8))
LAST = Metrics({"auroc": Estimate(0.75, 0.7, 0.8), "auprc": None}, 20, (12, 8))
DICE = Metrics({"dice": Estimate(0.875, 0.8, 0.9)}, 6, (1, 5))
BEFORE = Figures(0, 0, 0.0, 0.0, metrics=FIRST)
AFTER = Figures(1, 5, 2.5, 0.25, 1.5, metrics=LAST)
SEGMENTED = Figures(1, 3, 1.0, 1.0, metrics=DICE)


def write(folder: Path, *rows: Figures, **changes: Any) -> Path:
    """A finished run's files, as ``server.results.artifacts`` writes them."""
    summary = {
        "epsilon_max": 1.5,
        "rounds": 1,
        "sites": 5,
        "warnings": ["Take care."],
        "release": None,
        "headline": "auroc",
        "strata": ["normal", "nodule"],
        "metrics_final": rows[-1].to_json()["metrics"],
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    lines = [json.dumps(row.to_json()) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_every_figure_of_a_round_is_there() -> None:
    found = round_of(AFTER.to_json())
    assert (found.number, found.sites, found.seconds, found.update_norm) == (1, 5, 2.5, 0.25)
    assert found.epsilon == 1.5
    assert found.metrics == LAST
    assert round_of(SEGMENTED.to_json()).metrics == DICE


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    found = read_result(str(write(tmp_path, BEFORE, AFTER)))
    assert [each.number for each in found.rounds] == [0, 1]
    assert found.metrics == LAST
    assert found.headline == Estimate(0.75, 0.7, 0.8)
    assert found.epsilon == 1.5
    assert found.noised_metrics is None
    assert found.warnings == ("Take care.",)
    assert found.summary["sites"] == 5
    assert (found.folder, found.model) == (tmp_path, tmp_path / "model.safetensors")
    assert found.report == tmp_path / "report.html"


def test_the_noised_evaluation_is_read(tmp_path: Path) -> None:
    write(tmp_path, BEFORE, AFTER, release={"noised": True, "metrics": LAST.to_json()})
    assert read_result(tmp_path).noised_metrics == LAST
    write(tmp_path, BEFORE, AFTER, release={"noised": True, "metrics": None})
    assert read_result(tmp_path).noised_metrics is None


@pytest.mark.parametrize(
    ("rows", "changes", "text"),
    [
        ((BEFORE, AFTER), {}, "AUROC 0.750 (0.700 to 0.800), epsilon 1.50, 1 round at 5 sites"),
        (
            (SEGMENTED,),
            {"epsilon_max": None, "rounds": 2, "sites": 1, "headline": "dice"},
            "Dice 0.875 (0.800 to 0.900), no privacy, 2 rounds at 1 site",
        ),
        (
            (Figures(round=1, sites=5, seconds=1.0, update_norm=1.0),),
            {},
            "not measured, epsilon 1.50, 1 round at 5 sites",
        ),
    ],
)
def test_a_result_in_one_line(
    tmp_path: Path, rows: tuple[Figures, ...], changes: dict[str, Any], text: str
) -> None:
    assert str(read_result(write(tmp_path, *rows, **changes))) == text


def test_a_round_in_one_line() -> None:
    assert str(round_of(AFTER.to_json())) == "round 1: AUROC 0.750 (0.700 to 0.800), epsilon 1.50"
    assert str(round_of(BEFORE.to_json())) == "before training: AUROC 0.500 (0.400 to 0.600)"
    assert str(round_of(SEGMENTED.to_json())) == "round 1: Dice 0.875 (0.800 to 0.900)"


def test_a_result_is_short_where_python_shows_it(tmp_path: Path) -> None:
    found = read_result(write(tmp_path, BEFORE, AFTER))
    assert repr(found) == (
        f"<Result in {str(tmp_path)!r}: AUROC 0.750 (0.700 to 0.800), epsilon 1.50, "
        "1 round at 5 sites>"
    )


def test_a_notebook_shows_figures_cost_and_warnings(tmp_path: Path) -> None:
    shown = read_result(write(tmp_path, BEFORE, AFTER, warnings=["a < b"]))._repr_html_()
    for told in (
        "<td>AUROC</td><td>0.750 (95 % interval 0.700 to 0.800)</td>",
        "<td>average precision</td><td>none</td>",
        "<td>patients measured</td><td>20 (normal 12, nodule 8)</td>",
        "<td>privacy</td><td>epsilon 1.50 at most</td>",
        f"<td>report</td><td>{tmp_path / 'report.html'}</td>",
        "<li>a &lt; b</li>",
    ):
        assert told in shown
    bare = Figures(round=1, sites=5, seconds=1.0, update_norm=1.0)
    shown = read_result(write(tmp_path, bare, epsilon_max=None, warnings=[]))._repr_html_()
    assert "<td>privacy</td><td>none</td>" in shown
    assert "AUROC" not in shown
    assert "<li>" not in shown


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon_max": "x"},
        {"epsilon_max": float("nan")},
        {"epsilon_max": True},
        {"release": "x"},
        {"release": {"metrics": "x"}},
        {"release": {"metrics": {"patients": 1}}},
        {"warnings": 3},
        {"warnings": [3]},
        {"rounds": "1"},
        {"sites": -1},
        {"headline": "aurox"},
        {"headline": "dice"},
        {"headline": None},
    ],
)
def test_a_summary_that_no_run_writes_is_refused_when_it_is_read(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(FileUnreadable, match="has no finished run"):
        read_result(write(tmp_path, BEFORE, AFTER, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"aurox": None, "patients": 1, "class_counts": [1]}},
        {"metrics": {"auroc": 0.5, "patients": 1, "class_counts": [1]}},
        {"metrics": 3},
        {"epsilon": "x"},
        {"round": None},
        {"sites": 1.5},
        {"seconds": "1"},
        {"update_norm": float("inf")},
    ],
)
def test_a_round_that_no_run_writes_is_refused_when_it_is_read(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write(tmp_path, BEFORE)
    row = json.dumps({**AFTER.to_json(), **changes})
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(BEFORE.to_json())}\n{row}\n")
    with pytest.raises(FileUnreadable, match="has no finished run"):
        read_result(tmp_path)


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable, match="has no finished run"):
        read_result(tmp_path)
    write(tmp_path, BEFORE)
    for name in ("summary.json", "metrics.jsonl"):
        kept = (tmp_path / name).read_text()
        for text in ("{", "[]", '{"round": 1}', ""):
            (tmp_path / name).write_text(text)
            with pytest.raises(FileUnreadable, match="has no finished run"):
                read_result(tmp_path)
        (tmp_path / name).write_text(kept)
    assert read_result(tmp_path).metrics == FIRST
