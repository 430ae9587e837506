"""Cohort loading: files, labels and segmentation masks of a site to patients, with all faults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data import leaving_out
from cloister_fl.client.data.assembly import assembled
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.cohort_errors import class_faults, no_images, unread
from cloister_fl.client.data.frozen_dataset import Item, Manifest, item_of
from cloister_fl.client.data.ingest import gather
from cloister_fl.client.data.patients import other_ledgers
from cloister_fl.client.data.patients.mapping import PatientMapping, mapping_of
from cloister_fl.client.data.patients.possible_matches import (
    lines_without_image,
    undecided,
    undecided_error,
)
from cloister_fl.client.data.patients.units import Units
from cloister_fl.client.data.reading import Reading
from cloister_fl.client.data.targets import (
    Targets,
    frozen_targets,
    join_targets,
    unlabelled,
)
from cloister_fl.client.data.volumes import as_images
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.file_finder import is_listable
from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.client.pacs.fetch import names_stored, require_whole
from cloister_fl.client.site.data_notice import note_data, note_look
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CloisterError, DataError, LabelWithoutImage
from cloister_fl.study.schema import Study
from cloister_fl.tasks import LabelsFile


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
    return require_sound(read_cohort(site, study, progress=progress, require_labels=require_labels))


def load_for_run(site: Site, study: Study) -> Cohort:
    """Read what a run trains on.

    With privacy on, the data have no say in whether a site answers: nobody's images or labels make
    this raise. Of what was frozen, an image counts that is there unchanged, with the label that it
    was frozen with; another is absent, and so is a patient without an image; possibly all are. What
    is absent, and what the labels file says now, is a notice to the site's own people
    (``data_notice``), and nothing of it goes into the audit log, whose head travels with each
    answer: an entry there, or its number, would tell.

    Whether an image counts depends on its patient's files and rows alone, so a patient who comes
    or goes takes nobody else along. Data that nobody froze, as of a study that a rule approved, are
    frozen now, as far as they can be used; not where they could not be read as a whole, which is no
    matter of a patient's.

    Without privacy, see ``load_frozen``.

    Raises:
        DataChanged, FileUnreadable: the manifest is not the one that was signed here.
        OutputInTheWay, AuditLogDamaged: the data cannot be frozen.
        others: without privacy only, see ``load_frozen``.
    """
    if not study.privacy.enabled:
        return load_frozen(site, study)
    frozen = manifests.load(site, study)
    unread_whole = frozen is None and not is_listable(site.dicom)
    try:
        # The labels of frozen data are frozen too: what the file says now is for a notice alone.
        reading = read_cohort(site, study, frozen=frozen, alone=True, tolerant=frozen is not None)
        if frozen is not None and site.left_out_at_most is not None:
            reading = leaving_out.as_frozen(reading)
        faults: list[CloisterError] = [*reading.faults]
    except Exception as error:
        # The last resort, for a fault of the program: it must not become an answer either.
        reading, faults, unread_whole = Reading(None, (), 0, {}), [unread(error)], True
    with contextlib.suppress(CloisterError):
        other_ledgers.note_ledger(site)
    if frozen is None and not unread_whole:
        with manifests.alone(site):
            frozen = manifests.load(site, study)
            if frozen is not None:
                # Another froze the data while these were read.
                return load_for_run(site, study)
            unlinked = other_ledgers.register(site, reading.traits).error
            faults += [unlinked] if unlinked else []
            write_frozen(site, study, reading)
    note_data(site.root, study.digest, faults)
    return nobody(study) if reading.cohort is None else reading.cohort


def nobody(study: Study) -> Cohort:
    """The cohort of a site without a patient."""
    spec = study.input
    shape = (spec.size, spec.size) if spec.depth is None else (spec.depth, spec.size, spec.size)
    return Cohort(np.empty((0, *shape), np.uint16), (), {}, {}, {})


def load_frozen(
    site: Site, study: Study, *, progress: Callable[[int, int], None] | None = None
) -> Cohort:
    """Read a site's images and labels as they were frozen, and refuse all else.

    What was not frozen yet is frozen.

    Raises:
        DataChanged: an image that was frozen is not what it was.
        OutputInTheWay, AuditLogDamaged: the data cannot be frozen.
        others: see ``load_cohort``.
    """
    frozen = manifests.load(site, study)
    reading = _read_tolerant(site, study, progress=progress, frozen=frozen)
    other_ledgers.note_ledger(site)
    if frozen is None:
        cohort = require_sound(reading)
        with manifests.alone(site):
            frozen = manifests.load(site, study)
            if frozen is None:
                other_ledgers.register(site, reading.traits)
                write_frozen(site, study, reading)
                return cohort
        # Another run froze the data while these were read, and more may have come since.
        reading = _read_tolerant(site, study, progress=progress, frozen=frozen)
    return require_sound(reading)


def freeze(
    site: Site,
    study: Study,
    *,
    again: bool = False,
    why: str = "",
    progress: Callable[[int, int], None] | None = None,
    looked: Callable[[Reading], None] = lambda reading: None,
) -> Manifest:
    """Freeze a study's data at a site, where all of them can be used.

    Args:
        site: the opened site.
        study: the study.
        again: replace what was frozen.
        why: the steward's reason for that, one line.
        progress: called with (files done, files in all).
        looked: called with what was read, before it is judged.

    Raises:
        OptionInvalid: it is frozen already, and ``again`` or a reason is missing.
        PatientsUndecided: patients may be one, and the steward has not decided.
        LedgerUnlinked: another ledger of this machine counts some of the patients.
        others: see ``load_frozen``.
    """

    def require_reason() -> None:
        if again or manifests.is_frozen(site, study):
            manifests.require_reason(why if again else "")

    require_reason()
    reading = _read_tolerant(site, study, progress=progress)
    looked(reading)
    require_sound(reading)
    require_decided(site, reading)
    with manifests.alone(site):
        # Another may have frozen it meanwhile.
        require_reason()
        other_ledgers.register(site, reading.traits)
        frozen = write_frozen(site, study, reading, why.strip())
    note_look(site.root, study.digest)
    return frozen


def require_decided(site: Site, reading: Reading) -> None:
    """Refuse what only a person can decide, where a person is there to do it.

    Raises:
        PatientsUndecided: patients may be one, and the steward has not decided.
        LedgerUnlinked: another ledger of this machine counts some of these patients.
    """
    if error := undecided_error(site, reading.matches):
        raise error
    if unlinked := other_ledgers.look(site, reading.traits).error:
        raise unlinked


def write_frozen(site: Site, study: Study, reading: Reading, why: str = "") -> Manifest:
    """Write a manifest of what was read; see ``frozen_dataset.freeze``."""
    return manifests.freeze(
        site,
        study,
        reading.items,
        segmentations=reading.segmentations,
        cells=reading.cells,
        patients=reading.decisions,
        undecided=len(reading.matches),
        why=why,
    )


def read_for_check(
    site: Site, study: Study, *, progress: Callable[[int, int], None] | None = None
) -> Reading:
    """Read a site's data as a run would, and list all that is wrong: what a steward is shown.

    Raises:
        DataChanged, FileUnreadable: the manifest is not the one that was signed here.
        others: see ``read_cohort``.
    """
    return _read_tolerant(site, study, progress=progress, frozen=manifests.load(site, study))


def _read_tolerant(
    site: Site,
    study: Study,
    *,
    progress: Callable[[int, int], None] | None = None,
    frozen: Manifest | None = None,
) -> Reading:
    """Read a cohort, without what the site's settings leave out; see ``leaving_out``."""
    if frozen is not None and site.left_out_at_most is not None:
        reading = read_cohort(site, study, progress=progress, frozen=frozen, tolerant=True)
        return leaving_out.as_frozen(reading)
    whole = read_cohort(site, study, progress=progress, frozen=frozen)
    if not leaving_out.is_about(site, whole.faults):
        return whole
    fits = read_cohort(site, study, alone=True, tolerant=True)
    return leaving_out.judged(site, study, whole, fits)


