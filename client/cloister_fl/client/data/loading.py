"""Cohort loading: files, labels and segmentation masks of a site to patients, with all faults."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.client.data.cohort_errors import class_faults, no_images
from cloister_fl.client.data.frozen_dataset import Item, Manifest, item_of
from cloister_fl.client.data.ingest import gather
from cloister_fl.client.data.targets import UNLABELLED, Targets, join_targets, unlabelled
from cloister_fl.client.data.volumes import as_images
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.client.pacs.fetch import names_stored, require_whole
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import DataError, LabelWithoutImage, Reject
from cloister_fl.study.schema import Study
from cloister_fl.tasks import Task


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


def load_cohort(
    site: Site,
    study: Study,
    *,
    progress: Callable[[int, int], None] | None = None,
    require_labels: bool = True,
) -> Cohort:
    """Read a site's images and labels.

    Args:
        site: the opened site.
        study: what is read, and how it becomes a tensor.
        progress: called with (files done, files in all).
        require_labels: whether to join the labels file and to ask for enough patients of each
            class; without, every label is ``UNLABELLED``.

    Raises:
        FolderUnreadable, SiteEmpty, LabelsInvalid, LabelMissing, LabelWithoutImage, OneClassOnly,
        CohortTooSmall, DecoderUnfit: the first that applies.
    """
    return _sound(read_cohort(site, study, progress=progress, require_labels=require_labels))


def load_frozen(
    site: Site, study: Study, *, progress: Callable[[int, int], None] | None = None
) -> Cohort:
    """Read a site's images and labels for a run: the first run freezes them, later ones check.

    Raises:
        DataChanged: an image that was frozen is not what it was.
        OutputInTheWay, AuditLogDamaged: the data cannot be frozen.
        others: see ``load_cohort``.
    """
    frozen = manifests.load(site, study)
    reading = read_cohort(site, study, progress=progress, frozen=frozen)
    if frozen is None:
        cohort = _sound(reading)
        with manifests.alone(site):
            frozen = manifests.load(site, study)
            if frozen is None:
                manifests.freeze(site, study, reading.items, segmentations=reading.segmentations)
                return cohort
        # Another run froze the data while these were read, and more may have come since.
        reading = read_cohort(site, study, progress=progress, frozen=frozen)
    return _sound(reading)


def freeze(
    site: Site,
    study: Study,
    *,
    again: bool = False,
    why: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Freeze a study's data at a site, as the first run would.

    Args:
        site: the opened site.
        study: the study.
        again: replace what was frozen.
        why: the steward's reason for that, one line.
        progress: called with (files done, files in all).

    Raises:
        OptionInvalid: it is frozen already, and ``again`` or a reason is missing.
        others: see ``load_frozen``.
    """

    def require_reason() -> None:
        if again or manifests.is_frozen(site, study):
            manifests.require_reason(why if again else "")

    require_reason()
    reading = read_cohort(site, study, progress=progress)
    _sound(reading)
    with manifests.alone(site):
        # Another may have frozen it meanwhile.
        require_reason()
        return manifests.freeze(
            site, study, reading.items, segmentations=reading.segmentations, why=why.strip()
        )


def _sound(reading: Reading) -> Cohort:
    if reading.faults:
        raise reading.faults[0]
    assert reading.cohort is not None
    return reading.cohort


