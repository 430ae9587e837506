"""Public functions refuse an argument that they cannot use, by a code, before they do anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister_fl.client.predict import predict
from cloister_fl.errors import (
    CloisterError,
    FileUnreadable,
    NetworkUnfit,
    OptionInvalid,
    OutputInTheWay,
    StudyInvalid,
    TooFewSitesGiven,
)
from cloister_fl.model_file import load_model
from cloister_fl.networks import Choice, build, require_private
from cloister_fl.privacy import (
    Mechanism,
    calibrate,
    compose,
    epsilon_of,
    epsilon_pld,
    epsilon_rdp_of,
    epsilon_trajectory,
)
from cloister_fl.simulation import generate_sites, read_result, simulate
from cloister_fl.study import build_network, load, load_signatures, parse, privacy_cost, replace
from support import studies
from support.errors import raises

STUDY: Any = studies.study()
NUL = "a\0b"
SMALL = Choice("small-cnn")
STEP = Mechanism(1.0, 0.5)

# Of any type: a type checker would refuse most of what follows.
_simulate: Callable[..., Any] = simulate
_generate: Callable[..., Any] = generate_sites
_predict: Callable[..., Any] = predict
_build: Callable[..., Any] = build
_replace: Callable[..., Any] = replace


def _any(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as one that takes whatever it is given."""
    return function


OPTIONS: dict[str, Callable[[], Any]] = {
    "simulate, no study": lambda: _simulate(3, "sites", "out"),
    "simulate, None": lambda: _simulate(None, "sites", "out"),
    "simulate, sites": lambda: _simulate(STUDY, NUL, "out"),
    "simulate, no sites": lambda: _simulate(STUDY, "", "out"),
    "simulate, out": lambda: _simulate(STUDY, "sites", NUL),
    "simulate, out of bytes": lambda: _simulate(STUDY, "sites", b"out"),
    "simulate, surrogate": lambda: _simulate(STUDY, "sites", "\ud800"),
    "simulate, holdout": lambda: _simulate(STUDY, "sites", "out", holdout=NUL),
    "simulate, engine": lambda: _simulate(STUDY, "sites", "out", engine=["ray"]),
    "simulate, resume": lambda: _simulate(STUDY, "sites", "out", resume="yes"),
    "simulate, progress": lambda: _simulate(STUDY, "sites", "out", progress="yes"),
    "simulate, threads as text": lambda: _simulate(STUDY, "sites", "out", threads="2"),
    "simulate, half a thread": lambda: _simulate(STUDY, "sites", "out", threads=1.5),
    "simulate, True threads": lambda: _simulate(STUDY, "sites", "out", threads=True),
    "simulate, no threads": lambda: _simulate(STUDY, "sites", "out", threads=0),
    "simulate, many threads": lambda: _simulate(STUDY, "sites", "out", threads=10**12),
    "simulate, threads of digits": lambda: _simulate(STUDY, "sites", "out", threads=10**5000),
    "simulate, signatures": lambda: _simulate(STUDY, "sites", "out", signatures="ab"),
    "simulate, half a signature": lambda: _simulate(STUDY, "sites", "out", signatures=b"ab"),
    "generate_sites, folder": lambda: _generate(None),
    "generate_sites, seed": lambda: _generate("out", seed=-1),
    "generate_sites, half a seed": lambda: _generate("out", seed=1.5),
    "generate_sites, seed as text": lambda: _generate("out", seed="a"),
    "generate_sites, progress": lambda: _generate("out", progress=3),
    "read_result": lambda: read_result(NUL),
    "load, NUL": lambda: load(NUL),
    "load, None": lambda: _any(load)(None),
    "parse": lambda: _any(parse)(b"[study]"),
    "parse, name": lambda: _any(parse)("[study]", 3),
    "privacy_cost": lambda: _any(privacy_cost)({"study": 1}),
    "replace, no study": lambda: _replace(7, privacy={"epsilon": 1.0}),
    "build_network, no study": lambda: _any(build_network)(7),
    "build_network, models": lambda: _any(build_network)(STUDY, models=7),
    "load_signatures": lambda: load_signatures(NUL),
    "predict, model": lambda: _predict(NUL, "images", "out"),
    "predict, folder": lambda: _predict("model", NUL, "out"),
    "predict, out": lambda: _predict("model", "images", NUL),
    "predict, device": lambda: _predict("model", "images", "out", device="nope"),
    "predict, meta": lambda: _predict("model", "images", "out", device="meta"),
    "predict, progress": lambda: _predict("model", "images", "out", progress=True),
    "predict, bom": lambda: _predict("model", "images", "out", bom="yes"),
    "predict, patient_ids": lambda: _predict("model", "images", "out", patient_ids=1),
    "load_model": lambda: _any(load_model)(None),
    "load_model, device": lambda: load_model("model", device="nope"),
    "load_model, number": lambda: _any(load_model)("model", device=1.5),
    "build, outputs": lambda: _build(SMALL, outputs=-1, size=32, seed=0),
    "build, no outputs": lambda: _build(SMALL, outputs=0, size=32, seed=0),
    "build, outputs as text": lambda: _build(SMALL, outputs="2", size=32, seed=0),
    "build, channels": lambda: _build(SMALL, outputs=2, in_channels=0, size=32, seed=0),
    "build, size": lambda: _build(SMALL, outputs=2, size=-1, seed=0),
    "build, seed": lambda: _build(SMALL, outputs=2, size=32, seed=-1),
    "build, depth": lambda: _build(SMALL, outputs=2, size=32, seed=0, depth=0),
    "build, models": lambda: _build(SMALL, outputs=2, size=32, seed=0, models=3),
    "build, a name": lambda: _build("small-cnn", outputs=2, size=32, seed=0),
    "build, arguments": lambda: _build(Choice("small-cnn", None), 2, size=32, seed=0),  # type: ignore[arg-type]
    "require_private": lambda: _any(require_private)("small-cnn"),
    "require_private, size": lambda: _any(require_private)(
        build(SMALL, 2, size=32, seed=0), size=0
    ),
}


