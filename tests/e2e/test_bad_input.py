"""Bad input, through the command line that people type: each has its number and its status.

Whatever is wrong, no traceback is shown, the message says where, and nothing half-written is left.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cloister_fl.cli.main import main
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.errors import FolderUnreadable
from support.errors import raises
from support.federations import approve, study, study_text, write_cohort, write_federation

NAMES = ("anker", "birke")
ASKED = {"aggregation": "secure = false\nmin_sites = 2", "training": "rounds = 1\nsteps = 1"}
POLICY = """[policy]
patients_at_most = 1000
min_sites = 2
require_secure_aggregation = false
max_epsilon_study = 6
max_epsilon_lifetime = 100
"""


class Told(NamedTuple):
    """How the command ended, and what it printed."""

    status: int
    out: str
    err: str


class Place:
    """A folder with a sound federation in ``sites`` and its study; a test breaks one thing."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.sites = root / "sites"
        self.out = root / "out"
        self.study = root / "study.toml"
        self._capsys = capsys

    def command(self, *arguments: str | Path) -> Told:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = self._capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert isinstance(ended.value.code, int)
        return Told(ended.value.code, printed.out, printed.err)

    def simulate(self, *more: str | Path) -> Told:
        return self.command("simulate", self.study, "--sites", self.sites, "--out", self.out, *more)

    def check(self, name: str, *more: str | Path) -> Told:
        """``client init`` and ``client check`` on the data of one site."""
        site = self.root / "checked" / name
        data = self.sites / name
        given = ("--dicom", data / "dicom", "--labels", data / "labels.csv")
        assert self.command("client", "init", site, *given).status == 0
        text = (site / "site.toml").read_text("utf-8")
        for strict, mild in (
            ("patients_at_most = 0", "patients_at_most = 1000"),
            ("min_sites = 5", "min_sites = 2"),
            ("max_epsilon_study = 3.0", "max_epsilon_study = 6.0"),
            ("require_secure_aggregation = true", "require_secure_aggregation = false"),
        ):
            assert strict in text or mild in text
            text = text.replace(strict, mild)
        (site / "site.toml").write_text(text, "utf-8")
        return self.command("client", "check", "--dir", site, "--study", self.study, *more)

    def rows(self, name: str) -> list[str]:
        return (self.sites / name / "labels.csv").read_text("utf-8").splitlines()

    def write_rows(self, name: str, rows: list[str]) -> None:
        (self.sites / name / "labels.csv").write_text("\n".join(rows) + "\n", "utf-8")

    def untouched(self) -> bool:
        return not self.out.exists()

    def nothing_half_written(self) -> bool:
        """Whether a run that ended early left no result, no round and no temporary file."""
        results = {"summary.json", "model.safetensors", "report.html", "metrics.jsonl"}
        left = {path.name for path in self.out.rglob("*") if path.is_file()}
        temporary = [name for name in left if name.endswith((".tmp", "-journal"))]
        return not left & results and not temporary and not (self.out / "checkpoint").exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write_federation(root / "sites", names=NAMES)
    (root / "study.toml").write_text(study_text(**ASKED), encoding="utf-8")
    return root


