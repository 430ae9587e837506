"""A hold-out: the errors of a site, said to be the hold-out's; and groups of its patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.holdout import read_holdout
from cloister_fl.errors import SiteEmpty
from support import studies
from support.dicom import write_dicom
from support.errors import raises
from support.federations import picture


def test_a_holdout_without_images_keeps_the_code_of_an_empty_site(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (folder / "dicom").mkdir(parents=True)
    (folder / "labels.csv").write_text("PatientID,finding\n")
    with raises(SiteEmpty, match="^CLO-203: In the hold-out: ") as caught:
        read_holdout(studies.study(), folder, tmp_path / "out")
    assert caught.value.remedy.endswith(" The hold-out is what was named (--holdout, holdout=).")


@pytest.mark.process
def test_groups_follow_from_a_patient_s_own_images(tmp_path: Path) -> None:
    about: dict[str, list[dict[str, str]]] = {
        "A": [{"PatientSex": "F", "PatientAge": "039Y", "Manufacturer": "Maker  One"}],
        # The age is that of the earliest image; one maker is spelt in two ways.
        "B": [
            {"PatientSex": "M", "PatientAge": "060Y", "Manufacturer": "MAKER ONE"},
            {"PatientSex": "M", "PatientAge": "059Y", "Manufacturer": "Maker One"},
            {"Manufacturer": ""},
        ],
        # Contradictory, and of two makers.
        "C": [
            {"PatientSex": "F", "Manufacturer": "Maker One"},
            {"PatientSex": "M", "Manufacturer": "Other"},
        ],
        "D": [{}],
    }
    folder, rng, rows = tmp_path / "kept", np.random.default_rng(0), ["PatientID,finding"]
    for number, (patient, images) in enumerate(about.items()):
        rows.append(f"{patient},{('no', 'yes')[number % 2]}")
        for place, elements in enumerate(images):
            path = folder / "dicom" / f"{patient}{place}.dcm"
            pixels = picture(rng, number % 2)
            write_dicom(path, pixels, patient_id=patient, bits_stored=12, elements=elements)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    study = studies.study(target={"column": "finding", "classes": ("no", "yes")})
    holdout = read_holdout(study, folder, tmp_path / "out")
    told = {sum(unit.images for unit in one.units): dict(one.groups) for one in holdout.patients}
    # By their images: A and D have one each.
    assert len(holdout.patients) == 4
    assert told[3] == {"age": "40-59", "maker": "MAKER ONE", "sex": "M"}
    assert told[2] == {"maker": "several"}
    alone = [dict(one.groups) for one in holdout.patients if one.units[0].images == 1]
    assert sorted(alone, key=len) == [{}, {"age": "18-39", "maker": "MAKER ONE", "sex": "F"}]