@pytest.mark.parametrize("call", OPTIONS.values(), ids=list(OPTIONS))
def test_the_argument_is_named(
    call: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(OptionInvalid) as caught:
        call()
    error = caught.value
    assert isinstance(error, CloisterError)
    assert error.what.startswith("The argument '")
    assert error.what.endswith(".")
    assert error.remedy.endswith((".", ")."))
    assert len(str(error)) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"network": "small-cnn"}, "network: must be a table. It says 'small-cnn'."),
        ({"privacy": None}, "privacy: must be a table."),
        ({"privacy": 3}, "privacy: must be a table. It says 3."),
        ({"target": None}, "target: must be a table."),
        ({"training": {1: 2}}, "training"),
        ({"input": {"size": np.int64(32)}}, "input.size: must be a whole number."),
    ],
)
def test_a_table_that_is_none_is_a_fault_of_the_study(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyInvalid) as caught:
        _replace(STUDY, **tables)
    assert told in str(caught.value)


def test_a_network_of_other_images_is_refused_by_name() -> None:
    module = build(SMALL, 2, 3, size=32, seed=0)
    with pytest.raises(NetworkUnfit, match="does not take images of 1 x 64 x 64"):
        require_private(module)


RANGES: dict[str, Callable[[], Any]] = {
    "noise": lambda: Mechanism("1", 0.5),  # type: ignore[arg-type]
    "True": lambda: Mechanism(True, 0.5),
    "rate": lambda: Mechanism(1.0, float("nan")),
    "steps": lambda: compose(((STEP, 1.5),)),  # type: ignore[arg-type]
    "negative": lambda: compose(((STEP, -1),)),
    "no pairs": lambda: compose((STEP,)),  # type: ignore[arg-type]
    "no mechanism": lambda: compose((("step", 1),)),  # type: ignore[arg-type]
    "number": lambda: epsilon_of(3, 1e-5),  # type: ignore[arg-type]
    "delta": lambda: epsilon_of(((STEP, 1),), "1e-5"),  # type: ignore[arg-type]
    "rdp": lambda: epsilon_rdp_of(((STEP, 1),), None),  # type: ignore[arg-type]
    "sigma": lambda: epsilon_pld(None, 0.5, 1, 1e-5),  # type: ignore[arg-type]
    "epsilon": lambda: calibrate("3", 1e-5, 0.5, 1),  # type: ignore[arg-type]
    "list": lambda: calibrate([3.0], 1e-5, 0.5, 1),  # type: ignore[arg-type]
    "no steps": lambda: calibrate(3.0, 1e-5, 0.5, 1.5),  # type: ignore[arg-type]
    "q": lambda: calibrate(3.0, 1e-5, "0.5", 1),  # type: ignore[arg-type]
    "rounds": lambda: epsilon_trajectory(1.0, 0.5, 1, 1.5, 1e-5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", RANGES.values(), ids=list(RANGES))
def test_accounting_raises_value_errors_and_nothing_else(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"\bmust\b|cannot|sequence"):
        call()


def test_the_compositions_beside_may_be_lists() -> None:
    alone = calibrate(3.0, 1e-5, 1.0, 4, beside=[(Mechanism(8.0, 1.0), 1)])  # type: ignore[arg-type]
    assert alone == calibrate(3.0, 1e-5, 1.0, 4, beside=((Mechanism(8.0, 1.0), 1),))


# A path stands for the study in its file


def test_a_study_may_be_the_path_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(studies.study_text())
    assert privacy_cost(file) == privacy_cost(str(file)) == privacy_cost(STUDY)
    assert replace(str(file), training={"rounds": 2}) == replace(STUDY, training={"rounds": 2})
    assert load_signatures(file) == b""
    (tmp_path / "sites").mkdir()
    with raises(TooFewSitesGiven, match="asks for at least 5 sites"):
        simulate(str(file), tmp_path / "sites", tmp_path / "run")
    with raises(FileUnreadable, match=r"none\.toml cannot be read"):
        simulate(tmp_path / "none.toml", tmp_path / "sites", tmp_path / "run")
    (tmp_path / "study.toml.sig").write_text("no signature\n")
    with raises(FileUnreadable, match="is not a file of signatures"):
        simulate(file, tmp_path / "sites", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_folder_to_draw_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(OutputInTheWay):
        generate_sites(tmp_path / "file", progress=False)
