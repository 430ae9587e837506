"""Plant names in everything that a hospital's data can carry, and look for them everywhere else.

Names of patients stand in DICOM elements, in values that the standard does not allow (libraries
quote those in warnings), in names of files and folders below ``dicom/``, in further columns of the
labels, in files that are no DICOM, and in the pixels' own bytes. A run, a failing run and
``client check`` follow; then every file that they left, everything printed and every message is
searched. A site's ``site.toml`` names the folder that its own operator gave, and no path below it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message

from cloister_fl.cli.main import main
from cloister_fl.client.app import app
from cloister_fl.errors import Reject
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.dicom import uid, write_dicom
from support.federations import picture, study, study_text

NAMES = ("anker", "birke", "clara")
PATIENTS = 24
WORDS = {
    "name": "QANARYNAME",
    "id": "QANARYMRN",
    "accession": "QANARYACC",
    "institution": "QANARYINST",
    "physician": "QANARYPHYS",
    "comment": "QANARYCOMMENT",
    "description": "QANARYDESC",
    "address": "QANARYADDR",
    "date": "QANARYDATE",
    "age": "QANARYAGE",
    "uid": "QANARYUID",
    "charset": "QANARYCHARSET",
    "private": "QANARYPRIVATE",
    "folder": "qanaryfolder",
    "file": "qanaryfile",
    "column": "qanarycolumn",
    "cell": "QANARYCELL",
    "text": "QANARYTEXT",
}
PIXEL_BYTES = 48
"""Bytes of an image that are looked for: noise, so no other place holds them by chance."""

MASKED = "min_sites = 3\ncolluders = 0"
ASKED = {"aggregation": MASKED, "training": "rounds = 2"}


class Canaries:
    """What is looked for, and the search."""

    def __init__(self, words: Iterable[str], raw: Iterable[bytes] = ()) -> None:
        self.patterns: dict[bytes, str] = {}
        for word in words:
            for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
                self.patterns[word.lower().encode(encoding)] = word
            # Hexadecimal and Base64 hide the case, so each is looked for.
            for case in {word, word.lower(), word.upper()}:
                plain = case.encode()
                self.patterns[plain.hex().encode()] = word
                for shift in range(3):
                    coded = base64.b64encode(bytes(shift) + plain)
                    # What the neighbours touch is cut off.
                    inner = coded[4 if shift else 0 : -4]
                    self.patterns[inner.lower()] = word
        for content in raw:
            self.patterns[content.lower()] = "pixels"

    def within(self, content: bytes) -> set[str]:
        """Which canaries stand in the bytes, in any case, encoding, hexadecimal or Base64."""
        lowered = content.lower()
        return {word for pattern, word in self.patterns.items() if pattern in lowered}

    def below(self, *roots: Path, excused: Iterable[Path] = ()) -> dict[str, set[str]]:
        """Search every file, its name included; return what was found, by path."""
        spared = set(excused)
        found = {}
        for root in roots:
            for path in sorted(root.rglob("*")):
                hits = self.within(os.fsencode(path.relative_to(root)))
                if path.is_file() and path not in spared:
                    hits |= self.within(path.read_bytes())
                if hits:
                    found[str(path)] = hits
        return found


def _elements(site: str, number: int, image: int) -> dict[str, object]:
    instance = uid("canary", site, number, image)
    return {
        "PatientName": f"{WORDS['name']}^Given",
        "AccessionNumber": f"{WORDS['accession']}{number}",
        "InstitutionName": WORDS["institution"],
        "ReferringPhysicianName": WORDS["physician"],
        "PatientComments": WORDS["comment"],
        "StudyDescription": WORDS["description"],
        "PatientAddress": WORDS["address"],
        # Not allowed, and quoted by a library that warns of it.
        "PatientBirthDate": WORDS["date"],
        "PatientAge": WORDS["age"],
        "StudyInstanceUID": WORDS["uid"],
        "IssuerOfPatientID": WORDS["private"],
        "SOPInstanceUID": instance,
    }


def _write_site(folder: Path, seed: int, *, unlabelled: bool = False) -> Iterator[bytes]:
    """Write a site full of canaries; yield bytes of its pixels."""
    rng = np.random.default_rng(seed)
    rows = [f"PatientID,finding,{WORDS['column']}"]
    below = folder / "dicom" / WORDS["folder"]
    for number in range(PATIENTS):
        patient = f"{WORDS['id']}-{folder.name}-{number:03d}"
        if not (unlabelled and number == 5):
            rows.append(f"{patient},{('no', 'yes')[number % 2]},{WORDS['cell']}")
        for image in range(2):
            elements = _elements(folder.name, number, image)
            if number == 3 and image == 1:
                elements["SpecificCharacterSet"] = WORDS["charset"]
            pixels = picture(rng, number % 2)
            path = below / f"{patient}" / f"{WORDS['file']}-{image}.dcm"
            write_dicom(path, pixels, patient_id=patient, bits_stored=12, elements=elements)
            yield pixels.tobytes()[:PIXEL_BYTES]
    sound = (below / f"{WORDS['id']}-{folder.name}-000" / f"{WORDS['file']}-0.dcm").read_bytes()
    (below / f"{WORDS['file']}-cut.dcm").write_bytes(sound[: len(sound) * 2 // 3])
    (below / f"{WORDS['file']}.txt").write_text(WORDS["text"] * 100, encoding="utf-8")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Canaries]:
    """Folders ``sites``, ``broken`` (a label is missing) and ``holdout``; and what they carry."""
    root = tmp_path_factory.mktemp("planted")
    pixels: list[bytes] = []
    for seed, name in enumerate(NAMES):
        pixels += _write_site(root / "sites" / name, seed)
    pixels += _write_site(root / "holdout", 7)
    for name in ("anker", "clara"):
        shutil.copytree(root / "sites" / name, root / "broken" / name)
    pixels += _write_site(root / "broken" / "birke", 9, unlabelled=True)
    (root / "private.toml").write_text(study_text(**ASKED), encoding="utf-8")
    (root / "open.toml").write_text(
        study_text(**ASKED, privacy="enabled = false"), encoding="utf-8"
    )
    instances = [
        uid("canary", name, number, image)
        for name in (*NAMES, "holdout")
        for number in range(PATIENTS)
        for image in range(2)
    ]
    return root, Canaries([*WORDS.values(), *instances], pixels)


def _site_files(out: Path) -> list[Path]:
    """The files that may name the folder of a site's data, and must name nothing below it."""
    files = sorted(out.rglob("site.toml"))
    for file in files:
        assert f"/{WORDS['folder']}" not in file.read_text("utf-8")
    return files


