"""The commands of the client, as they are typed."""

from __future__ import annotations

import csv
import errno
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from cloister_fl import model_file
from cloister_fl.client import predict as prediction
from cloister_fl.client.cli import client_group
from cloister_fl.client.network.join import MEMBERSHIP
from cloister_fl.client.predict import predict
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.last_refusal import clear_last_refusal, keep_last_refusal
from cloister_fl.client.training import evaluation
from cloister_fl.errors import (
    ExtraMissing,
    FolderUnreadable,
    OptionInvalid,
    OutputInTheWay,
    Reject,
    SiteEmpty,
    SiteFileInvalid,
    StudyInvalid,
)
from support import commands, studies
from support.dicom import radiograph, write_dicom, write_site
from support.errors import raises

pytestmark = pytest.mark.process


STUDY_TOML = studies.study_text()
STUDY = studies.study()


def _run(*arguments: object) -> tuple[int, str]:
    result = commands.invoke(client_group.app, *arguments)
    return result.exit_code, result.output


def test_init_then_check(tmp_path: Path) -> None:
    root = write_site(tmp_path / "nord", 20)
    status, output = _run("init", root, "--name", "north", "--patients-at-most", 1000)
    assert status == 0
    assert "Site north is ready" in output
    assert "patients_at_most" not in output
    status, output = _run("init", root)
    assert status == 0
    assert "unchanged" in output
    with raises(OptionInvalid, match="its patients_at_most is another one") as caught:
        _run("init", root, "--patients-at-most", 50)
    assert "leave --patients-at-most out" in caught.value.remedy
    study = tmp_path / "study.toml"
    study.write_text(STUDY_TOML)
    status, output = _run("check", "--dir", root, "--study", study)
    assert status == 0
    assert "The data can be used." in output
    assert "\x1b" not in output


def test_a_new_site_says_that_it_lets_no_private_study_in_before_patients_are_bounded(
    tmp_path: Path,
) -> None:
    root = write_site(tmp_path / "nord", 20)
    _, output = _run("init", root, "--name", "north")
    told = "No study with privacy is let in before patients_at_most stands below [policy]"
    assert told in output
    assert told in _run("check", "--dir", root)[1]
    study = tmp_path / "study.toml"
    study.write_text(STUDY_TOML)
    status, output = _run("check", "--dir", root, "--study", study)
    assert status == 4
    assert "policy.patients_at_most is 0, not declared" in output


def test_init_of_a_site_that_is_there_ignores_no_option(tmp_path: Path) -> None:
    root = tmp_path / "nord"
    given = ("--name", "north", "--dicom", "images", "--labels", "/l.csv")
    _run("init", root, *given)
    written = (root / "site.toml").read_bytes()
    assert "unchanged" in _run("init", root, *given)[1]
    for option, key in (("--name", "name"), ("--dicom", "dicom"), ("--labels", "labels")):
        told = f"{root / 'site.toml'} exists, and its {key} is another one."
        with raises(OptionInvalid, match=re.escape(told)):
            _run("init", root, option, "other")
    assert (root / "site.toml").read_bytes() == written


def test_a_repeated_join_ignores_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_fl.client.network.join.look", pytest.fail)
    site = init_site(tmp_path / "north")
    (site.root / MEMBERSHIP).touch()
    for given in (("--dicom", "other"), ("--labels", "other"), ("--proxy", "http://p:1")):
        with raises(OptionInvalid, match="another"):
            _run("join", "--dir", site.root, *given)


@pytest.mark.parametrize(
    "words",
    [
        *(("status",), ("stop",), ("start",), ("roster",), ("proxy",), ("check",), ("review",)),
        *(("budget",), ("audit",), ("fetch",), ("quarantine",), ("find", "CLO-211")),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "here"])
def test_a_folder_that_is_no_sites_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "no where" if named else tmp_path
    with raises(OptionInvalid, match=f"{re.escape(str(folder))} is not a site folder") as caught:
        _run(*words, *(("--dir", "no where") if named else ()))
    assert f"cloister client init {shlex.quote(str(folder))}" in caught.value.remedy


def test_init_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run("init", "--name", "here", "--dicom", "/data/x", "--labels", "l.csv")[0] == 0
    assert 'dicom = "/data/x"' in (tmp_path / "site.toml").read_text()
    (tmp_path / "dicom").mkdir()
    assert _run("check")[0] == 3