def require_sound(reading: Reading) -> Cohort:
    """The cohort of a reading without a fault.

    Raises:
        DataError: its first fault.
    """
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
    alone: bool = False,
    tolerant: bool = False,
) -> Reading:
    """Do as ``load_cohort`` does, but go on after a fault and list them all.

    Args:
        frozen: what the study was frozen with; images that came later are left out.
        alone: leave out what cannot be used, each image for itself; see ``load_for_run``.
        tolerant: take the rows of labels that fit; for what a person looked at.
        others: see ``load_cohort``.

    Raises:
        FolderUnreadable, DecoderUnfit: nothing can be read at all; not with ``alone``.
        FileUnreadable: the decisions on quarantined files cannot be read.
        PatientsFileInvalid: the steward's mapping cannot be used.
    """
    key, digest = site.pseudonym_key(), study.digest
    # What a study was frozen with holds for it, whatever the steward decided since.
    mapping: PatientMapping | None = None
    if frozen is None:
        mapping = mapping_of(site, alone=alone)
        decisions = mapping.decisions
    else:
        decisions = frozen.patients
    units = Units(key, decisions)
    part = require_whole(site) if frozen is None else None
    stored = names_stored(site) if frozen is None else None
    found = gather(
        site,
        study,
        units,
        progress=progress,
        segmentations=require_labels,
        frozen=frozen,
        alone=alone,
    )
    accepted, linked, rejects = found.accepted, found.linked, found.rejects
    joined, files = found.joined, found.files
    slices = list(accepted)
    if study.input.dimensions == 3:
        accepted, linked, single = as_images(accepted, linked, study.input)
        rejects.update(single.values())
        slices = [one for index, one in enumerate(slices) if index not in single]
    faults: list[DataError] = [] if accepted else [no_images(site, rejects)]
    if frozen is None:
        # Nor may a fetch have begun, or ended, while the files were read.
        part = part or require_whole(site, more=names_stored(site) != stored)
        faults[:0] = [part] if part else []
    targets = unlabelled(accepted)
    if require_labels:
        targets = join_targets(
            site, study, accepted, linked, joined, units.number, alone=alone, tolerant=tolerant
        )
    rows_left = targets.rows_left
    if require_labels:
        # A row may speak of an image that is yet to come; what it says of frozen ones is theirs.
        faults += (
            fault
            for fault in targets.faults
            if frozen is None or not isinstance(fault, LabelWithoutImage)
        )
    items = _items(site, study, accepted, slices, targets)
    cells = {
        (item.image, item.patient): one
        for item, one in zip(items, targets.cells_of(study.task, accepted, slices), strict=True)
        if one is not None
    }
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
    if alone:
        if frozen is not None and require_labels and isinstance(study.task.source, LabelsFile):
            # What the labels file says now is told above, and has no say here.
            names = [
                (manifests.image_name(key, digest, one.keys.sop_instance), name)
                for one, name in accepted
            ]
            targets = frozen_targets(study.task, names, manifests.labels_of(site, frozen))
            items = _items(site, study, accepted, slices, targets)
        accepted, targets, items = _usable(study, accepted, targets, slices, items, frozen)
    cohort = assembled(accepted, targets if require_labels else None, counted, study.task)
    if cohort is not None and require_labels and not faults:
        faults += class_faults(site, study, cohort.patients)
    facts = tuple((_described(one), name) for one, name in accepted)
    return Reading(
        cohort, tuple(faults), files, counted, found.later, len(spoiled), items,
        tuple(found.segmentations), joined.faded if joined else 0, facts, decisions,
        () if mapping is None else undecided(found.known, mapping, site.patients),
        () if mapping is None else lines_without_image(found.known, mapping),
        frozenset(found.traits), cells, rows_left,
    )  # fmt: skip