def _run(*arguments: str) -> tuple[int, bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("CLOISTER_TRACEBACK", None)
    done = subprocess.run(
        [sys.executable, "-m", "cloister_fl.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "where", ["plain", "upper", "utf-16", "hex", "base64", "name", "pixels", "ledger"]
)
def test_the_search_finds_what_is_planted(tmp_path: Path, where: str) -> None:
    pixels = bytes(range(200, 248))
    canaries = Canaries(["QanaryPlanted"], [pixels])
    (tmp_path / "clean").write_bytes(b"nothing here " * 9)
    assert canaries.below(tmp_path) == {}
    contents = {
        "plain": b"{'who': 'qanaryplanted'}",
        "upper": b"<b>QANARYPLANTED</b>",
        "utf-16": "x QanaryPlanted x".encode("utf-16"),
        "hex": b"00" + b"QanaryPlanted".hex().encode() + b"00",
        "base64": base64.b64encode(b"xxxx QanaryPlanted xxxx"),
        "pixels": b"\0" * 7 + pixels + b"\0",
        "ledger": b"SQLite format 3\0" + b'{"run":"QanaryPlanted"}',
    }
    name = "of-qanaryplanted" if where == "name" else "file"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / name).write_bytes(contents.get(where, b""))
    assert canaries.below(tmp_path)


def test_the_canaries_are_where_they_were_planted(planted: tuple[Path, Canaries]) -> None:
    root, canaries = planted
    found = set().union(*canaries.below(root / "sites").values())
    assert set(WORDS.values()) | {"pixels", uid("canary", "anker", 0, 0)} <= found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["private", "open"])
def test_a_run_tells_nothing_of_a_patient(
    planted: tuple[Path, Canaries], tmp_path: Path, kind: str
) -> None:
    root, canaries = planted
    out = tmp_path / "run"
    status, told = _run(
        "simulate",
        str(root / f"{kind}.toml"),
        *("--sites", str(root / "sites"), "--out", str(out), "--holdout", str(root / "holdout")),
        *(["--json"] if kind == "open" else []),
    )
    assert status == 0, told.decode()
    written = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"report.html", "summary.json", "metrics.jsonl", "model.safetensors"} <= written
    assert {"state.safetensors", "progress.json"} <= written
    assert "ledger.sqlite" in written
    assert canaries.within(told) == set()
    assert canaries.below(out, excused=_site_files(out)) == {}


