"""Patients of a hold-out that a test makes up."""

from __future__ import annotations

from collections.abc import Iterable

from cloister_fl.tasks.divided_holdout import HoldoutPatient, HoldoutUnit


def holdout_patients(labels: Iterable[int], *, images: int = 1) -> tuple[HoldoutPatient, ...]:
    """A patient of each label, in this order, each with so many images."""
    return tuple(
        HoldoutPatient(f"p{place}", label, (HoldoutUnit(label, images),), f"mark {place}")
        for place, label in enumerate(labels)
    )
