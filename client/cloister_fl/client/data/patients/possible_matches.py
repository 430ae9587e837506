"""Possible matches: patient numbers of a site that may be one person's, though they count as two.

Two patients may be one where their numbers differ only in what people and programs change (zeros,
capitals, ``^``, issuers), or where both have one name and birth date. The steward decides; until
then checks of the data and freezing stop. A run never does: who else is there has no say in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from cloister_fl.client.data.patients.mapping import PatientMapping
from cloister_fl.client.data.patients.units import Record, folded, normalised
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.patient_settings import KINDS, PatientSettings
from cloister_fl.errors import DataError, PatientsUndecided
from cloister_fl.system.text import counted

NAMES, PERSON = "names", "person"
"""Reasons beside ``KINDS``: one name and birth date; a mapping's person that is also a number."""
REASONS: Mapping[str, str] = {
    "issuers": "one number under several issuers",
    "components": "a number alone, and followed by ^",
    "padding": "with and without leading zeros",
    "case": "in capitals and small letters",
    "punctuation": "with other spaces or punctuation",
    NAMES: "one name and birth date",
    PERSON: "a person of the mapping that is also a number without a row",
}
_Unit = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A record of an image.

    Attributes:
        issuer, number: as its file has them.
        person: keyed hash of name and birth date; empty where the file lacks one.
    """

    issuer: str = field(repr=False)
    number: str = field(repr=False)
    person: str = field(default="", repr=False)


@dataclass(frozen=True)
class Match:
    """Patients that may be one.

    Attributes:
        reasons: why, keys of ``REASONS``.
        records: their numbers, as the files have them.
        patients: how many they count as.
    """

    reasons: tuple[str, ...]
    records: tuple[Record, ...] = field(repr=False)
    patients: int


def undecided(
    known: Iterable[Known], mapping: PatientMapping, settings: PatientSettings
) -> tuple[Match, ...]:
    """Find what the steward has not decided; pure.

    A pair is decided where one of the kinds in which its numbers differ is ``different``, or where
    the mapping has a row for both; a name and birth date also where ``names`` says so.

    Args:
        known: the records of all images.
        mapping: the steward's mapping.
        settings: the steward's settings.
    """
    units = mapping.units
    unit_of: dict[Record, _Unit] = {}
    shown: dict[Record, Record] = {}
    alike: dict[Record, set[Record]] = defaultdict(set)
    named: dict[str, set[Record]] = defaultdict(set)
    for one in known:
        record = normalised(one.issuer, one.number)
        if record not in unit_of:
            unit_of[record] = units.unit(one.issuer, one.number)
            shown[record] = Record(one.issuer, one.number)
            alike[folded(record, KINDS)].add(record)
        if one.person:
            named[one.person].add(record)
    rows = {units.record(row.record.issuer, row.record.number) for row in mapping.rows}
    assigned = {one for one in unit_of if units.record(one.issuer, one.number) in rows}
    found: list[Match] = []

    def add(records: Iterable[Record], reasons: Iterable[str]) -> None:
        ordered = sorted(set(records))
        told = tuple(sorted(set(reasons), key=list(REASONS).index))
        patients = len({unit_of[one] for one in ordered})
        found.append(Match(told, tuple(shown[one] for one in ordered), patients))

    for group in alike.values():
        pairs = [
            ((one, other), reasons)
            for one, other in combinations(sorted(group), 2)
            if unit_of[one] != unit_of[other] and not {one, other} <= assigned
            if (reasons := _reasons(one, other, settings))
        ]
        if pairs:
            add(
                (record for pair, _ in pairs for record in pair),
                (reason for _, reasons in pairs for reason in reasons),
            )
    for group in named.values() if settings.names == "ask" else ():
        # Not pair by pair: a placeholder may be everybody's name.
        if len({unit_of[one] for one in group}) > 1 and group - assigned:
            add(group, (NAMES,))
    found += _persons(mapping, unit_of, shown)
    return tuple(found)


def _reasons(one: Record, other: Record, settings: PatientSettings) -> tuple[str, ...]:
    """In which kinds two records differ, of those that fold to one; none where that is decided."""
    needed = [
        kind
        for kind in KINDS
        if folded(one, set(KINDS) - {kind}) != folded(other, set(KINDS) - {kind})
    ]
    kinds = needed or list(KINDS)
    if any(getattr(settings, kind) == "different" for kind in kinds):
        return ()
    return tuple(kind for kind in kinds if getattr(settings, kind) == "ask")


def _persons(
    mapping: PatientMapping, unit_of: Mapping[Record, _Unit], shown: Mapping[Record, Record]
) -> Iterable[Match]:
    """Find images without a row whose number the mapping has as a person.

    Who writes ``old, new`` means both numbers; only the old one has a row.
    """
    persons = {folded(normalised("", row.person), KINDS) for row in mapping.rows}
    mapped = {mapping.units.unit(row.record.issuer, row.record.number) for row in mapping.rows}
    for record, unit in sorted(unit_of.items()):
        if unit not in mapped and folded(record, KINDS) in persons:
            yield Match((PERSON,), (shown[record],), 2)


def lines_without_image(known: Iterable[Known], mapping: PatientMapping) -> tuple[int, ...]:
    """Lines of a mapping that speak of no image; a number may be misspelt there."""
    units = mapping.units
    there = {units.record(one.issuer, one.number) for one in known}
    return tuple(
        row.line
        for row in mapping.rows
        if units.record(row.record.issuer, row.record.number) not in there
    )


def undecided_error(site: Site, matches: Sequence[Match]) -> DataError | None:
    """The error of what is not decided, or None; counts alone, no number and no name."""
    if not matches:
        return None
    counts = Counter(reason for one in matches for reason in one.reasons)
    told = "".join(
        f"\n  {counted(counts[reason], 'set')}: {what}"
        + (f" ({reason})" if reason in (*KINDS, NAMES) else "")
        for reason, what in REASONS.items()
        if reason in counts
    )
    patients = sum(one.patients for one in matches)
    keys = [reason for reason in counts if reason in KINDS]
    lines = [f'{kind} = "same", or "different"' for kind in keys]
    lines += ['names = "different", where names and dates are placeholders'] * (NAMES in counts)
    return PatientsUndecided(
        f"{counted(len(matches), 'set')} of patient numbers may be one person's each, and count "
        f"as {counted(patients, 'patient')}:{told}\n",
        remedy="List them, at this site alone: "
        + site.command("patients --out patients-found.csv")
        + ". Then decide in site.toml, below [data.patients]: "
        + "; ".join([*lines, 'mapping = "patients.csv", a file with a row for each number'])
        + ".",
    )
