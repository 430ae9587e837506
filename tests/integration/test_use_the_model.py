"""What docs/use-the-model.md shows without Cloister gives the scores of ``predict``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.predict import predict
from cloister_fl.client.predictions.score_table import Layout, _head
from cloister_fl.client.training import evaluation
from cloister_fl.model_file import save_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.study import build_network
from support import studies
from support.dicom import radiograph, write_dicom

PAGE = (Path(__file__).parents[2] / "docs" / "use-the-model.md").read_text("utf-8")
POINT = {"class": "normal", "threshold": 0.31, "patients": 120}
FIRST_COLUMN = re.compile(r"^\| `([^|]*)` \|", re.MULTILINE)
CASES: dict[str, tuple[dict[str, Any], object]] = {
    "own window, else percentiles": ({}, POINT),
    "percentiles": ({"windowing": "percentile", "percentiles": [2, 97.5]}, None),
    "fixed window": ({"windowing": "fixed", "window": [1800, 2500]}, POINT),
}


def code() -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(7)
    headers: tuple[dict[str, Any], ...] = (
        {},
        {"WindowCenter": 1900, "WindowWidth": 1500},
        {"WindowCenter": [700, 9], "WindowWidth": [2100, 9], "RescaleSlope": 0.5},
        {"RescaleIntercept": -1024, "RescaleSlope": 2},
    )
    for number, header in enumerate(headers):
        elements = {"RescaleIntercept": 0, "RescaleSlope": 1, **header}
        pixels = np.clip(radiograph(number) + rng.integers(0, 900, (1, 1)), 0, 4095)
        # Not square, and no multiple of the network's side.
        write_dicom(
            folder / f"{number}.dcm", pixels.astype(np.uint16)[: 41 + number], bits_stored=12,
            patient_id=f"P{number // 2}", elements=elements,
            photometric="MONOCHROME1" if number % 2 else "MONOCHROME2",
        )  # fmt: skip


def write_model(path: Path, point: object, **tables: Any) -> None:
    study = studies.study(network={"arguments": {"width": 8}}, **tables)
    vector = flatten(build_network(study))
    save_model(path, study, vector, {"rounds": 1})
    if point is not None:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        save_file(tensors, path, {**metadata, "operating_point": json.dumps(point)})


@pytest.mark.parametrize(("spec", "point"), CASES.values(), ids=CASES)
def test_the_code_gives_the_scores_of_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], point: object
) -> None:
    assert "cloister_fl" not in code()
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    write_model(tmp_path / "model.safetensors", point, input=spec)
    seen: list[Cohort] = []
    honest = evaluation.answers_for
    monkeypatch.setattr(
        evaluation, "answers_for", lambda m, c, task: seen.append(c) or honest(m, c, task)
    )
    predict("model.safetensors", "images", "scores.csv", device="cpu")
    with Path("scores.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    images = dict(zip(rows, seen[0].images, strict=True))
    space: dict[str, Any] = {}
    exec(compile(code(), "use-the-model.md", "exec"), space)
    scores: Callable[[list[str]], Any] = space["scores"]
    names = sorted(rows)
    assert names == [f"{number}.dcm" for number in range(4)]
    for name in names:
        assert np.array_equal(space["prepared"](f"images/{name}"), images[name]), name
    found = scores([f"images/{name}" for name in names])
    told = [[float(rows[name][f"score_{one}"]) for one in space["classes"]] for name in names]
    assert found == pytest.approx(np.array(told), abs=1e-5)
    # The images differ, so that the comparison says something.
    assert np.ptp(found[:, 0]) > 1e-3
    pairs = [[f"images/{name}" for name in pair] for pair in (names[:2], names[2:])]
    for pair in pairs:
        assert {rows[Path(name).name]["patient_call"] for name in pair} == {space["call"](pair)}
    assert (space["positive"], space["threshold"]) == ((0, 0.31) if point else (1, 0.5))
    # Between the two patients, one is called each.
    means = [scores(pair).mean(axis=0)[space["positive"]] for pair in pairs]
    space["threshold"] = sum(means) / 2
    assert sorted(map(space["call"], pairs)) == ["nodule", "normal"]


def table(heading: str) -> str:
    """The text from a heading to the next."""
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_column_and_every_key_is_on_the_page(tmp_path: Path) -> None:
    from cloister_fl.client.predictions.calls import rule_of

    layout = Layout("SOPInstanceUID", ("score_<class>",), rule_of(("a", "b"), None), True)
    columns = FIRST_COLUMN.findall(table("The scores").partition("\n### ")[0])
    assert columns == _head(layout)
    path = tmp_path / "model.safetensors"
    write_model(path, POINT)
    with safe_open(path, framework="pt") as file:
        assert set(FIRST_COLUMN.findall(table("The model file"))) == set(file.metadata())


def test_every_key_of_the_summary_is_on_the_page(tmp_path: Path) -> None:
    write_model(tmp_path / "model", POINT)
    write_dicom(tmp_path / "images" / "1")
    done = predict(tmp_path / "model", tmp_path / "images", tmp_path / "s.csv", device="cpu")
    keys = FIRST_COLUMN.findall(table("The scores").partition("\n### ")[2])
    named = {word for cell in keys for word in re.findall(r"\w+", cell)}
    told = done.as_dict()
    assert named == set(told)
    assert told["operating_point"] == POINT
    assert told["threshold"] == 0.31
