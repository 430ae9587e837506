"""Table of scores: a row an image or a volume, with what its patient's rows come to; as CSV.

Patients stand in it by pseudonyms that are keyed with a key of this table alone. Who has the table
and a list of all patient numbers cannot tell whose row is whose by trying them, and two tables do
not name a patient alike.
"""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.patients.units import keyed, normalised
from cloister_fl.client.predictions.calls import Rule
from cloister_fl.system.text import as_cell

FILE, PATIENT, PATIENT_ID, CALL = "file", "patient", "PatientID", "patient_call"
_DIGITS = 16
_BOM = "\ufeff"


@dataclass(frozen=True)
class Scored:
    """One image or volume.

    Attributes:
        uid: of the image (SOP Instance UID) or of the series.
        file: its path within the folder, as the system has it; of a volume its first slice's.
        issuer, number: of the patient.
    """

    uid: str = field(repr=False)
    file: bytes = field(repr=False)
    issuer: str = field(repr=False)
    number: str = field(repr=False)


@dataclass(frozen=True)
class Layout:
    """What the table has beside an image's scores.

    Attributes:
        uid: name of the first column.
        columns: names of the scores.
        rule: how patients are called, or None.
        patient_ids: whether PatientID has a column.
        bom: whether the file begins with a byte order mark.
    """

    uid: str
    columns: tuple[str, ...]
    rule: Rule | None = None
    patient_ids: bool = False
    bom: bool = False


def patients_of(images: Sequence[Scored]) -> list[str]:
    """A pseudonym for each image's patient, under a fresh key: ``p`` and 16 hexadecimal digits.

    Numbers are compared as a site compares them before its steward decided anything. The letter
    keeps a spreadsheet from reading one such as 12e4567890123456 as a number.
    """
    key = secrets.token_bytes(32)
    records = [normalised(one.issuer, one.number) for one in images]
    return [f"p{keyed(key, 'table', one.issuer, one.number)[:_DIGITS]}" for one in records]


def table_of(
    images: Sequence[Scored],
    scores: NDArray[np.float64],
    layout: Layout,
    name: Callable[[Sequence[Scored]], list[str]] = patients_of,
) -> bytes:
    """The file: UTF-8 with CRLF ends of lines.

    Args:
        images: in the order of the rows.
        scores: of each image, (N, C), in the order of ``layout.columns``.
        layout: the columns.
        name: names the patient of each image.
    """
    patients = name(images)
    places: dict[str, list[int]] = {}
    for place, patient in enumerate(patients):
        places.setdefault(patient, []).append(place)
    means = {patient: scores[each].mean(axis=0) for patient, each in places.items()}
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(as_cell(cell) for cell in _head(layout))
    for one, patient, own in zip(images, patients, scores, strict=True):
        mean = means[patient]
        cells = [one.uid, one.file.decode("utf-8", "backslashreplace"), patient]
        if layout.patient_ids:
            cells.append(one.number)
        shown = [f"{score:.6f}" for score in (*own, *mean)]
        call = [layout.rule.call(mean)] if layout.rule else []
        rows.writerow([*map(as_cell, cells), *shown, *map(as_cell, call)])
    told = (_BOM if layout.bom else "") + text.getvalue()
    return told.encode("utf-8", "backslashreplace")


def _head(layout: Layout) -> list[str]:
    return [
        *(layout.uid, FILE, PATIENT),
        *([PATIENT_ID] if layout.patient_ids else []),
        *layout.columns,
        *(f"patient_{name}" for name in layout.columns),
        *([CALL] if layout.rule else []),
    ]
