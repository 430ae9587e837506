"""The studies that tests ask: a small sound one, and what a test says otherwise."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from typing import Any

from cloister_fl.errors import CloisterError
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study

Table = str | Mapping[str, Any]
"""A study's table: its lines as they stand in a file, or its values by key."""

SMALL: Mapping[str, Table] = {
    "study": {"name": "s", "question": "q"},
    "input": {"size": 32},
    "target": {"column": "finding", "classes": ["normal", "nodule"]},
}
"""The least that a study says, of images small enough for tests."""


def study(**tables: Table) -> Study:
    """``SMALL`` with further tables; a key that is given replaces the one there.

    Raises:
        StudyInvalid: the study is none that a file may ask.
    """
    return parse_study(study_text(**tables))


def bound(**tables: Table) -> Study:
    """``study(**tables)`` with the hash of its initial model, as a site wants it."""
    return parse_study(bound_text(**tables))


def study_text(**tables: Table) -> str:
    """The file of ``study(**tables)``, a line a key; it need not be valid."""
    given = merged(SMALL, tables)
    return "\n\n".join("\n".join([f"[{name}]", *_lines(given[name])]) for name in given) + "\n"


def bound_text(**tables: Table) -> str:
    """``study_text(**tables)`` with the hash of its initial model, as a site wants it.

    A study with faults, or one that says the hash itself, is written as it is.
    """
    text = study_text(**tables)
    digest = _initial_model(text)
    line = {"training": {"initial_model": digest}}
    return study_text(**merged(tables, line)) if digest else text


def _initial_model(text: str) -> str:
    try:
        return _drawn(text)
    except CloisterError:
        return ""


@functools.cache
def _drawn(text: str) -> str:
    from cloister_fl.study.initial_model import bind

    asked = parse_study(text)
    return "" if asked.training.initial_model else bind(asked).training.initial_model


def merged(base: Mapping[str, Table], tables: Mapping[str, Table]) -> dict[str, dict[str, Any]]:
    """``base`` with the keys of ``tables``; a key whose value is None takes it away."""
    made = {name: _values(table) for name, table in base.items()}
    for name, table in tables.items():
        made[name] = made.get(name, {}) | _values(table)
    return made


def _values(table: Table) -> dict[str, Any]:
    return tomllib.loads(table) if isinstance(table, str) else dict(table)


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_lines(value))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # Strings, numbers and truth values are written in TOML as in JSON.
    return json.dumps(value, ensure_ascii=False)
