"""Settings in ``site.toml`` of how the labels file is read.

::

    [data.labels]
    file = "befunde.csv"
    encoding = "cp1252"
    columns = { PatientID = "Patienten-ID", finding = "Befund" }
    values.finding = { "Pneumonie" = "pneumonia", "o. B." = "normal" }

A study's words are the federation's; a hospital's table has the hospital's. Who keeps the table
says here which is which, and the table stays as it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from cloister_fl.system.toml import FileModel, KeyedValueError

Encoding: TypeAlias = Literal["utf-8", "utf-16", "cp1252"]

KEY_COLUMNS = ("SOPInstanceUID", "AccessionNumber", "StudyInstanceUID", "PatientID")
"""What a row of labels is keyed by, the most exact first."""

OF_PATIENTS = ("SOPInstanceUID", "AccessionNumber", "PatientID", "StudyInstanceUID")
"""The same where patients have labels: such tables often name the study beside the patient."""

_Word = Annotated[str, Field(min_length=1, max_length=256)]


def composed(text: str) -> str:
    """Text as it is compared: composed (NFC), for one keyboard types a letter and another a letter
    and its dots."""
    return unicodedata.normalize("NFC", text.strip())


class LabelSettings(FileModel):
    """The table ``[data.labels]``; ``labels = "labels.csv"`` stands for one with that ``file``."""

    file: Annotated[str, Field(min_length=1, max_length=4096)] = "labels.csv"
    """CSV, or a workbook (``.xlsx``); relative to the file's folder or absolute."""
    sheet: Annotated[str, Field(max_length=256)] = ""
    """Of a workbook, the sheet; empty for the first."""
    encoding: Encoding = "utf-8"
    """Of a CSV file that does not begin with a byte order mark."""
    columns: Annotated[dict[_Word, _Word], Field(max_length=64)] = {}
    """By a word of a study or of DICOM, what the file calls the column."""
    values: Annotated[dict[_Word, dict[_Word, _Word]], Field(max_length=64)] = {}
    """By the study's word for a column: by a word of the file, the study's word for it."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_file(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given

    @field_validator("columns")
    @classmethod
    def _one_each(cls, columns: dict[str, str]) -> dict[str, str]:
        seen: dict[str, str] = {}
        for ours, theirs in columns.items():
            if (other := seen.setdefault(composed(theirs), ours)) != ours:
                raise ValueError(f"names the column {theirs!r} for {other!r} and for {ours!r}.")
        return columns

    @model_validator(mode="after")
    def _no_keys_translated(self) -> LabelSettings:
        for key in KEY_COLUMNS:
            if key in self.values:
                raise KeyedValueError(
                    f"values.{key}", "is about a number, which stands as it is in the images."
                )
        return self

    def ours(self, cell: str) -> str:
        """What a study calls the column that the file calls ``cell``; nothing of a column whose
        name another one was given."""
        for ours, theirs in self.columns.items():
            if composed(theirs) == cell:
                return composed(ours)
        return "" if cell in map(composed, self.columns) else cell

    def value(self, column: str, cell: str) -> str:
        """What a study calls a cell of a column."""
        return self._translated.get(column, {}).get(cell, cell)

    @property
    def _translated(self) -> Mapping[str, Mapping[str, str]]:
        return {
            composed(column): {composed(theirs): ours for theirs, ours in words.items()}
            for column, words in self.values.items()
        }
