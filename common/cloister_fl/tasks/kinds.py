"""The kinds of tasks that a study may name."""

from __future__ import annotations

import difflib

from cloister_fl.system.toml import KeyedValueError
from cloister_fl.tasks.classification import ClassificationTarget
from cloister_fl.tasks.segmentation import SegmentationTarget
from cloister_fl.tasks.task import DEFAULT_KIND, Target

KINDS: dict[str, type[Target]] = {
    "classification": ClassificationTarget,
    "segmentation": SegmentationTarget,
}
"""The table ``target`` of each kind."""


def read_target(given: object) -> Target:
    """Validate the table ``target`` of a study by the rules of its kind.

    Raises:
        KeyedValueError: there is no such kind.
        ValueError: it is no table, or breaks a rule of its kind (pydantic's ``ValidationError``).
    """
    if isinstance(given, Target):
        return given
    if not isinstance(given, dict):
        raise ValueError("must be a table.")
    named = given.get("kind", DEFAULT_KIND)
    known = KINDS.get(named) if isinstance(named, str) else None
    if known is None:
        close = difflib.get_close_matches(str(named)[:64], KINDS, n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(KINDS)}."
        raise KeyedValueError("kind", "is no kind of task.", hint)
    return known.model_validate(given)
