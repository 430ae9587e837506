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
            {"epsilon_max": None, "rounds": 2, "sites": 1},
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
    assert repr(found) == f"Result(folder={tmp_path!r})"


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
