"""What a look at a site's data found: a cohort, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.frozen_dataset import Item
from cloister_fl.client.data.patients.possible_matches import Match
from cloister_fl.client.data.patients.units import Decisions
from cloister_fl.client.data.sealed_labels import Cells
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.ledger.machine_registry import Trait
from cloister_fl.errors import CloisterError, DataError, Reject


def fault_as_dict(fault: CloisterError) -> dict[str, Any]:
    """What JSON says of a fault: its message, and all images and rows that it is about.

    A message lists the first few. Images and patients are named by ids, rows by their line and by
    the column of their key, never by the key: see ``DataError``.
    """
    images, rows = (fault.images, fault.rows) if isinstance(fault, DataError) else ((), ())
    return {
        "code": fault.code,
        "title": fault.title,
        "message": str(fault),
        "images": [{"image": image, "patient": patient or None} for image, patient in images],
        "rows": [{"line": line, "key": key or None} for line, key in rows],
    }


@dataclass(frozen=True, eq=False)
class Reading:
    """A cohort and all that is wrong with it, in the order in which it should be mended.

    Attributes:
        cohort: the images, or None where there is none.
        faults: what is wrong.
        files: how many files there are.
        rejects: how many were turned away, by reason.
        later: how many images and segmentations came after the study was frozen.
        damaged: how many cached images did not bear their seal, and were decoded anew.
        items: the images as a manifest names them.
        segmentations: contents of the segmentations, as a manifest names them.
        faded: how many images have something marked of which nothing is left at the study's size.
        facts: what the files say of each image, in no order; see ``data_report``.
        decisions: by which patients were told apart.
        matches: patients that may be one, and of whom the steward has not decided; none of a study
            that is frozen.
        unused: lines of the steward's mapping whose number no image has.
        traits: what tells the patients on this machine; see ``patients.other_ledgers``.
        cells: the labels of ``items``, by pseudonyms of image and patient; see ``sealed_labels``.
        rows_left: how many rows of labels have a fault, or belong to no image; counted with
            ``tolerant`` alone.
        left_out: what was wrong with what was left out; see ``leaving_out``.
    """

    cohort: Cohort | None
    faults: tuple[DataError, ...]
    files: int
    rejects: Mapping[Reject, int]
    later: int = 0
    damaged: int = 0
    items: tuple[Item, ...] = ()
    segmentations: tuple[bytes, ...] = ()
    faded: int = 0
    facts: tuple[tuple[Facts, str], ...] = field(default=(), repr=False)
    decisions: Decisions = field(default_factory=Decisions)
    matches: tuple[Match, ...] = field(default=(), repr=False)
    unused: tuple[int, ...] = ()
    traits: frozenset[Trait] = field(default=frozenset(), repr=False)
    cells: Mapping[tuple[str, str], Cells] = field(default_factory=dict, repr=False)
    rows_left: int = 0
    left_out: tuple[DataError, ...] = ()
