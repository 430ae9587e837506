"""A federation that masks discs: from DICOM Segmentations to a model that masks them, too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.predict import predict
from cloister_fl.client.privacy_audit.own_data import Asked, prepare
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import OptionInvalid, OutputInTheWay, StudyInvalid
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support.dicom import make_dicom
from support.errors import raises
from support.federations import NAMES, study_text
from support.segmentations import saved, segment, segmentation

TARGET = 'kind = "segmentation"\nsegment = "disc"'
INPUT = "size = 32"
NETWORK = 'name = "unet"\narguments = { width = 4 }'
OPEN = "enabled = false"
TRAINING = "rounds = 6\nsteps = 12\nlearning_rate = 0.5\nsampling_rate = 0.5"


def text(**tables: str) -> str:
    made = study_text(**{"input": INPUT, "network": NETWORK, "target": TARGET, **tables})
    kept = [line for line in made.splitlines() if not line.startswith(("column", "classes"))]
    return "\n".join(kept) + "\n"


def asked(**tables: str) -> Study:
    return parse_study(text(**tables))


def disc(rng: np.random.Generator, *, shown: bool) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """A bright disc and a bright square on noise, 48 x 40; only the disc is marked."""
    y, x = np.mgrid[0:48, 0:40]
    pixels = rng.normal(1800, 150, (48, 40))
    top, left = int(rng.integers(4, 30)), int(rng.integers(4, 24))
    marked = np.hypot(y - top - 6, x - left - 6) < 7
    if shown:
        pixels[marked] += 1200
    return np.clip(pixels, 0, 4095).astype(np.uint16), marked & shown


def write(folder: Path, rng: np.random.Generator, prefix: str, patients: int) -> None:
    dicom = folder / "dicom"
    dicom.mkdir(parents=True)
    for number in range(patients):
        pixels, marked = disc(rng, shown=number % 6 != 0)
        source = make_dicom(pixels, bits_stored=12, patient_id=f"{prefix}-{number:03d}")
        (dicom / f"{number}.dcm").write_bytes(source)
        if marked.any():
            (dicom / f"{number}-seg.dcm").write_bytes(
                segment([source], marked[np.newaxis], labels=("disc",))
            )
        else:
            empty = segmentation([source], np.ones((1, 48, 40), bool), labels=("disc",))
            empty.PixelData = bytes(len(empty.PixelData))
            (dicom / f"{number}-seg.dcm").write_bytes(saved(empty))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(4)
    for name in NAMES:
        write(root / "sites" / name, rng, name, 18)
    write(root / "holdout", rng, "hold", 18)
    return root


@pytest.fixture(scope="module")
def trained(
    folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("run") / "out"
    study = asked(privacy=OPEN, training=TRAINING)
    return out, run_simulation(Simulation(study, folders / "sites", out))


def test_sites_sum_their_dice_in_secret_and_it_rises(
    trained: tuple[Path, dict[str, object]],
) -> None:
    out, summary = trained
    assert summary["secure_aggregation"] is True
    assert float(str(summary["dice_initial"])) < 0.3
    assert float(str(summary["dice_final"])) > 0.8
    assert "auroc_final" not in summary
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(7))
    assert all(
        row["metrics"]["dice"]["low"]
        <= row["metrics"]["dice"]["value"]
        <= row["metrics"]["dice"]["high"]
        for row in rows
    )
    page = (out / "report.html").read_text()
    assert "Dice" in page
    assert "AUROC" not in page


def test_a_model_outlines_new_images_at_their_own_size(
    trained: tuple[Path, dict[str, object]], folders: Path, tmp_path: Path
) -> None:
    model = trained[0] / "model.safetensors"
    app = typer.Typer()
    app.command()(client_group.predict)
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(9)
    drawn = {}
    for number in range(6):
        pixels, marked = disc(rng, shown=True)
        # The last two are of two patients, and have one UID.
        file = make_dicom(
            pixels, bits_stored=12, patient_id=f"n{number}",
            elements={"SOPInstanceUID": f"2.25.{min(number, 4)}"},
        )  # fmt: skip
        (images / str(number)).write_bytes(file)
        drawn[number] = marked
    out = tmp_path / "found"
    result = CliRunner().invoke(app, [str(model), str(images), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "Wrote the segmentation masks of 6 images" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        ".gitignore", *(f"2.25.{k}.png" for k in range(4)), "2.25.4-2.png", "2.25.4.png",
    ]  # fmt: skip
    found = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
    assert {(one.shape, one.dtype.name) for one in found} == {((48, 40), "uint8")}
    assert set(np.unique(found)) == {0, 255}
    best = [
        max(2 * (one & (mask * 255) > 0).sum() / ((one > 0).sum() + mask.sum()) for one in found)
        for mask in drawn.values()
    ]
    assert min(best) > 0.7
    assert "called" not in result.stdout
    for option in ({"bom": True}, {"patient_ids": True}, {"overwrite": True}):
        with raises(OptionInvalid, match=f"'{next(iter(option))}' cannot be True"):
            predict(model, images, tmp_path / "other", **option)
    with raises(OutputInTheWay, match="in the folder of the images"):
        predict(model, images, images / "masks")
    before = sorted(path.read_bytes() for path in out.iterdir())
    with pytest.raises(OutputInTheWay):
        predict(model, images, out)
    assert sorted(path.read_bytes() for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "images"]


@pytest.mark.slow
def test_privately_no_dice_leaves_and_a_holdout_measures(folders: Path, tmp_path: Path) -> None:
    study = asked(
        privacy="epsilon = 8.0\ndelta = 1e-4",
        training="rounds = 1\nsteps = 2\nsampling_rate = 0.5\nexpected_batch = 8",
    )
    summary = run_simulation(
        Simulation(study, folders / "sites", tmp_path / "run", holdout=folders / "holdout")
    )
    assert 0 <= float(str(summary["dice_final"])) <= 1
    assert float(str(summary["epsilon_max"])) <= 8.0
    again = run_simulation(Simulation(study, folders / "sites", tmp_path / "alone"))
    assert again["dice_final"] is None


def test_a_site_audits_the_training_on_its_own_outlines(folders: Path, tmp_path: Path) -> None:
    study = asked(
        privacy="epsilon = 4.0\ndelta = 1e-4",
        training="rounds = 1\nsteps = 2\nsampling_rate = 0.5\nexpected_batch = 8",
    )
    site = init_site(
        tmp_path, name="site", dicom=folders / "sites" / NAMES[0] / "dicom",
        policy=Policy(patients_at_most=1_000, min_patients=1),
    )  # fmt: skip
    found = prepare(site, study, Asked()).audit()
    assert (len(found.scores), found.steps) == (18, 2)
    assert found.claimed_epsilon < 4.0
    # Without noise the coins would be told at once; the network must have seen the masks.
    assert len(set(found.scores)) == 18


def test_what_a_segmentation_cannot_be_is_told_with_its_line() -> None:
    for tables, key in (
        ({"network": 'name = "small-cnn"'}, "network.name"),
        ({"target": 'kind = "segmentation"'}, "target.segment"),
        ({"evaluation": "release_epsilon = 0.5"}, "evaluation.release_epsilon"),
    ):
        with pytest.raises(StudyInvalid) as caught:
            asked(**tables)
        assert [(fault.key, fault.line > 0) for fault in caught.value.faults] == [(key, True)]
    with pytest.raises(StudyInvalid) as caught:
        parse_study(study_text(network='name = "unet"'))
    assert [fault.key for fault in caught.value.faults] == ["network.name"]
    with pytest.raises(StudyInvalid) as caught:
        parse_study(study_text(input=INPUT, network=NETWORK, target=TARGET))
    assert {fault.key for fault in caught.value.faults} >= {"target.column"}
