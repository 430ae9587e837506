"""Training targets of a site's images: classes from the labels file, or segmentation masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cloister_fl.client.data import mask_matching as outlined
from cloister_fl.client.data.labels import Linked, join, read_labels
from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.client.dicom.mask_table import Mask
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import DataError, LabelsInvalid
from cloister_fl.study.schema import Study

UNLABELLED = -1
"""Label of a patient that was read with ``require_labels=False``."""

Named = tuple[Accepted, str]
"""An image and its patient's pseudonym."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a reading.

    Attributes:
        labels: by image, the index of its patient's class; None where there is none.
        masks: by image, its outline, None where there is none; empty for a classification.
        faults: what does not fit.
    """

    labels: Sequence[int | None]
    masks: Sequence[Mask | None] = field(default=(), repr=False)
    faults: tuple[DataError, ...] = ()

    def frozen(self, images: Sequence[Named], slices: Sequence[Named]) -> list[int | str | None]:
        """What a manifest keeps of each slice: its patient's class, or its outline's digest."""
        if self.masks:
            return [outlined.digest(mask) for mask in self.masks]
        label_of = {name: label for (_, name), label in zip(images, self.labels, strict=True)}
        return [label_of[name] for _, name in slices]


def unlabelled(images: Sequence[Named]) -> Targets:
    """The targets of a reading that is not about them."""
    return Targets([UNLABELLED] * len(images))


def join_targets(
    site: Site,
    study: Study,
    images: Sequence[Named],
    linked: Sequence[Linked],
    joined: outlined.Join | None,
) -> Targets:
    """Join what the study's target asks for to the images.

    Args:
        site: whose labels file is read, for a classification.
        study: the study.
        images: images or volumes, each with its patient.
        linked: what labels are joined to: one for each of ``images``, in its order, and between
            them one for each that was turned away as a duplicate or came later.
        joined: the outlines, for a segmentation that has any.
    """
    if study.target.segment:
        joined = joined or outlined.Join(images, linked)
        masks, faults = joined.masks, joined.faults(site.root)
        marked = {name for (_, name), one in zip(images, masks, strict=True)
                  if one is not None and one.any()}  # fmt: skip
        labels = [int(name in marked) for _, name in images]
        return Targets(labels, masks, tuple(faults) if images else ())
    found, faults = _labels(site, study, linked)
    # Where no image could be used, that labels have no image is no news; a bad file is.
    faults = [one for one in faults if images or isinstance(one, LabelsInvalid)]
    kept = [value for value, one in zip(found, linked, strict=True) if not one.duplicate]
    return Targets(kept, (), tuple(faults))


def _labels(
    site: Site, study: Study, linked: Sequence[Linked]
) -> tuple[list[int | None], list[DataError]]:
    try:
        labels = read_labels(site.labels, study.target)
    except DataError as error:
        return [None] * len(linked), [error]
    return join(labels, linked, site.root)