def _items(
    site: Site,
    study: Study,
    images: Sequence[tuple[Accepted, str]],
    slices: Sequence[tuple[Accepted, str]],
    targets: Targets,
) -> tuple[Item, ...]:
    """The images as a manifest names them; of volumes, their slices."""
    key, digest = site.pseudonym_key(), study.digest
    return tuple(
        item_of(
            key, digest, sop_instance=one.keys.sop_instance, patient=name,
            content=one.content, pixels=one.facts.pixels, label=token,
        )
        for (one, name), token in zip(
            slices, targets.tokens(study.task, images, slices), strict=True
        )
    )  # fmt: skip


def _usable(
    study: Study,
    images: Sequence[tuple[Accepted, str]],
    targets: Targets,
    slices: Sequence[tuple[Accepted, str]],
    items: Sequence[Item],
    frozen: Manifest | None,
) -> tuple[list[tuple[Accepted, str]], Targets, tuple[Item, ...]]:
    """The images that have a target and are as they were frozen, with their targets and items.

    A volume whose patient lost a slice would be another volume: all of the patient's are left out.
    """
    alike = set(items) if frozen is None else set(items) & set(frozen.items)
    lost = (
        {one.patient for one in frozen.items if one not in alike} if frozen is not None else set()
    )
    fits = {
        (name, one.keys.sop_instance): item in alike
        and not (study.input.dimensions == 3 and name in lost)
        for (one, name), item in zip(slices, items, strict=True)
    }
    kept = [
        place
        for place, (one, name) in enumerate(images)
        if targets.records[place] is not None and fits[name, one.keys.sop_instance]
    ]
    chosen = [images[place] for place in kept]
    patients = {name for _, name in chosen}
    labelled = {(name, one.keys.sop_instance) for one, name in chosen}
    used = tuple(
        item
        for (one, name), item in zip(slices, items, strict=True)
        if (
            name in patients
            if study.input.dimensions == 3
            else (name, one.keys.sop_instance) in labelled
        )
    )
    return chosen, Targets([targets.records[place] for place in kept]), used


def _described(one: Accepted) -> Facts:
    """What is known of an image; of a volume, whose first slice speaks for it, all pixels."""
    if len(one.image.shape) == 2:
        return one.facts
    return replace(one.facts, pixels=one.image.digest.hex())
