"""What can happen to a hospital's images and labels between two messages of a run."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from pydicom import dcmread

from cloister_fl.client.site.folder import Site
from support.federations import picture, write_cohort
from support.hostile_dicom import corpus

Damage = Callable[[Site], None]


def images(site: Site) -> list[Path]:
    """The files of the data folder, in a fixed order; segmentations among them."""
    return sorted(path for path in site.dicom.rglob("*") if path.is_file())


def rows(site: Site) -> list[list[str]]:
    """The labels file, its first line first."""
    with site.labels.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write_rows(site: Site, lines: list[list[str]]) -> None:
    with site.labels.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def nothing(site: Site) -> None:
    del site


def one_patient_removed(site: Site) -> None:
    _without(site, {patient_of(images(site)[0])})


def a_class_gone(site: Site) -> None:
    _without(site, {name for name, label in rows(site)[1:] if label == "yes"})


def no_files(site: Site) -> None:
    for path in images(site):
        path.unlink()


def no_folder(site: Site) -> None:
    shutil.rmtree(site.dicom)


def no_files_and_no_labels(site: Site) -> None:
    no_files(site)
    site.labels.unlink(missing_ok=True)


def other_patients(site: Site) -> None:
    shutil.rmtree(site.dicom)
    write_cohort(site.root, np.random.default_rng(9), "OTHER", patients=7, images=3)


def more_patients(site: Site) -> None:
    before = rows(site)
    write_cohort(site.root, np.random.default_rng(9), "MORE", patients=40, images=1)
    write_rows(site, [*before, *rows(site)[1:]])


def files_cut_short(site: Site) -> None:
    for path in images(site):
        path.write_bytes(path.read_bytes()[:300])


def files_of_rubbish(site: Site) -> None:
    for path in images(site)[::2]:
        path.write_bytes(os.urandom(500))


def empty_files(site: Site) -> None:
    for path in images(site):
        path.write_bytes(b"")


def folders_for_files(site: Site) -> None:
    for path in images(site):
        path.unlink()
        path.mkdir()


def links_to_elsewhere(site: Site) -> None:
    for path in images(site):
        path.unlink()
        path.symlink_to("/etc/hostname")


def hostile_files(site: Site) -> None:
    for number, sample in enumerate(islice(corpus(), 0, None, 8)):
        (site.dicom / f"hostile-{number}").write_bytes(sample.data)


def other_pixels(site: Site) -> None:
    for path in images(site)[:5]:
        found = dcmread(path)
        found.PixelData = picture(np.random.default_rng(3), 1).tobytes()
        found.save_as(path)


def files_of_one_patient(site: Site) -> None:
    for path in images(site):
        found = dcmread(path)
        found.PatientID = "MRN-000"
        found.save_as(path)


def twice_the_files(site: Site) -> None:
    for path in images(site):
        shutil.copy(path, path.with_name(f"copy-of-{path.name}"))


def torn_cache(site: Site) -> None:
    for path in sorted(site.cache.iterdir()):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (site.root / "index.sqlite").unlink()


def no_labels_file(site: Site) -> None:
    site.labels.unlink(missing_ok=True)


def labels_without_a_head(site: Site) -> None:
    write_rows(site, rows(site)[1:])


def labels_of_one_class(site: Site) -> None:
    head, *rest = rows(site)
    write_rows(site, [head, *([name, "no"] for name, _ in rest)])


def an_unknown_class(site: Site) -> None:
    head, first, *rest = rows(site)
    write_rows(site, [head, [first[0], "perhaps"], *rest])


def a_patient_twice(site: Site) -> None:
    head, first, *rest = rows(site)
    write_rows(site, [head, first, *rest, [first[0], "yes"]])


def a_row_gone(site: Site) -> None:
    lines = rows(site)
    del lines[3]
    write_rows(site, lines)


def a_row_without_an_image(site: Site) -> None:
    write_rows(site, [*rows(site), ["NOBODY", "yes"]])


def a_stray_quotation_mark(site: Site) -> None:
    site.labels.write_text(site.labels.read_text().replace("\nMRN", '\n"MRN', 1))


def a_row_that_is_no_text(site: Site) -> None:
    site.labels.write_bytes(site.labels.read_bytes() + b"M\xfcller,yes\n")


def labels_of_rubbish(site: Site) -> None:
    site.labels.write_bytes(os.urandom(5000))


OF_FILES: Mapping[str, Damage] = {
    one.__name__: one
    for one in (
        nothing,
        one_patient_removed,
        no_files,
        no_folder,
        no_files_and_no_labels,
        files_cut_short,
        files_of_rubbish,
        empty_files,
        folders_for_files,
        links_to_elsewhere,
        hostile_files,
        files_of_one_patient,
        twice_the_files,
        torn_cache,
    )
}
"""Kinds of damage that any site can meet."""

OF_LABELS: Mapping[str, Damage] = {
    one.__name__: one
    for one in (
        a_class_gone,
        other_patients,
        more_patients,
        other_pixels,
        no_labels_file,
        labels_without_a_head,
        labels_of_one_class,
        an_unknown_class,
        a_patient_twice,
        a_row_gone,
        a_row_without_an_image,
        a_stray_quotation_mark,
        a_row_that_is_no_text,
        labels_of_rubbish,
    )
}
"""Kinds of damage to a site as ``write_cohort`` writes it, with a labels file."""


def patient_of(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True).PatientID)


def _without(site: Site, names: set[str]) -> None:
    for path in images(site):
        if patient_of(path) in names:
            path.unlink()
    if site.labels.exists():
        write_rows(site, [row for row in rows(site) if row[0] not in names])
