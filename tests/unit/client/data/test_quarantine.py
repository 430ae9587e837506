"""Quarantined files wait for a decision, which is by content and logged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cloister_fl.client.cli import data_commands
from cloister_fl.client.data import quarantine
from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.data.quarantine import (
    Decision,
    QuarantinedFile,
    decide,
    look,
    picture,
    quarantined_files,
)
from cloister_fl.client.site.audit_log import as_dict, entries_of
from cloister_fl.client.site.audit_log import render as render_log
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import FileUnreadable, OptionInvalid, Reject
from support import studies
from support.dicom import make_dicom, radiograph, write_site
from support.errors import raises
from support.segmentations import segment
from support.segmented_site import STUDY as OUTLINED

pytestmark = pytest.mark.process


STUDY = studies.study()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_site(tmp_path, 4, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    held_files = {
        "a-named": {"elements": {"BurnedInAnnotation": "YES"}},
        "b-capture": {"elements": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}},
        "c-stray": {"preamble": bytes(127) + b"\1"},
        "d-colour": {"elements": {"PhotometricInterpretation": "RGB"}},
    }
    for number, (name, options) in enumerate(held_files.items()):
        (site.dicom / name).write_bytes(
            make_dicom(
                radiograph(50 + number),
                bits_stored=12,
                patient_id="MRN00001",
                **options,  # type: ignore[arg-type]
            )
        )
    return site


def _reasons(site: Site) -> list[Reject | None]:
    return [one.reason for one in quarantined_files(site)]


def _images(site: Site) -> int:
    reading = read_cohort(site, STUDY)
    assert not reading.faults
    assert reading.cohort is not None
    return len(reading.cohort.images)


def test_what_is_held_is_listed_and_not_read(site: Site) -> None:
    assert _reasons(site) == [Reject.BURNED_IN, Reject.CAPTURE, Reject.PREAMBLE]
    assert _images(site) == 4
    assert read_cohort(site, STUDY).rejects == {
        Reject.COLOUR: 1, Reject.PREAMBLE: 1, Reject.BURNED_IN: 1, Reject.CAPTURE: 1,
    }  # fmt: skip


def test_a_release_lets_one_file_in_and_is_logged(site: Site) -> None:
    named, capture, stray = quarantined_files(site)
    decide(site, named, Decision.RELEASED, why="a plain L, no name")
    assert _images(site) == 5
    decide(site, stray, Decision.RELEASED, why="an old export tool")
    decide(site, capture, Decision.KEPT, why="shows a name")
    assert _images(site) == 6
    listed = quarantined_files(site)
    assert [one.reason for one in listed] == [None, Reject.CAPTURE, None]
    judged = [one.judgement for one in listed]
    assert [one and (one.decision, one.why) for one in judged] == [
        (Decision.RELEASED, "a plain L, no name"),
        (Decision.KEPT, "shows a name"),
        (Decision.RELEASED, "an old export tool"),
    ]
    noted = [one.body for one in entries_of(site) if one.kind == "quarantine"]
    assert [(one["decision"], one["held_for"], one["why"]) for one in noted] == [
        ("released", "CLO-223", "a plain L, no name"),
        ("released", "CLO-219", "an old export tool"),
        ("kept", "CLO-234", "shows a name"),
    ]
    assert noted[0]["file"] == named.short_id
    told = render_log(site, entries_of(site))
    assert f"{named.short_id} released (CLO-223): a plain L, no name" in told
    assert f"{capture.short_id} kept (CLO-234): shows a name" in told
    assert [one["why"] for one in as_dict(site, entries_of(site))["quarantine"]] == [  # type: ignore[attr-defined]
        "a plain L, no name", "an old export tool", "shows a name",
    ]  # fmt: skip


def test_a_release_that_lets_nothing_in_can_be_taken_back(site: Site) -> None:
    """A segmentation is read for no list and no picture, so a held one stays out."""
    source = (site.dicom / "c-stray").read_bytes()
    outlined = bytearray(segment([source], np.ones((1, 48, 40), bool)))
    outlined[:2] = b"MZ"
    (site.dicom / "e-outlined").write_bytes(outlined)
    *_, last = quarantined_files(site)
    assert last.reason is Reject.PREAMBLE
    decide(site, last, Decision.RELEASED, why="a tool of ours")
    *_, last = quarantined_files(site)
    assert (last.reason, last.judgement and last.judgement.decision) == (
        Reject.SOP_CLASS, Decision.RELEASED,
    )  # fmt: skip
    reading = read_cohort(site, OUTLINED)
    assert reading.rejects[Reject.PREAMBLE] == 2
    assert reading.segmentations == ()
    decide(site, last, Decision.KEPT, why="it is no use")
    *_, last = quarantined_files(site)
    assert last.judgement is not None
    assert last.judgement.decision is Decision.KEPT


def test_a_release_can_be_taken_back(site: Site) -> None:
    named = quarantined_files(site)[0]
    decide(site, named, Decision.RELEASED, why="looks fine")
    assert _images(site) == 5
    decide(site, named, Decision.KEPT, why="it does show a name")
    # Its pixels lie in the cache from before; they are not used.
    assert _images(site) == 4
    assert quarantined_files(site)[0].reason is Reject.BURNED_IN


@pytest.mark.parametrize("how", ["older", "edited"])
def test_a_release_that_the_log_took_back_does_not_come_back(site: Site, how: str) -> None:
    named = quarantined_files(site)[0]
    path = site.root / "quarantine.json"
    decide(site, named, Decision.RELEASED, why="looks fine")
    before = path.read_text()
    decide(site, named, Decision.KEPT, why="it does show a name")
    path.write_text(before if how == "older" else path.read_text().replace("kept", "released"))
    assert _images(site) == 4
    assert quarantined_files(site)[0].reason is Reject.BURNED_IN
    assert quarantined_files(site)[0].judgement is None
    decide(site, named, Decision.RELEASED, why="looked again")
    assert _images(site) == 5


@pytest.mark.parametrize("decision", Decision)
def test_killed_between_decision_and_log_nothing_is_released(
    site: Site, monkeypatch: pytest.MonkeyPatch, decision: Decision
) -> None:
    named = quarantined_files(site)[0]
    if decision is Decision.KEPT:
        decide(site, named, Decision.RELEASED, why="looks fine")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    second = "write_atomic" if decision is Decision.RELEASED else "log_of"
    with monkeypatch.context() as patched:
        patched.setattr(quarantine, second, killed)
        with pytest.raises(KeyboardInterrupt):
            decide(site, named, decision, why="x")
    assert _images(site) == 4


def test_a_file_that_is_held_twice_is_listed_for_what_it_may_show(site: Site) -> None:
    both = {
        "e": {"elements": {"BurnedInAnnotation": "YES"}},
        "f": {"elements": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}},
        "g": {"elements": {"PhotometricInterpretation": "RGB"}},
    }
    for number, (name, options) in enumerate(both.items()):
        made = make_dicom(
            radiograph(70 + number), bits_stored=12, preamble=bytes(127) + b"\1", **options
        )  # type: ignore[arg-type]
        (site.dicom / name).write_bytes(made)
    assert _reasons(site)[3:] == [Reject.BURNED_IN, Reject.CAPTURE, Reject.PREAMBLE]


def test_where_a_file_lies_is_said_without_what_a_terminal_obeys(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.dicom / "a-named").rename(site.dicom / "x\x1b]0;title\x07\nReleased at north: all\udcff")
    app = typer.Typer()
    app.command()(data_commands.show)
    named = quarantined_files(site)[-1]
    result = CliRunner().invoke(app, [named.short_id, "--dir", str(site.root)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(r"x\x1b]0;title\x07\nReleased at north: all\udcff")


def test_a_release_is_of_the_content_not_of_the_name(site: Site) -> None:
    decide(site, quarantined_files(site)[0], Decision.RELEASED, why="looks fine")
    (site.dicom / "a-named").rename(site.dicom / "zz-moved")
    assert _images(site) == 5
    (site.dicom / "zz-moved").write_bytes(
        make_dicom(
            radiograph(60), bits_stored=12, patient_id="MRN00001",
            elements={"BurnedInAnnotation": "YES"},
        )
    )  # fmt: skip
    assert _images(site) == 4


def test_a_picture_of_what_is_held(site: Site) -> None:
    named = quarantined_files(site)[0]
    path, data = look(site, named)
    assert path == site.dicom.resolve() / "a-named"
    assert data == path.read_bytes()
    with Image.open(io.BytesIO(picture(data))) as image:
        assert (image.size, image.mode, image.info) == ((512, 512), "L", {})
        pixels = np.asarray(image)
    assert int(pixels.max()) - int(pixels.min()) > 200
    with raises(OptionInvalid, match="CLO-218"):
        picture((site.dicom / "d-colour").read_bytes())


def test_a_file_that_is_swapped_after_the_look_is_not_released(site: Site) -> None:
    """Who can write to the folder shows one image, and has another released."""
    named = quarantined_files(site)[0]
    path, _ = look(site, named)
    path.write_bytes(
        make_dicom(
            radiograph(61), bits_stored=12, patient_id="MRN00001",
            elements={"BurnedInAnnotation": "YES"},
        )
    )  # fmt: skip
    assert named.short_id not in {one.short_id for one in quarantined_files(site)}
    with raises(OptionInvalid, match="changed"):
        look(site, named)
    decide(site, named, Decision.RELEASED, why="what I saw is fine")
    assert _images(site) == 4


@pytest.mark.parametrize("why", ["", "   ", "two\nlines"])
def test_a_decision_needs_a_reason(site: Site, why: str) -> None:
    with raises(OptionInvalid):
        decide(site, quarantined_files(site)[0], Decision.RELEASED, why=why)
    assert _images(site) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9}', '{"version": 1}'])
def test_damaged_decisions_release_nothing(site: Site, text: str) -> None:
    decide(site, quarantined_files(site)[0], Decision.RELEASED, why="looks fine")
    (site.root / "quarantine.json").write_text(text)
    with pytest.raises(FileUnreadable):
        read_cohort(site, STUDY)


def test_nothing_is_kept_that_names_a_patient(site: Site) -> None:
    listed = quarantined_files(site)
    decide(site, listed[0], Decision.RELEASED, why="looks fine")
    told = json.dumps([one.as_dict() for one in listed]) + quarantine.render(listed)
    told += repr(listed) + (site.root / "quarantine.json").read_text()
    assert "MRN" not in told
    assert "a-named" not in told
    assert (site.root / "quarantine.json").stat().st_mode & 0o777 == 0o600


def test_the_list_in_words() -> None:
    waiting = QuarantinedFile("", Reject.BURNED_IN, None, bytes.fromhex("0123456789abcdef"))
    text = quarantine.render([waiting])
    assert "0123456789ab  waiting   CLO-223  text may be burned into the pixels" in text
    assert "1 of 1 quarantined file has no decision yet." in text
    assert quarantine.render([]) == "No quarantined files."