@pytest.mark.slow
def test_a_failing_run_tells_nothing_of_a_patient(
    planted: tuple[Path, Canaries], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, canaries = planted
    out = tmp_path / "run"
    arguments = ["simulate", str(root / "private.toml"), "--sites", str(root / "broken")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(out)])
    told = capfd.readouterr()
    assert ended.value.code == 6
    assert "birke: CLO-201" in told.err
    assert (out / "sites" / "birke" / "notice.json").is_file()
    assert canaries.within((told.out + told.err).encode()) == set()
    assert canaries.below(out, excused=_site_files(out)) == {}


@pytest.mark.parametrize(
    ("as_json", "broken"),
    [
        pytest.param(False, True, id="missing-label-text"),
        pytest.param(True, False, id="sound-json", marks=pytest.mark.slow),
        pytest.param(False, False, id="sound-text", marks=pytest.mark.slow),
        pytest.param(True, True, id="missing-label-json"),
    ],
)
@pytest.mark.parametrize(
    "judged", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "by-study"]
)
def test_a_check_tells_nothing_of_a_patient(
    planted: tuple[Path, Canaries],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    as_json: bool,
    broken: bool,
    judged: bool,
) -> None:
    root, canaries = planted
    data = root / ("broken" if broken else "sites") / "birke"
    site = tmp_path / "birke"
    given = ("--dicom", str(data / "dicom"), "--labels", str(data / "labels.csv"))
    with pytest.raises(SystemExit):
        main(["client", "init", str(site), *given])
    assert canaries.within("".join(capfd.readouterr()).encode()) == set()
    options = ["--json"] if as_json else []
    options += ["--study", str(root / "private.toml")] if judged else []
    # A process of its own: here, pytest would turn a library's warning into an error.
    status, content = _run("client", "check", "--dir", str(site), *options)
    told = content.decode()
    # The default policy does not allow this study; faults of the data come first.
    assert status == ((3 if broken else 4) if judged else 0)
    assert Reject.NOT_DICOM.value in told
    assert Reject.TRUNCATED.value in told
    assert ("CLO-201" in told) == (broken and judged)
    if as_json:
        assert json.loads(told)["site"] == "birke"
    assert canaries.within(content) == set()
    assert canaries.below(site, excused=_site_files(site)) == {}


class Recorder:
    """The product's ClientApp, and a note of every byte that goes in and comes out."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.kinds: set[str] = set()

    def __call__(self, message: Message, context: Context) -> Message:
        reply = app(message, context)
        self.replies.append(repr(reply.metadata).encode())
        assert not reply.has_error(), "a library's exception would travel in the error"
        for name, record in reply.content.items():
            self.replies.append(name.encode())
            if isinstance(record, ArrayRecord):
                for key, array in record.items():
                    described = f"{key} {array.dtype} {array.shape} {array.stype}"
                    self.replies += [described.encode(), bytes(array.data)]
            else:
                assert isinstance(record, ConfigRecord), "a record that nobody searches"
                for key, value in record.items():
                    content = value if isinstance(value, bytes) else repr(value).encode()
                    self.replies += [key.encode(), content]
                self.kinds.add(str(record.get("kind")))
        # Nor may anything wait in the state that Flower keeps for the node.
        self.replies.append(repr(context.state).encode())
        return reply


@pytest.mark.parametrize(
    ("folder", "privacy", "kinds"),
    [
        ("sites", "", {"prepared", "exchanged"}),
        ("sites", "enabled = false", {"prepared", "exchanged"}),
        ("plain", "", {"prepared", "update"}),
        pytest.param(
            "plain",
            "enabled = false",
            {"prepared", "update", "evaluated"},
            marks=pytest.mark.slow,
        ),
        ("broken", "", {"prepared", "update", "refusal"}),
    ],
    ids=["private", "open", "private-plain", "open-plain", "refusing"],
)
def test_no_message_tells_anything_of_a_patient(
    planted: tuple[Path, Canaries],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    folder: str,
    privacy: str,
    kinds: set[str],
) -> None:
    root, canaries = planted
    recorder = Recorder()
    asked = study(
        training="rounds = 2",
        aggregation=MASKED if folder == "sites" else "secure = false\nmin_sites = 1",
        privacy=privacy or "epsilon = 6",
    )
    found = root / ("broken" if folder == "broken" else "sites")
    run_simulation(Simulation(asked, found, tmp_path / "run"), client_app=recorder)
    assert recorder.kinds == kinds
    for content in recorder.replies:
        assert canaries.within(content) == set()
    paths = [os.fsencode(root), os.fsencode(tmp_path)]
    assert not any(path in content for path in paths for content in recorder.replies)
    told = capfd.readouterr()
    assert canaries.within((told.out + told.err).encode()) == set()
