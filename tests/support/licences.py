"""Which distributions the extras install, and whether one of them is under the GPL.

The LGPL passes, for a library under it may be used by a program that is not; so does the GPL with
the exception of GCC's runtime libraries, and what offers another licence beside the GPL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Find = Callable[[str], metadata.Distribution]

_EXCEPTED = "GCC-EXCEPTION-3.1"
_WORD = re.compile(r"\(|\)|[^\s()]+")
_LONGEST_NAME = 200
"""Longer than this, a licence field holds the licence itself, or those of all that is bundled."""


@dataclass(frozen=True)
class Statement:
    """What a distribution says of its licence, each part as far as it is there.

    Attributes:
        expression: an SPDX expression (PEP 639).
        text: the older free field; the licence's name, or all of its words.
        classifiers: the last part of each licence classifier.
    """

    expression: str | None
    text: str | None
    classifiers: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return not (self.expression or self.text or self.classifiers)


def closure(requirements: Iterable[str], find: Find = metadata.distribution) -> dict[str, str]:
    """Follow requirements to the end, with this interpreter's markers.

    Returns:
        The name of each distribution, with "" where it is installed, else what asks for it.
    """
    asked: dict[str, set[str]] = {}
    missing: dict[str, str] = {}
    waiting = [(Requirement(text), "the project") for text in requirements]
    while waiting:
        wanted, by = waiting.pop()
        name = canonicalize_name(wanted.name)
        known = asked.get(name)
        extras = {"", *wanted.extras} | (known or set())
        if name in missing or known == extras:
            continue
        asked[name] = extras
        try:
            distribution = find(name)
        except metadata.PackageNotFoundError:
            missing[name] = by
            continue
        for text in distribution.requires or ():
            further = Requirement(text)
            if further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append((further, name))
    return {name: missing.get(name, "") for name in sorted(asked)}


def statement(distribution: metadata.Distribution) -> Statement:
    """Read what a distribution's metadata say of its licence."""
    about = distribution.metadata
    text = (about.get("License") or "").strip()
    return Statement(
        about.get("License-Expression") or None,
        None if text.upper() in ("", "UNKNOWN", "NONE", "OTHER") else text,
        tuple(
            line.rpartition("::")[2].strip()
            for line in about.get_all("Classifier") or ()
            if line.startswith("License ::") and not line.endswith(("OSI Approved", "approved"))
        ),
    )


def is_gpl(said: Statement) -> bool:
    """Say whether the GPL or the AGPL is the only choice that a statement leaves.

    The newest kind of statement that is there is decisive, for it is the most exact. Several
    classifiers may mean "and" or "or"; one of the GPL among them is taken as "and".
    """
    if said.expression:
        return _expression_is_gpl(said.expression)
    if said.text and len(said.text) <= _LONGEST_NAME:
        choices = re.split(r"\bOR\b|\bor\b(?! later| newer| any)|/", said.text)
        if all(_names_gpl(choice) for choice in choices):
            return True
        if len(choices) > 1:
            return False
    elif said.text and re.match(r"\W*gnu\s+(affero\s+)?general\s+public", said.text, re.I):
        return True
    return any(_names_gpl(name) for name in said.classifiers)


def _names_gpl(name: str) -> bool:
    words = name.upper()
    if "LGPL" in words or "LESSER" in words or "LIBRARY GENERAL" in words:
        words = words.replace("LGPL", "").replace("LESSER GENERAL PUBLIC", "")
        words = words.replace("LIBRARY GENERAL PUBLIC", "")
    words = re.sub(r"GPL[- ]COMPATIBLE", "", words)
    return "GPL" in words or "GENERAL PUBLIC" in words


def _expression_is_gpl(expression: str) -> bool:
    """Evaluate an SPDX expression; of the operators, WITH binds closest and OR least (annex D)."""
    words = _WORD.findall(expression.upper())
    at = 0

    def take() -> str:
        nonlocal at
        at += 1
        return words[at - 1] if at <= len(words) else ""

    def peek() -> str:
        return words[at] if at < len(words) else ""

    def either() -> bool:
        bad = both()
        while peek() == "OR":
            take()
            # Both sides are read, whatever the first one says.
            bad = both() and bad
        return bad

    def both() -> bool:
        bad = one()
        while peek() == "AND":
            take()
            bad = one() or bad
        return bad

    def one() -> bool:
        word = take()
        if word == "(":
            bad = either()
            assert take() == ")", expression
            return bad
        excepted = False
        if peek() == "WITH":
            take()
            excepted = take() == _EXCEPTED
        return not excepted and _names_gpl(word)

    bad = either()
    assert at == len(words), expression
    return bad