@pytest.fixture
def place(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    root = tmp_path / "place"
    shutil.copytree(sound, root)
    return Place(root, capsys)


def test_what_the_tests_break_is_sound(place: Place) -> None:
    told = place.simulate("--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["site_names"] == list(NAMES)
    assert place.check("birke").status == 0


FAULTY = """\
[study]
name = "Bright Half"
question = "Is the upper half brighter?"

[input]
size = "large"
modalities = ["DX"]

[target]
column = "finding"
classes = ["no", "yes"]

[training]
round = 3
learning_rate = -0.5

[privacy]
epsilon = 0
"""
FAULTS = {
    2: "study.name",
    6: "input.size",
    14: "training.round",
    15: "training.learning_rate",
    18: "privacy.epsilon",
}


@pytest.mark.parametrize("command", ["check", "simulate"])
def test_all_faults_of_a_study_are_told_at_once(place: Place, command: str) -> None:
    place.study.write_text(FAULTY, encoding="utf-8")
    told = (
        place.simulate() if command == "simulate" else place.command("study", "check", place.study)
    )
    assert told.status == 2
    assert told.err.startswith("CLO-101: study.toml has 5 faults:\n")
    for line, key in FAULTS.items():
        assert f"\n  line {line}: {key}: " in told.err
    assert "rounds" in told.err, "the nearest key is named"
    assert place.untouched()


def test_an_epsilon_of_zero_is_refused(place: Place) -> None:
    text = study_text(**ASKED, privacy="epsilon = 0")
    place.study.write_text(text, encoding="utf-8")
    told = place.simulate()
    assert told.status == 2
    line = text.splitlines().index("epsilon = 0") + 1
    assert told.err.startswith("CLO-101: study.toml has 1 fault:")
    assert f"line {line}: privacy.epsilon: " in told.err
    assert place.untouched()


def test_more_sites_asked_for_than_given(place: Place) -> None:
    place.study.write_text(study_text(aggregation="min_sites = 3"), encoding="utf-8")
    told = place.simulate()
    assert told.status == 2
    assert told.err.startswith("CLO-105: ")
    assert "at least 3 sites" in told.err
    assert f"{place.sites} has 2." in told.err
    assert place.untouched()


@pytest.mark.parametrize("missing", ["study.toml", "sites"])
def test_a_file_that_is_not_there(place: Place, missing: str) -> None:
    path = place.root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = place.simulate()
    assert told.status == 2
    assert told.err.startswith("CLO-103: ")
    assert missing in told.err
    assert place.untouched()


def _missing_label(place: Place) -> None:
    place.write_rows("birke", [row for row in place.rows("birke") if "-005" not in row])


def _label_without_image(place: Place) -> None:
    place.write_rows("birke", [*place.rows("birke"), "MRN-nobody,yes"])


def _empty_site(place: Place) -> None:
    shutil.rmtree(place.sites / "birke" / "dicom")
    (place.sites / "birke" / "dicom").mkdir()


def _unknown_class(place: Place) -> None:
    place.write_rows("birke", [row.replace(",yes", ",perhaps") for row in place.rows("birke")])


def _no_labels_file(place: Place) -> None:
    (place.sites / "birke" / "labels.csv").unlink()


def _too_few(place: Place) -> None:
    shutil.rmtree(place.sites / "birke")
    write_cohort(place.sites / "birke", np.random.default_rng(1), "MRN-few", patients=8)


def _only_what_is_no_dicom(place: Place) -> None:
    for path in (place.sites / "birke" / "dicom").rglob("*.dcm"):
        path.write_bytes(b"not an image")


AT_A_SITE = {
    "CLO-201": _missing_label,
    "CLO-202": _label_without_image,
    "CLO-203": _empty_site,
    "CLO-203 no DICOM": _only_what_is_no_dicom,
    "CLO-206": _unknown_class,
    "CLO-206 no file": _no_labels_file,
    "CLO-207": _too_few,
}


@pytest.mark.parametrize("fault", AT_A_SITE)
def test_a_fault_at_a_site_names_the_site_and_the_fault(place: Place, fault: str) -> None:
    code = fault.split(maxsplit=1)[0]
    AT_A_SITE[fault](place)
    told = place.simulate()
    assert told.status == 6
    assert told.err.startswith("CLO-501: 1 of 2 sites take part, and 2 are needed.")
    assert f"\n  birke: {code}: " in told.err
    assert "anker:" not in told.err
    assert "MRN" not in told.err
    assert place.nothing_half_written()
    (notice,) = data_notices(place.out / "sites" / "birke").values()
    assert notice.code == code

    checked = place.check("birke")
    assert checked.status == 3
    assert f"\n{code}: " in checked.out
    assert "MRN" not in checked.out + checked.err


@pytest.mark.parametrize("what", ["file", "absent"])
def test_a_data_folder_that_cannot_be_read(place: Place, what: str) -> None:
    path = place.sites / "birke" / "dicom"
    shutil.rmtree(path)
    if what == "file":
        path.write_text("not a folder")
    (place.sites / "birke" / "site.toml").write_text(f'[site]\nname = "birke"\n{POLICY}')
    with raises(FolderUnreadable):
        approve(place.sites / "birke", study(**ASKED))
    told = place.simulate()
    assert told.status == 6
    assert told.err.startswith("CLO-501: ")
    assert "\n  birke: CLO-307: " in told.err
    assert place.nothing_half_written()
    checked = place.command("client", "check", "--dir", place.sites / "birke")
    assert checked.status == 3
    assert "\nCLO-205: " in checked.out


def test_a_folder_without_a_data_folder_is_no_site(place: Place) -> None:
    path = place.sites / "birke" / "dicom"
    shutil.rmtree(path)
    path.write_text("not a folder")
    told = place.simulate()
    assert told.status == 2
    assert told.err.startswith("CLO-106: birke in ")
    assert place.untouched()


def test_files_that_are_no_image_do_not_stop_a_run(place: Place) -> None:
    dicom = place.sites / "birke" / "dicom"
    sound = (dicom / "003" / "0.dcm").read_bytes()
    (dicom / "notes.txt").write_text("not an image " * 50)
    (dicom / "003" / "1.dcm").write_bytes(sound[: len(sound) // 2])
    told = place.simulate("--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["site_names"] == list(NAMES)
    assert not list(place.out.rglob("*.tmp"))

    checked = place.check("birke")
    assert checked.status == 0
    assert "1  CLO-210  not a DICOM file" in checked.out
    assert "1  CLO-211  truncated or damaged DICOM file" in checked.out
    as_json = json.loads(place.check("birke", "--json").out)
    assert [(one["code"], one["count"]) for one in as_json["rejects"]] == [
        ("CLO-210", 1),
        ("CLO-211", 1),
    ]


def test_a_study_that_a_site_s_policy_refuses(place: Place) -> None:
    (place.sites / "birke" / "site.toml").write_text('[site]\nname = "birke"\n')
    told = place.simulate()
    assert told.status == 6
    assert "birke: its policy does not allow the study" in told.err
    assert "\n  birke: CLO-303: " in told.err
    assert place.nothing_half_written()


def test_faults_of_a_site_file_are_told_with_their_lines(place: Place) -> None:
    (place.sites / "birke" / "site.toml").write_text(
        '[site]\nname = "Birke!"\n[policy]\nmax_epsilon_study = 0\n'
    )
    told = place.simulate()
    assert told.status == 2
    assert told.err.startswith("CLO-102: ")
    assert "line 2: site.name: " in told.err
    assert "line 4: policy.max_epsilon_study: " in told.err
    assert place.nothing_half_written()


def test_an_output_in_the_way_is_left_alone(place: Place) -> None:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("mine")
    told = place.simulate()
    assert told.status == 2
    assert told.err.startswith("CLO-104: ")
    assert [path.name for path in place.out.iterdir()] == ["mine.txt"]


def test_a_holdout_that_cannot_be_used(place: Place) -> None:
    holdout = place.root / "holdout"
    write_cohort(holdout, np.random.default_rng(3), "HOLD", patients=8)
    rows = (holdout / "labels.csv").read_text("utf-8").replace(",yes", ",no")
    (holdout / "labels.csv").write_text(rows, encoding="utf-8")
    told = place.simulate("--holdout", holdout)
    assert told.status == 3
    assert told.err.startswith("CLO-204: ")
    assert place.nothing_half_written()
