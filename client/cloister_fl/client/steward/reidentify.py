"""Re-identification of the short ids and codes in a site's own messages.

Messages name files and patients by pseudonyms, so that they can be sent to whoever helps. Who mends
the data has to know which they are: this says it, at the site, and writes it down nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from cloister_fl.client.data import frozen_dataset
from cloister_fl.client.data.file_cache.file_memory import memory_of
from cloister_fl.client.data.frozen_dataset import image_name
from cloister_fl.client.data.patients.mapping import mapping_of
from cloister_fl.client.data.patients.units import Units
from cloister_fl.client.data.quarantine import releases
from cloister_fl.client.dicom.file_finder import discover
from cloister_fl.client.dicom.folder_reader import Refused, read_folder, short_id
from cloister_fl.client.pacs.sealed_store import Store
from cloister_fl.client.site.folder import Site
from cloister_fl.client.steward.data_report import any_study
from cloister_fl.errors import DataError, OptionInvalid, Reject
from cloister_fl.study.schema import Study

_NAME = re.compile(r"[0-9a-f]{12,64}")
_BETWEEN = re.compile(r"[\s,;]+")


@dataclass(frozen=True)
class Named:
    """One file that was meant.

    Attributes:
        short_id: its short name.
        path: where it lies; for the steward's eyes, as the next.
        patient: Patient ID; empty where it was turned away.
        reason: why it was turned away, or None.
        asked: which of the words that were asked for mean it.
    """

    short_id: str
    path: str = field(repr=False)
    patient: str = field(repr=False)
    reason: Reject | None
    asked: tuple[str, ...] = ()


def words_of(what: str) -> list[str]:
    """Ids and codes of a text, with commas or white space between, as a message lists them."""
    return [one for one in dict.fromkeys(_BETWEEN.split(what)) if one]


def find(
    site: Site,
    what: str,
    study: Study | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Named]:
    """Find the files that names or codes stand for, in the order of the paths.

    Args:
        site: the opened site.
        what: short names of files; pseudonyms of patients or images, or 12 digits of one or more;
            or codes of reasons for rejecting files; see ``words_of``.
        study: the study of the message; pseudonyms hold for one study. Without one, those of
            a data report without a study.
        progress: called with (files done, files in all).

    Raises:
        OptionInvalid: something in it is none of these, or there is nothing in it.
        FolderUnreadable, DecoderUnfit, FileUnreadable: nothing can be read.
    """
    codes = {one.value: one for one in Reject}
    words = words_of(what)
    for word in words or [what]:
        if word.upper() not in codes and not _NAME.fullmatch(word.lower()):
            raise OptionInvalid(
                f"{word!r} is not an id of a file, an image or a patient, or a rejection code.",
                remedy="Give 12 hexadecimal digits or more, as shown in a message, or a code from "
                "CLO-210 to CLO-236.",
            )
    key, judged_by = site.pseudonym_key(), study or any_study()
    units = _units(site, study)
    stored = Store(site.store, site.cache_key()).items()
    paths = {short_id(key, one.name): one.path for one in discover(site.dicom)}
    paths |= {short_id(key, each.name): each.path for each in stored}
    found = []
    with memory_of(site, releases(site)) as memory:
        for one in read_folder(
            site.dicom,
            judged_by.input,
            key=key,
            memory=memory,
            also=stored,
            segment=judged_by.task.segment_read,
            progress=progress,
        ):
            reason = one.reason if isinstance(one, Refused) else None
            names = [one.short_id]
            if one.keys is not None:
                keys = one.keys
                names.append(units.pseudonym(judged_by.digest, keys.issuer, keys.patient_id))
                names.append(image_name(key, judged_by.digest, keys.sop_instance))
            asked = tuple(
                word
                for word in words
                if reason is codes.get(word.upper(), ...)
                or any(name.startswith(word.lower()) for name in names)
            )
            if asked:
                patient = "" if one.keys is None else one.keys.patient_id
                path = str(paths.get(one.short_id, ""))
                found.append(Named(one.short_id, path, patient, reason, asked))
    return found


def _units(site: Site, study: Study | None) -> Units:
    """What patients are named by: what the study was frozen with, else what holds now."""
    if study is not None:
        # A manifest that was altered is no reason to keep silent: its message asks for this.
        with suppress(DataError):
            frozen = frozen_dataset.load(site, study)
            if frozen is not None:
                return Units(site.pseudonym_key(), frozen.patients)
    return mapping_of(site).units
