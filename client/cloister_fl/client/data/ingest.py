"""Ingest of a site's files: images and segmentation masks by patient, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cloister_fl.client.data.file_cache.file_memory import memory_of
from cloister_fl.client.data.frozen_dataset import Manifest, image_name
from cloister_fl.client.data.labels.row_matching import Linked
from cloister_fl.client.data.mask_matching import Join
from cloister_fl.client.data.patients.possible_matches import Known
from cloister_fl.client.data.patients.units import Units, keyed, normalised
from cloister_fl.client.data.quarantine import releases
from cloister_fl.client.dicom.folder_reader import (
    Accepted,
    Keys,
    Refused,
    Segmented,
    read_folder,
)
from cloister_fl.client.ledger.machine_registry import Trait
from cloister_fl.client.pacs.sealed_store import Store
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Study


@dataclass(eq=False)
class Gathered:
    """What was found.

    Attributes:
        accepted: images, each with its patient's pseudonym.
        linked: what labels are joined to: one for each of ``accepted``, in its order, and between
            them one for each that was turned away as a duplicate or came later.
        rejects: how many files were turned away, by reason.
        segmentations: contents of the segmentations.
        joined: what they mark, or None where there are none.
        later: how many images and segmentations came after the study was frozen.
        elsewhere: pseudonyms of images that are there under patients who were not frozen with them.
        known: the records of images and segmentations, each once.
        traits: what tells their patients on this machine; see ``ledger.machine_registry``.
    """

    accepted: list[tuple[Accepted, str]] = field(default_factory=list)
    linked: list[Linked] = field(default_factory=list)
    rejects: Counter[Reject] = field(default_factory=Counter)
    segmentations: list[bytes] = field(default_factory=list)
    joined: Join | None = None
    later: int = 0
    elsewhere: set[str] = field(default_factory=set)
    known: set[Known] = field(default_factory=set)
    traits: set[Trait] = field(default_factory=set, repr=False)

    @property
    def files(self) -> int:
        """How many files there are."""
        return (
            len(self.accepted) + len(self.segmentations) + self.later + sum(self.rejects.values())
        )


def gather(
    site: Site,
    study: Study,
    units: Units,
    *,
    progress: Callable[[int, int], None] | None = None,
    segmentations: bool = True,
    frozen: Manifest | None = None,
    alone: bool = False,
) -> Gathered:
    """Read a site's folder and its store.

    Args:
        site: the opened site.
        study: what is read of the files.
        units: names the patients.
        progress: called with (files done, files in all).
        segmentations: whether segmentations are read, where the study's task is about them.
        frozen: what the study was frozen with; files that came later are counted and left out.
        alone: see ``read_folder``.

    Raises:
        FolderUnreadable, DecoderUnfit: nothing can be read at all.
        FileUnreadable: the decisions on held files cannot be read.
    """
    key, digest = site.pseudonym_key(), study.digest
    contents = frozenset() if frozen is None else frozen.contents
    images = frozenset() if frozen is None else frozen.images
    patients = {patient for _, patient in images}
    found = Gathered()

    def unit(keys: Keys) -> tuple[str, ...]:
        return units.unit(keys.issuer, keys.patient_id)

    with memory_of(site, releases(site)) as memory:
        for outcome in read_folder(
            site.dicom,
            study.input,
            key=key,
            memory=memory,
            also=Store(site.store, site.cache_key()).items(),
            segment=study.task.segment_read if segmentations else "",
            first=contents,
            alone=alone,
            unit=unit,
            progress=progress,
        ):
            if isinstance(outcome, Refused):
                found.rejects[outcome.reason] += 1
            if outcome.keys is None:
                continue
            keys = outcome.keys
            name = units.pseudonym(digest, keys.issuer, keys.patient_id)
            if not isinstance(outcome, Refused):
                person = outcome.facts.person
                hashed = keyed(key, "name", person) if person else ""
                found.known.add(Known(keys.issuer, keys.patient_id, hashed))
                record = normalised(keys.issuer, keys.patient_id)
                found.traits.add(("record", record.issuer, record.number))
                if person:
                    found.traits.add(("person", person))
            if isinstance(outcome, Segmented):
                if frozen is not None and outcome.content not in contents:
                    found.later += 1
                    continue
                found.segmentations.append(outcome.content)
                # All images are known by now: segmentations come last.
                found.joined = found.joined or Join(found.accepted, found.linked)
                found.joined.add(outcome, name)
                continue
            image = image_name(key, digest, keys.sop_instance)
            new = frozen is not None and (image, name) not in images
            if new:
                found.elsewhere.add(image)
            found.later += new and isinstance(outcome, Accepted)
            refused = isinstance(outcome, Refused)
            # What came later has no say, but for another copy of a frozen patient's image.
            later = new and not (refused and name in patients)
            numbers = units.numbers(keys.issuer, keys.patient_id)
            found.linked.append(Linked(keys, name, new or refused, later, numbers, image))
            if isinstance(outcome, Accepted) and not new:
                found.accepted.append((outcome, name))
    return found
