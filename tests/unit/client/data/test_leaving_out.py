"""Data of which not all fits, frozen without the rest where the steward's settings say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.client.data import frozen_dataset
from cloister_fl.client.data.loading import freeze, load_for_run, read_for_check
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import CohortTooSmall, TooMuchLeftOut
from support import studies
from support.dicom import write_site
from support.errors import raises

pytestmark = pytest.mark.process

PATIENTS = 30
PRIVATE = studies.study()
OPEN = studies.study(privacy={"enabled": False})


def site_of(root: Path, *, percent: float | None, least: int = 10) -> Site:
    """Thirty patients of an image each; two lack a row, one file is damaged, one row is wrong."""
    write_site(root, PATIENTS)
    lines = (root / "labels.csv").read_text().splitlines()
    lines[5] = lines[5].partition(",")[0] + ",CANARY"
    (root / "labels.csv").write_text("\n".join([*lines[:3], *lines[5:]]) + "\n")
    damaged = root / "dicom" / "020" / "0.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-500])
    policy = Policy(
        patients_at_most=1_000, min_patients=least, allow_without_privacy=True,
        min_patients_per_class_without_privacy=0,
    )  # fmt: skip
    site = init_site(root, name="north", policy=policy)
    if percent is not None:
        file = root / "site.toml"
        text = file.read_text().replace('on_mismatch = "refuse"', 'on_mismatch = "leave out"')
        file.write_text(text.replace("left_out_at_most = 5.0", f"left_out_at_most = {percent}"))
    return open_site(site.root)


# Images: two without a row and one whose row is wrong. Rows: that one, and the damaged file's.
IMAGES, ROWS, FOUND = 3, 2, 31


def test_nothing_is_left_out_unless_the_site_says_so(tmp_path: Path) -> None:
    site = site_of(tmp_path, percent=None)
    with pytest.raises(Exception, match="CLO-206"):
        freeze(site, PRIVATE)
    assert not frozen_dataset.is_frozen(site, PRIVATE)


@pytest.mark.parametrize("study", [PRIVATE, OPEN], ids=["private", "open"])
def test_what_does_not_fit_is_left_out_and_told(tmp_path: Path, study: studies.Study) -> None:
    site = site_of(tmp_path, percent=100 * (IMAGES + ROWS) / FOUND + 0.01)
    report = inspect(site, study)
    assert report.faults == ()
    assert report.patients == PATIENTS - IMAGES - 1
    told = render(report)
    assert told.count("Left out, as site.toml says: ") == 3
    for word in ("Line 4 has a class", "3 images have no label", "1 label belongs to no image"):
        assert word in told
    assert "CANARY" not in told
    frozen = freeze(site, study)
    assert len(frozen.items) == PATIENTS - IMAGES - 1
    # Judged there, and not again: neither in a run nor in a later look.
    assert len(load_for_run(site, study).patients) == PATIENTS - IMAGES - 1
    assert read_for_check(site, study).faults == ()
    # Whoever is labelled later was not frozen.
    mended = (tmp_path / "labels.csv").read_text().replace("CANARY", "normal")
    (tmp_path / "labels.csv").write_text(mended)
    assert len(load_for_run(site, study).patients) == PATIENTS - IMAGES - 1


def test_too_much_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    site = site_of(tmp_path, percent=100 * (IMAGES + ROWS) / FOUND - 0.01)
    with raises(TooMuchLeftOut, match=r"3 images and 2 rows of labels, 16\.1 % of 31"):
        freeze(site, PRIVATE)
    codes = [fault.code for fault in inspect(site, PRIVATE).faults]
    assert codes[0] == "CLO-256"
    assert "CLO-206" in codes[1:]
    assert not frozen_dataset.is_frozen(site, PRIVATE)


def test_the_patients_that_are_left_are_counted(tmp_path: Path) -> None:
    with raises(CohortTooSmall, match="too few patients: 26"):
        freeze(site_of(tmp_path, percent=50.0, least=27), PRIVATE)


def test_labels_of_another_export_are_not_left_out(tmp_path: Path) -> None:
    site = site_of(tmp_path, percent=50.0)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    other = [lines[0], *(f"1.2.3.{number},normal" for number in range(len(lines) - 1))]
    (tmp_path / "labels.csv").write_text("\n".join(other) + "\n")
    with raises(TooMuchLeftOut, match="100.0 %"):
        freeze(site, PRIVATE)
    (tmp_path / "labels.csv").write_text("nothing,that,is,known\n")
    with raises(TooMuchLeftOut):
        freeze(site, PRIVATE)


def test_what_changed_since_is_no_mismatch(tmp_path: Path) -> None:
    site = site_of(tmp_path, percent=50.0)
    freeze(site, OPEN)
    (tmp_path / "dicom" / "010" / "0.dcm").unlink()
    assert read_for_check(site, OPEN).faults[0].code == "CLO-209"
