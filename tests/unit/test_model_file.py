"""A model file is read as it was written, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cloister_fl.errors import FileUnreadable, ModelFileInvalid
from cloister_fl.model_file import OperatingPoint, load_model, read_model, save_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.study import build_network, replace
from support import studies
from support.errors import raises

STUDY = studies.study(network={"arguments": {"width": 4}})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, STUDY, flatten(build_network(STUDY)), {"rounds": 1})
    return path


def rewritten(path: Path, **metadata: str | None) -> Path:
    """The file with other metadata; what is None is left out."""
    with safe_open(path, framework="pt") as file:
        kept = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {key: text for key, text in kept.items() if text is not None})
    return path


def test_weights_and_study_come_back(model: Path) -> None:
    module, study = load_model(str(model), "auto")
    assert study == STUDY
    assert not module.training
    assert torch.equal(
        torch.from_numpy(flatten(module.cpu())), torch.from_numpy(flatten(build_network(STUDY)))
    )


@pytest.mark.parametrize("found", [None, "", "0" * 64, STUDY.digest.upper()])
def test_a_study_that_is_not_the_one_that_was_trained_is_refused(
    model: Path, found: str | None
) -> None:
    with raises(ModelFileInvalid, match="is not the one that the model was trained by"):
        load_model(rewritten(model, study_hash=found))


def test_nor_is_another_study_put_in_its_place(model: Path) -> None:
    other = replace(STUDY, target={"classes": ["nodule", "normal"]})
    with raises(ModelFileInvalid, match="is not the one that the model was trained by"):
        load_model(rewritten(model, study=other.canonical()))


@pytest.mark.parametrize("metadata", [{"format": None}, {"study": "{"}, {"study": None}])
def test_what_is_no_model_of_ours_is_refused(model: Path, metadata: dict[str, str | None]) -> None:
    with raises(ModelFileInvalid):
        load_model(rewritten(model, **metadata))


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / ("a" * 300)):
        with raises(FileUnreadable, match="cannot be read"):
            load_model(path)


@pytest.mark.process
def test_the_same_model_gives_the_same_bytes_in_another_process(
    model: Path, tmp_path: Path
) -> None:
    # The library orders metadata anew in each process.
    code = (
        "import sys; from pathlib import Path; from support import studies;"
        "from cloister_fl.study import build_network;"
        "from cloister_fl.networks.flat_parameters import flatten;"
        "from cloister_fl.model_file import save_model;"
        "study = studies.study(network={'arguments': {'width': 4}});"
        "save_model(Path(sys.argv[1]), study, flatten(build_network(study)), {'rounds': 1})"
    )
    other = tmp_path / "other.safetensors"
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code, str(other)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    assert other.read_bytes() == model.read_bytes()
    size = int.from_bytes(model.read_bytes()[:8], "little")
    header = json.loads(model.read_bytes()[8 : 8 + size])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


POINT = {"class": "nodule", "threshold": 0.31, "patients": 120}


def test_an_operating_point_comes_back_and_may_be_missing(model: Path) -> None:
    assert read_model(model).operating_point is None
    rewritten(model, operating_point=json.dumps(POINT))
    assert read_model(model).operating_point == OperatingPoint("nodule", 0.31, 120)
    rewritten(model, operating_point=json.dumps({**POINT, "class": "normal", "threshold": 1}))
    assert read_model(model).operating_point == OperatingPoint("normal", 1.0, 120)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "3", "null", "[" * 4000, json.dumps(POINT) + " " * 4096,
        '{"class": "nodule", "threshold": NaN, "patients": 120}',
        '{"class": "nodule", "threshold": 0.9, "threshold": 0.31, "patients": 120}',
        '[["class", "nodule"], ["threshold", 0.31], ["patients", 120]]',
        *(
            json.dumps({**POINT, **other})
            for other in (
                {"class": "cyst"}, {"class": 1}, {"class": None}, {"class": ["nodule"]},
                {"threshold": 1.001}, {"threshold": -1e-9}, {"threshold": "0.31"},
                {"threshold": True}, {"threshold": None}, {"threshold": 10**400},
                {"patients": 0}, {"patients": 1.0}, {"patients": True}, {"patients": 10**10},
                {"more": 1},
            )
        ),
        json.dumps({"class": "nodule", "threshold": 0.31}),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_a_damaged_operating_point_is_refused(model: Path, text: str) -> None:
    rewritten(model, operating_point=text)
    with raises(ModelFileInvalid, match="The operating point in model.safetensors is not valid"):
        load_model(model)


def test_more_than_two_classes_have_no_operating_point(tmp_path: Path) -> None:
    study = replace(STUDY, target={"classes": ["normal", "nodule", "cyst"]})
    path = tmp_path / "model.safetensors"
    save_model(path, study, flatten(build_network(study)), {})
    assert read_model(path).operating_point is None
    with raises(ModelFileInvalid, match="operating point"):
        read_model(rewritten(path, operating_point=json.dumps(POINT)))
