"""Outlines joined to the images that they mark, and judged as a whole.

An image has one outline, from a segmentation of the same patient and of the image's own size and
orientation. A patient's label is whether anything is marked in any of the patient's images.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from cloister_client.dicom.folder import Accepted, Segmented
from cloister_client.dicom.geometry import numbers
from cloister_client.dicom.outlines import Mask
from cloister_client.labels import SHOWN, Linked
from cloister_common.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage

_COSINES = 1e-3
"""How far direction cosines may be off: rounding in the file, and no other orientation."""


def join(
    segmentations: Sequence[tuple[Segmented, str]],
    images: Sequence[tuple[Accepted, str]],
    linked: Sequence[Linked],
) -> tuple[list[Mask | None], list[DataError]]:
    """Give each image its outline, and say all that does not fit.

    Args:
        segmentations: each with its patient's pseudonym.
        images: each with its patient's pseudonym.
        linked: all images, also those that were turned away as duplicates or came later.

    Returns:
        The outline of each image, None where there is none; and the faults found.
    """
    place_of = {one.keys.sop_instance: place for place, (one, _) in enumerate(images)}
    known = {one.keys.sop_instance for one in linked}
    masks: list[Mask | None] = [None] * len(images)
    faults: dict[str, list[str]] = defaultdict(list)
    unused: list[str] = []
    for one, patient in segmentations:
        if known.isdisjoint(one.outlines.uids):
            unused.append(one.short_id)
            continue
        for uid in one.outlines.uids:
            place = place_of.get(uid)
            if place is None:
                continue
            image, owner = images[place]
            if owner != patient:
                faults["of another patient than the images that it marks"].append(one.short_id)
            elif (image.facts.rows, image.facts.columns) != (one.facts.rows, one.facts.columns):
                faults["of another size than the images that it marks"].append(one.short_id)
            elif not _alike(image.facts.orientation, one.facts.orientation):
                faults["of another orientation than the images that it marks"].append(one.short_id)
            elif masks[place] is not None:
                faults["the second one for the same image"].append(one.short_id)
            else:
                masks[place] = one.outlines.mask(uid)
    missing = [owner for (_, owner), mask in zip(images, masks, strict=True) if mask is None]
    return masks, list(_errors(faults, missing, unused))


def _alike(one: str, other: str) -> bool:
    """Whether two texts of direction cosines are of one orientation, or one is not told."""
    cosines = zip(numbers(one, 6), numbers(other, 6), strict=False)
    return all(abs(a - b) <= _COSINES for a, b in cosines)


def _errors(
    faults: dict[str, list[str]], missing: Sequence[str], unused: Sequence[str]
) -> Iterator[DataError]:
    if faults:
        told = "".join(f"\n  {what}: {_listing(names)}" for what, names in sorted(faults.items()))
        files = len({name for names in faults.values() for name in names})
        yield LabelsInvalid(
            f"{_count(files, 'segmentation does', 'segmentations do')} not fit the images, by "
            f"the short names of the files:{told}\n",
            remedy="Take all but one for each image out of the folder, and export what does not "
            "fit anew.",
        )
    if missing:
        yield LabelMissing(
            f"{_count(len(missing), 'image has', 'images have')} no outline.",
            why=f"Their patients' short pseudonyms: {_listing([name[:12] for name in missing])}.",
            remedy="Add a DICOM Segmentation for each, an empty one where there is nothing to "
            "mark, or take the images out of the folder. 'cloister client check' says which files "
            "are turned away.",
        )
    if unused:
        yield LabelWithoutImage(
            f"{_count(len(unused), 'segmentation belongs', 'segmentations belong')} to no image.",
            why=f"By the short names of the files: {_listing(unused)}.",
            remedy="Add the images, or take the segmentations out. An image that was turned away "
            "counts as absent; 'cloister client check' says why images are turned away.",
        )


def digest(mask: Mask | None) -> str | None:
    """SHA-256 of an outline, 64 hexadecimal digits: what a manifest keeps, keyed, as its label."""
    return None if mask is None else hashlib.sha256(mask.tobytes()).hexdigest()


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _listing(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - SHOWN} more" if len(distinct) > SHOWN else ""
    return ", ".join(distinct[:SHOWN]) + more
