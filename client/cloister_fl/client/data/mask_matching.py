"""Segmentation masks, matched to the images that they mark.

An image has one mask, from a segmentation of the same patient that lies where the image lies. A
patient's label is whether anything is marked in any of the patient's images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cloister_fl.client.data.labels.row_matching import Linked
from cloister_fl.client.data.tables.csv_file import SHOWN
from cloister_fl.client.dicom.folder_reader import Accepted, Segmented
from cloister_fl.client.dicom.geometry import numbers
from cloister_fl.client.dicom.mask_table import Marking, Mask
from cloister_fl.client.site.folder import command_at
from cloister_fl.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage
from cloister_fl.system.text import counted, listed

_COSINES = 1e-3
"""How far direction cosines may be off: rounding in the file, and no other orientation."""
_SPACING = 1e-3
"""How far pixel spacings may differ, as a share."""
_SAME_PLACE = 0.01
"""How far positions may be apart, in mm."""


class Join:
    """Gives each image its mask. Segmentations come one at a time, and are not kept.

    Args:
        images: each with its patient's pseudonym.
        linked: all images, also those that were turned away as duplicates or came later.

    Attributes:
        masks: the mask of each image, None where there is none.
        torn: places of the images whose mask was cached, and did not bear its seal.
        faded: how many images have something marked of which nothing is left at the study's size.
    """

    def __init__(self, images: Sequence[tuple[Accepted, str]], linked: Sequence[Linked]) -> None:
        self._images = images
        self._ids = [one.ids for one in linked if not one.duplicate]
        self._place_of = {
            (patient, one.keys.sop_instance): place for place, (one, patient) in enumerate(images)
        }
        self._used = {one.keys.sop_instance for one, _ in images}
        self._known = {one.keys.sop_instance for one in linked}
        self._faults: dict[str, dict[str, None]] = defaultdict(dict)
        self._unused: list[str] = []
        self.masks: list[Mask | None] = [None] * len(images)
        self.torn: set[int] = set()
        self.faded = 0

    def add(self, one: Segmented, patient: str) -> None:
        """Lay a segmentation of a patient over the images that it names."""
        if self._known.isdisjoint(one.masks.uids):
            self._unused.append(one.short_id)
        for uid in one.masks.uids:
            place = self._place_of.get((patient, uid))
            if place is None:
                if uid in self._used:
                    self._fault(one, "of another patient than the images that it marks")
                continue
            marking = one.masks.marking(uid)
            misfit = _misfit(self._images[place][0], one, marking)
            if misfit:
                self._fault(one, misfit)
            elif self.masks[place] is not None:
                self._fault(one, "the second one for the same image")
            else:
                self.masks[place] = one.masks.whole(marking)
                self.faded += marking.mask is not None and not marking.mask.any()
                if one.damaged:
                    self.torn.add(place)

    def _fault(self, one: Segmented, what: str) -> None:
        self._faults[what][one.short_id] = None

    def faults(self, root: Path | None = None) -> list[DataError]:
        """Return all faults, once all segmentations were added.

        Args:
            root: the site folder, for the commands of the remedies.
        """
        missing = [ids for ids, mask in zip(self._ids, self.masks, strict=True) if mask is None]
        found = {what: list(names) for what, names in sorted(self._faults.items())}
        return list(_errors(found, missing, self._unused, root))


def _misfit(image: Accepted, one: Segmented, marking: Marking) -> str:
    """What keeps a mask from being laid over an image of the same patient, or nothing.

    What an image says of where it lies (a slice of CT or MR does), the segmentation has to say too
    (PS3.3 C.8.20.2, A.51.3): rows and columns alone fit many images.
    """
    facts, place = image.facts, image.place
    if (facts.rows, facts.columns) != (one.facts.rows, one.facts.columns):
        return "of another size than the images that it marks"
    if not _near(place.orientation, one.facts.orientation, 6, _COSINES):
        return "of another orientation than the images that it marks"
    spacing = numbers(place.pixel_spacing, 2)
    if not _near(
        place.pixel_spacing, one.facts.pixel_spacing, 2, _SPACING * max(spacing, default=1)
    ):
        return "of another pixel spacing than the images that it marks"
    if place.frame != one.facts.frame and place.frame:
        return "of another frame of reference than the images that it marks"
    if marking.mask is not None and not _near(place.position, marking.position, 3, _SAME_PLACE):
        return "at another position than the images that it marks"
    return ""


def _near(wanted: str, told: str, count: int, most: float) -> bool:
    """Whether each number is told within ``most``; anything will do where none is wanted."""
    if not wanted:
        return True
    pairs = zip(numbers(wanted, count), numbers(told, count) or (None,) * count, strict=True)
    return all(other is not None and abs(one - other) <= most for one, other in pairs)


def _errors(
    faults: Mapping[str, Sequence[str]],
    missing: Sequence[tuple[str, str]],
    unused: Sequence[str],
    root: Path | None,
) -> Iterator[DataError]:
    if faults:
        told = "".join(f"\n  {what}: {listed(names, SHOWN)}" for what, names in faults.items())
        files = len({name for names in faults.values() for name in names})
        yield LabelsInvalid(
            f"{counted(files, 'segmentation does', 'segmentations do')} not fit the images, by "
            f"the ids of the files:{told}\n",
            remedy="Remove all but one for each image from the folder, and export again those "
            "that do not fit.",
        ).about((name, "") for names in faults.values() for name in names)
    if missing:
        yield LabelMissing(
            f"{counted(len(missing), 'image has', 'images have')} no segmentation mask.",
            why=f"Ids of their patients: {listed((owner for _, owner in missing), SHOWN)}.",
            remedy="Add a DICOM Segmentation for each, an empty one where there is nothing to "
            "mark, or remove the images from the folder. Who the patients are: "
            + command_at(root, f"find {missing[0][1]} --study STUDY"),
        ).about(missing)
    if unused:
        yield LabelWithoutImage(
            f"{counted(len(unused), 'segmentation belongs', 'segmentations belong')} to no image.",
            why=f"Ids of the files: {listed(unused, SHOWN)}.",
            remedy="Add the images, or remove the segmentations. A rejected image counts as "
            f"missing; which are rejected, and why: {command_at(root, 'check --offline')}",
        ).about((name, "") for name in unused)
