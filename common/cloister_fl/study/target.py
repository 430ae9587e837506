"""The target of a study: classes of patients, or a segment of images.

A classification reads a column of the labels file. A segmentation reads the DICOM Segmentations
(PS3.3 A.51) that lie with the images, and needs no labels file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cloister_fl.system.text import segment_name
from cloister_fl.system.toml import KeyedValueError, ShownModel

UNMARKED = "nothing marked"
"""The class of a patient in whom a segmentation marks nothing."""

_NO_COLUMN = "DICOM Segmentation"


def _segment(text: str | None) -> str | None:
    return None if text is None else segment_name(text)


def _distinct(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(words)) != len(words):
        raise ValueError("names one twice.")
    return words


_Word = Annotated[str, Field(min_length=1, max_length=128)]
Words = Annotated[tuple[_Word, ...], Field(strict=False), AfterValidator(_distinct)]


class Target(ShownModel):
    """What is predicted: a column of the labels file and its classes in order, or a segment.

    Of a segmentation, ``classes`` are whether anything is marked in a patient at all.
    """

    kind: Literal["classification", "segmentation"] = "classification"
    column: Annotated[str, Field(min_length=1, max_length=128)]
    """Column of the labels file; of a classification only."""
    classes: Annotated[Words, Field(min_length=2, max_length=64)]
    """The first class is the reference ("negative") of a binary target."""
    segment: Annotated[str | None, Field(max_length=64), AfterValidator(_segment)] = None
    """What a segmentation marks, as ``segment_name``. A segment counts whose Segment Label
    (0062,0005) this is, or the meaning of whose property type; case does not matter, and several
    in one file are united."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("kind") != "segmentation":
            return given
        filled = {
            "column": _NO_COLUMN,
            "classes": (UNMARKED, segment_name(str(given.get("segment"))) or "?"),
        }
        for key, value in filled.items():
            if key in given and given[key] != value:
                raise KeyedValueError(key, "has no meaning for kind = 'segmentation'.")
        return {**given, **filled}

    @model_validator(mode="after")
    def _segment_fits(self) -> Target:
        if (self.kind == "segmentation") != bool(self.segment and self.segment.strip()):
            raise KeyedValueError("segment", "is needed for kind = 'segmentation', and only there.")
        return self

    @property
    def outlines(self) -> str:
        """The segment of a segmentation; empty for a classification."""
        return self.segment or ""

    @property
    def described(self) -> str:
        """The target as text."""
        if self.segment:
            return f"segmentation masks of '{self.segment}' in DICOM Segmentations"
        return f"'{self.column}' ({', '.join(self.classes)})"

    def canonical(self) -> dict[str, Any]:
        """What is hashed: what follows from the rest is left out, and so is what there was not
        when there were only classifications."""
        left_out = {"column", "classes"} if self.segment else {"kind", "segment"}
        return self.model_dump(mode="json", exclude=left_out)
