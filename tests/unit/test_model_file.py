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
from cloister_fl.model_file import load_model, save_model
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
