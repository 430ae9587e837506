"""Freezing without what does not fit: images without a label, and rows of labels without an image.

A hospital's export is seldom whole: a file is damaged, a report is not written yet. Where the
steward's settings say so, such images are left out, up to a share; it is judged when the data are
frozen, by a person, and never in a run. What is left out is told here, and nothing of it leaves.
"""

from __future__ import annotations

from dataclasses import replace

from cloister_fl.client.data.cohort_errors import class_faults
from cloister_fl.client.data.reading import Reading
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import (
    DataError,
    LabelMissing,
    LabelsAmbiguous,
    LabelsInvalid,
    LabelWithoutImage,
    TooMuchLeftOut,
)
from cloister_fl.study.schema import Study
from cloister_fl.system.text import counted

_OF_SINGLE_ITEMS = {
    LabelMissing.code,
    LabelWithoutImage.code,
    LabelsAmbiguous.code,
    LabelsInvalid.code,
}


def is_about(site: Site, faults: tuple[DataError, ...]) -> bool:
    """Whether these faults are of single images and rows, which the site's settings leave out."""
    return (
        site.left_out_at_most is not None
        and bool(faults)
        and all(fault.code in _OF_SINGLE_ITEMS for fault in faults)
    )


def as_frozen(reading: Reading) -> Reading:
    """A reading of data that were frozen: what did not fit then is no fault of them now."""
    faults = [fault for fault in reading.faults if fault.code not in _OF_SINGLE_ITEMS]
    left_out = [fault for fault in reading.faults if fault.code in _OF_SINGLE_ITEMS]
    return replace(reading, faults=tuple(faults), left_out=tuple(left_out))


def judged(site: Site, study: Study, whole: Reading, fits: Reading) -> Reading:
    """The reading to go on with.

    Args:
        site: whose settings say how much may be left out.
        study: the study.
        whole: the data as they are, with faults that ``is_about`` accepts.
        fits: the same read with ``alone``: what can be used of them.

    Returns:
        ``fits``, which says what was left out; or ``whole``, where that is too much.
    """
    images = len(whole.items) - len(fits.items)
    rows = fits.rows_left
    found = len(whole.items) + rows
    share = 100 * (images + rows) / found if found else 100.0
    most = site.left_out_at_most or 0.0
    if fits.cohort is None or share > most:
        told = f"{counted(images, 'image')} and {counted(rows, 'row')} of labels"
        too_much = TooMuchLeftOut(
            f"Too much would be left out: {told}, {share:.1f} % of {found}.",
            why=f"The site's settings allow {most:g} % (data.left_out_at_most). What does not fit "
            "is told below.",
            remedy="Mend the data, or raise the limit in site.toml if these patients are left out "
            "for no reason that the study is about.",
        )
        return replace(whole, faults=(too_much, *(fits.faults or whole.faults)))
    faults = class_faults(site, study, fits.cohort.patients)
    return replace(fits, faults=tuple(faults), left_out=fits.faults)
