"""Errors of a hold-out: those of a site, and said to be the hold-out's."""

from __future__ import annotations

from pathlib import Path

from cloister_fl.client.holdout import read_holdout
from cloister_fl.errors import SiteEmpty
from support import studies
from support.errors import raises


def test_a_holdout_without_images_keeps_the_code_of_an_empty_site(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (folder / "dicom").mkdir(parents=True)
    (folder / "labels.csv").write_text("PatientID,finding\n")
    with raises(SiteEmpty, match="^CLO-203: In the hold-out: ") as caught:
        read_holdout(studies.study(), folder, tmp_path / "out")
    assert caught.value.remedy.endswith(" The hold-out is what was named (--holdout, holdout=).")