def test_check_as_json_and_sheet(tmp_path: Path) -> None:
    root = write_site(tmp_path / "site", 6)
    _run("init", root)
    result = CliRunner().invoke(
        client_group.app,
        ["check", "--dir", str(root), "--json", "--contact-sheet", str(tmp_path / "s.png")],
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["accepted"] == 6
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "keep them at this site" in result.stderr


def test_check_fails_with_the_status_of_a_data_error(tmp_path: Path) -> None:
    root = write_site(tmp_path / "site", 6)
    _run("init", root)
    study = tmp_path / "study.toml"
    study.write_text(STUDY_TOML)
    status, output = _run("check", "--dir", root, "--study", study, "--json")
    assert status == 3
    assert [fault["code"] for fault in json.loads(output)["faults"]] == ["CLO-207"]
    study.write_text(STUDY_TOML + "x = 1\n")
    with pytest.raises(StudyInvalid):
        _run("check", "--dir", root, "--study", study)
    (root / "site.toml").write_text("[site]\n")
    with pytest.raises(SiteFileInvalid):
        _run("check", "--dir", root)


def test_module_import_is_light() -> None:
    code = (
        "import sys, cloister_fl.client.cli.client_group; "
        "heavy = {'torch', 'numpy', 'pydicom', 'opacus', 'flwr', 'imagecodecs', 'PIL', 'monai'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class _FakeNetwork:
    """Stands in for a network; ``predict`` hands it to ``answers_for`` only."""


def _fake_scores(_module: object, cohort: evaluation.Cohort, _task: object) -> np.ndarray:
    mean = cohort.images.mean(axis=(1, 2)) / 65535
    return np.stack([1 - mean, mean], axis=1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Path:
    loaded = model_file.TrainedModel(_FakeNetwork(), STUDY)  # type: ignore[arg-type]
    monkeypatch.setattr(model_file, "read_model", lambda _path, _device: loaded)
    monkeypatch.setattr(evaluation, "answers_for", _fake_scores)
    return Path("model.safetensors")


def _predict(*words: object) -> Result:
    app = typer.Typer()
    app.command()(client_group.predict)
    return commands.invoke(app, *words)


def test_predict_writes_sorted_rows(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "images"
    instances = sorted(
        write_dicom(folder / str(n), radiograph(n), bits_stored=12, patient_id=f"P{n}")
        for n in range(4)
    )
    (folder / "junk").write_text("x")
    result = _predict(model, folder, "--out", tmp_path / "s.csv")
    assert result.exit_code == 0
    assert "scores of 4 images of 4 patients" in result.stdout
    assert "A patient is called nodule at a mean score of 0.5 or more" in result.stdout
    assert "No operating point was chosen" in result.stdout
    assert "Could not use 1 file:\n  rejected: 1 (CLO-210, not a DICOM file)\n" in result.stderr
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("SOPInstanceUID", "file", "patient", "score_normal", "score_nodule"),
        *("patient_score_normal", "patient_score_nodule", "patient_call"),
    ]
    assert [row["SOPInstanceUID"] for row in rows] == instances
    for row in rows:
        assert float(row["score_normal"]) + float(row["score_nodule"]) == pytest.approx(1, abs=2e-6)
    assert len({row["score_normal"] for row in rows}) == 4


def test_a_patients_rows_name_the_patient_and_share_the_mean(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "s.csv"
    # One patient in two spellings, and another in whom Excel would see a formula.
    write_dicom(folder / "a" / "1", radiograph(1), bits_stored=12, patient_id="P1")
    write_dicom(folder / "a" / "2", radiograph(2), bits_stored=12, patient_id=" P1")
    write_dicom(folder / "=b" / "1", radiograph(3), bits_stored=12, patient_id="=2+3")
    result = _predict(model, folder, "--out", out, "--patient-ids", "--bom", "--json")
    assert json.loads(result.stdout) == {
        "out": str(out), "kind": "scores", "images": 3, "patients": 2, "rejected": 0,
        "reasons": {}, "threshold": 0.5, "operating_point": None,
    }  # fmt: skip
    assert out.read_bytes().startswith(b"\xef\xbb\xbfSOPInstanceUID,file,patient,PatientID,")
    with out.open(newline="", encoding="utf-8-sig") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    one, two, other = rows["a/1"], rows["a/2"], rows["'=b/1"]
    assert one["patient"] == two["patient"] != other["patient"]
    assert (one["PatientID"], other["PatientID"]) == ("P1", "'=2+3")
    mean = (float(one["score_nodule"]) + float(two["score_nodule"])) / 2
    assert mean != pytest.approx(float(one["score_nodule"]), abs=1e-4)
    assert float(two["patient_score_nodule"]) == pytest.approx(mean, abs=2e-6)
    assert one["patient_score_nodule"] == two["patient_score_nodule"]
    assert other["patient_score_nodule"] == other["score_nodule"]
    # The next file names nobody alike, and has no number unless one asks for it.
    again = tmp_path / "t.csv"
    assert "0 files" not in _predict(model, folder, "--out", again).stderr
    assert one["patient"] not in again.read_text()
    assert "P1" not in again.read_text()


def test_files_that_cannot_be_used_are_listed_and_may_be_a_failure(
    tmp_path: Path, model: Path
) -> None:
    folder = tmp_path / "images"
    write_dicom(folder / "1")
    write_dicom(folder / "ct", modality="CT")
    (folder / "a\x1b[2J").write_text("x")
    done = predict(model, folder, tmp_path / "s.csv", device="cpu")
    assert done.rejected == {"a\x1b[2J": Reject.NOT_DICOM, "ct": Reject.MODALITY}
    assert "[2J" not in repr(done)
    result = _predict(
        model, folder, "--out", tmp_path / "s.csv", "--overwrite", "--strict", "--list-rejected"
    )
    assert result.exit_code == 3
    assert "Could not use 2 files:" in result.stderr
    assert "  CLO-210  a\\x1b[2J\n  CLO-215  ct\n" in result.stderr


def test_the_output_is_judged_before_an_image_is_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "images", tmp_path / "model.safetensors"
    write_dicom(folder / "1")
    real.write_bytes(b"weights")
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr(prediction, "read_folder", lambda *_, **__: pytest.fail("read"))
    for out, why in {
        tmp_path / "there.csv": "exists already",
        tmp_path / "none" / "s.csv": "There is no folder",
        folder / "s.csv": "in the folder of the images",
        tmp_path / "link" / "s.csv": "in the folder of the images",
        real: "is the model itself",
        tmp_path / "link": "not a regular file",
        tmp_path / ("a" * 300): "cannot be written",
    }.items():
        with raises(OutputInTheWay, match=why):
            predict(real, folder, out, device="cpu")
    with raises(OutputInTheWay, match="is the model itself"):
        predict(real, folder, real, device="cpu", overwrite=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        # Root may write anywhere.
        patched.setattr(tempfile, "mkstemp", refuse)
        with raises(OutputInTheWay, match="s.csv cannot be written. Permission denied"):
            predict(real, folder, tmp_path / "s.csv", device="cpu")
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert real.read_bytes() == b"weights"
    assert len(list(tmp_path.iterdir())) == 4


def _written(path: Path) -> None:
    path.write_text("mine")


def test_a_file_that_comes_meanwhile_is_kept(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "s.csv"
    write_dicom(folder / "1")
    with raises(OutputInTheWay, match="exists already"):
        predict(model, folder, out, device="cpu", progress=lambda *_: _written(out))
    assert out.read_text() == "mine"
    assert predict(model, folder, out, device="cpu", overwrite=True).images == 1
    assert out.read_text().startswith("SOPInstanceUID")


def test_predict_failures_leave_no_file(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "s.csv"
    with pytest.raises(FolderUnreadable):
        predict(model, folder, out, device="cpu")
    folder.mkdir()
    with raises(SiteEmpty, match="CR, DX"):
        predict(model, folder, out, device="cpu")
    with raises(OptionInvalid):
        predict(model, folder, out, device="warp")
    write_dicom(folder / "1")
    with pytest.raises(OutputInTheWay):
        predict(model, folder, tmp_path / "none" / "s.csv", device="cpu")
    assert not out.exists()


def test_scores_are_not_written_where_git_would_offer_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    write_dicom(tmp_path / "images" / "1")
    predict(model, Path("images"), None, device="cpu")
    assert (tmp_path / ".gitignore").read_text().splitlines()[1:] == ["/.gitignore", "/scores.csv"]
    # A person's own is left as it is, and no image is read.
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    (tmp_path / "scores.csv").unlink()
    with pytest.raises(OutputInTheWay):
        predict(model, Path("nowhere"), None, device="cpu")
    assert (tmp_path / ".gitignore").read_text() == "*.pyc\n"
    assert not (tmp_path / "scores.csv").exists()


def test_predict_with_a_real_model(tmp_path: Path) -> None:
    from cloister_fl.networks import flat_parameters, registry

    module = registry.build(STUDY.network, outputs=2, size=32, seed=0)
    path = tmp_path / "model.safetensors"
    model_file.save_model(path, STUDY, flat_parameters.flatten(module), {})
    write_dicom(tmp_path / "images" / "1")
    done = predict(path, tmp_path / "images", tmp_path / "s.csv", device="auto")
    assert done.images == 1
    assert (tmp_path / "s.csv").read_text().startswith("SOPInstanceUID,file,patient,score_normal,")
    # The other class, at a threshold that every score reaches: called by the model's own point.
    (tmp_path / "s.csv").unlink()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    point = '{"class": "normal", "threshold": 0.01, "patients": 120}'
    save_file(tensors, path, {**metadata, "operating_point": point})
    result = _predict(path, tmp_path / "images", "--out", tmp_path / "s.csv")
    assert "called normal at a mean score of 0.01 or more, else nodule. This" in result.stdout
    assert "operating point was chosen on 120 patients of a hold-out." in result.stdout
    assert (tmp_path / "s.csv").read_text().rstrip().endswith(",normal")


def test_predict_with_a_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cloister_fl.client.data.cohort import Cohort
    from cloister_fl.client.training.sampling import Bag, pixels_of
    from cloister_fl.networks import flat_parameters, pretrained, registry
    from cloister_fl.study.schema import Network

    study = STUDY.model_copy(update={"network": Network(name="efficientnet-lite0")})
    module = registry.build(study.network, outputs=2, size=32, seed=0)
    head = np.random.default_rng(5).normal(0, 3, 1281).astype(np.float32)
    flat_parameters.load(module, head)
    path = tmp_path / "model.safetensors"
    model_file.save_model(path, study, head, {})
    # The head travels, the 13 MB below it do not.
    assert path.stat().st_size < 10_000
    write_dicom(tmp_path / "images" / "1")
    seen: list[Cohort] = []
    honest = evaluation.answers_for
    monkeypatch.setattr(
        evaluation, "answers_for", lambda m, c, task: seen.append(c) or honest(m, c, task)
    )
    predict(path, tmp_path / "images", tmp_path / "s.csv", device="cpu")
    with (tmp_path / "s.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    with torch.no_grad():
        expected = torch.softmax(module(pixels_of(seen[0], [Bag(np.array([0]))])), dim=1)[0]
    assert float(row["score_nodule"]) == pytest.approx(float(expected[1]), abs=2e-6)
    assert 0.001 < float(row["score_nodule"]) < 0.999
    (tmp_path / "s.csv").unlink()
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with raises(ExtraMissing, match=r"install.*pretrained"):
        predict(path, tmp_path / "none", tmp_path / "s.csv", device="cpu")
    assert not (tmp_path / "s.csv").exists()


def test_status_tells_the_operator_why_the_site_last_said_no(tmp_path: Path) -> None:
    """The coordinator is told one word of a closed list, and to ask the site's own operator."""
    site = init_site(tmp_path / "north")
    assert "refused" not in _run("status", "--dir", site.root)[1]
    keep_last_refusal(
        site.root, FolderUnreadable("The data folder cannot be read.", remedy="Mend it.")
    )
    status, told = _run("status", "--dir", site.root)
    assert status == 9
    assert "CLO-205: The data folder cannot be read. Mend it." in told
    told = json.loads(_run("status", "--json", "--dir", site.root)[1])
    assert told["last_refusal"]["code"] == "CLO-205"
    clear_last_refusal(site.root)
    assert "refused" not in _run("status", "--dir", site.root)[1]