def read_cohort(
    site: Site,
    study: Study,
    *,
    progress: Callable[[int, int], None] | None = None,
    require_labels: bool = True,
    frozen: Manifest | None = None,
) -> Reading:
    """Do as ``load_cohort`` does, but go on after a fault and list them all.

    Args:
        frozen: what the study was frozen with; images that came later are left out.
        others: see ``load_cohort``.

    Raises:
        FolderUnreadable, DecoderUnfit: nothing can be read at all.
        FileUnreadable: the decisions on quarantined files cannot be read.
    """
    key, digest = site.pseudonym_key(), study.digest
    part = require_whole(site) if frozen is None else None
    stored = names_stored(site) if frozen is None else None
    found = gather(site, study, progress=progress, segmentations=require_labels, frozen=frozen)
    accepted, linked, rejects = found.accepted, found.linked, found.rejects
    joined, files = found.joined, found.files
    slices = list(accepted)
    if study.input.dimensions == 3:
        accepted, linked, alone = as_images(accepted, linked, study.input)
        rejects.update(alone.values())
        slices = [one for index, one in enumerate(slices) if index not in alone]
    faults: list[DataError] = [] if accepted else [no_images(site, rejects)]
    if frozen is None:
        # Nor may a fetch have begun, or ended, while the files were read.
        part = part or require_whole(site, more=names_stored(site) != stored)
        faults[:0] = [part] if part else []
    targets = unlabelled(accepted)
    if require_labels:
        targets = join_targets(site, study, accepted, linked, joined)
        # A row may speak of an image that is yet to come; what it says of frozen ones is theirs.
        faults += (
            fault
            for fault in targets.faults
            if frozen is None or not isinstance(fault, LabelWithoutImage)
        )
    items = tuple(
        item_of(
            key, digest, sop_instance=one.keys.sop_instance, patient=name,
            content=one.content, pixels=one.facts.pixels, label=token,
        )
        for (one, name), token in zip(
            slices, targets.tokens(study.task, accepted, slices), strict=True
        )
    )  # fmt: skip
    torn = joined.torn if joined else set()
    spoiled = [
        item.image
        for place, (item, (one, _)) in enumerate(zip(items, slices, strict=True))
        if one.damaged or place in torn
    ]
    if frozen is not None:
        # First of all faults: what changed explains the others.
        faults[:0] = manifests.differences(frozen, items, spoiled, found.elsewhere, root=site.root)
    counted = dict(sorted(rejects.items(), key=lambda item: item[0].value))
    cohort = _assemble(accepted, targets if require_labels else None, counted, study.task)
    if cohort is not None and require_labels and not faults:
        faults += class_faults(site, study, Counter(one.label for one in cohort.patients))
    facts = tuple((_described(one), name) for one, name in accepted)
    return Reading(
        cohort, tuple(faults), files, counted, found.later, len(spoiled), items,
        tuple(found.segmentations), joined.faded if joined else 0, facts,
    )  # fmt: skip


def _described(one: Accepted) -> Facts:
    """What is known of an image; of a volume, whose first slice speaks for it, all pixels."""
    if one.image.ndim == 2:
        return one.facts
    return replace(one.facts, pixels=hashlib.sha256(one.image.tobytes()).hexdigest())


def _assemble(
    accepted: Sequence[tuple[Accepted, str]],
    targets: Targets | None,
    rejects: Mapping[Reject, int],
    task: Task,
) -> Cohort | None:
    """Order the images by patient and instance, whatever the folder's structure."""
    if not accepted:
        return None
    by_patient: dict[str, list[int]] = {}
    for index, (_, name) in enumerate(accepted):
        by_patient.setdefault(name, []).append(index)
    marked = []
    for name, indices in by_patient.items():
        indices.sort(key=lambda index: accepted[index][0].keys.sop_instance)
        mark = hashlib.sha256(accepted[indices[0]][0].image.tobytes()).hexdigest()
        marked.append((mark, name, indices))
    order: list[int] = []
    patients: list[Patient] = []
    for mark, name, indices in sorted(marked):
        label = UNLABELLED if targets is None else targets.label(task, indices)
        places = tuple(range(len(order), len(order) + len(indices)))
        patients.append(Patient(name, label, places, mark))
        order += indices
    return Cohort(
        images=np.stack([accepted[index][0].image for index in order]),
        targets=np.empty(0)
        if targets is None
        else task.stack([targets.records[index] for index in order]),
        patients=tuple(patients),
        rejects=rejects,
        modalities=dict(sorted(Counter(one.facts.modality for one, _ in accepted).items())),
        shapes=dict(
            sorted(Counter((one.facts.rows, one.facts.columns) for one, _ in accepted).items())
        ),
    )
