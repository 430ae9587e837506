"""Errors of a cohort: no usable image, one class only, too few patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cloister_fl.client.data.cohort import Patient
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import (
    CloisterError,
    CohortTooSmall,
    DataError,
    InternalError,
    OneClassOnly,
    Reject,
    SiteEmpty,
)
from cloister_fl.study.schema import Study


def no_images(site: Site, rejects: Counter[Reject]) -> DataError:
    """Return the error of a data folder without a usable image; it counts the rejected files."""
    counts = ", ".join(
        f"{count} x {reason.title} ({reason.value})" for reason, count in rejects.most_common()
    )
    return SiteEmpty(
        "The site's data folder has no image that this study can use.",
        why=f"Rejected files: {counts}." if counts else "It holds no file.",
        remedy="Check 'data.dicom' in site.toml and the study's modalities. What was rejected, and "
        f"why: {site.command('check --offline')}",
    )


def unread(error: Exception) -> CloisterError:
    """Return what is told at the site of data that could not be read or used at all.

    Of another library's exception the type alone: its text can quote what it was given.
    """
    if isinstance(error, CloisterError):
        return error
    return InternalError(
        f"The site's data could not be used in a run ({type(error).__name__}).",
        why="Each patient counts as absent: rounds are charged, and answered with noise alone.",
        remedy="Check that the machine has enough memory, then report it, with the version of "
        "Cloister and the study file.",
    )


def class_faults(site: Site, study: Study, patients: Sequence[Patient]) -> list[DataError]:
    """Return the errors in the number of patients, and of those of each class.

    A patient whose examinations or images have several classes is one of each.
    """
    policy, task = site.policy, study.task
    counts = Counter(
        label for patient in patients for label in {unit.label for unit in patient.units}
    )
    key, least = "min_patients_per_class", policy.min_patients_per_class
    if not study.privacy.enabled and policy.min_patients_per_class_without_privacy > least:
        key += "_without_privacy"
        least = policy.min_patients_per_class_without_privacy
    if len(patients) < policy.min_patients:
        return [
            CohortTooSmall(
                f"The site has too few patients: {len(patients)}.",
                why=f"Its policy asks for {policy.min_patients} (policy.min_patients).",
                remedy="Add patients, or leave this study to other sites.",
            )
        ]
    if least and len(task.needed) > 1 and len(counts) < 2:
        only = task.strata[next(iter(counts))]
        return [
            OneClassOnly(
                f"All patients of the site have the class '{only}'.",
                why=f"Its policy asks for {least} of each (policy.{key}).",
                remedy="Check the labels file, or leave this study to other sites.",
            )
        ]
    few = [
        f"'{task.strata[label]}' has {counts[label]}"
        for label in task.needed
        if counts[label] < least
    ]
    if not few:
        return []
    return [
        CohortTooSmall(
            f"The site has too few patients of a class: {', '.join(few)}.",
            why=f"Its policy asks for {least} (policy.{key}).",
            remedy="Add patients, or leave this study to other sites.",
        )
    ]
