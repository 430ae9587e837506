"""Mapping of a site: a CSV file in which the steward says whose numbers are whose.

Rows with one ``person`` are one patient, rows with different ones are different patients. The file
is judged whole; faults name lines, never values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.patients.units import Decisions, Record, Units, normalised
from cloister_fl.client.data.tables.csv_file import (
    Faults,
    described,
    first_lines,
    header_of,
    lines_apart,
    listing,
    read_text,
    rows_of,
)
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.patient_settings import KINDS
from cloister_fl.errors import PatientsFileInvalid

NUMBER, ISSUER, PERSON = "PatientID", "IssuerOfPatientID", "person"
_WANTED = (NUMBER, PERSON)
_NAMED = "patients file", "data.patients.mapping", PatientsFileInvalid
_REMEDY = (
    f"Columns are {NUMBER}, {ISSUER} (may be left out) and {PERSON}; each number has one row, and "
    f"all rows of one patient the same {PERSON}."
)


@dataclass(frozen=True)
class Assigned:
    """A row of the file.

    Attributes:
        line: its line, 1-based.
        record: the number, normalised.
        person: whose it is, normalised.
    """

    line: int
    record: Record = field(repr=False)
    person: str = field(repr=False)


@dataclass(frozen=True)
class PatientMapping:
    """What a site's steward decided about patient numbers.

    Attributes:
        rows: of the mapping, in the order of the file.
        decisions: all of it, in keyed hashes.
        units: names patients by it.
    """

    rows: tuple[Assigned, ...]
    decisions: Decisions
    units: Units = field(repr=False)


def mapping_of(site: Site, *, alone: bool = False) -> PatientMapping:
    """Read the steward's decisions as they are now.

    Args:
        site: the opened site.
        alone: leave out a faulty row, which is of one patient, and use the others.

    Raises:
        PatientsFileInvalid: the mapping cannot be used; says every faulty line.
    """
    key, chosen = site.pseudonym_key(), site.patients
    settings = {kind: getattr(chosen, kind) for kind in (*KINDS, "names")}
    plain = Units(key, Decisions(settings))
    file = site.root / chosen.mapping
    rows = read_mapping(file, plain, alone=alone) if chosen.mapping else ()
    # Two rows of one patient may be one record by the settings.
    kept = {plain.row(_record(plain, one), one.person) for one in rows}
    decisions = Decisions(settings, tuple(sorted(kept)))
    return PatientMapping(rows, decisions, Units(key, decisions))


def read_mapping(path: Path, units: Units, *, alone: bool = False) -> tuple[Assigned, ...]:
    """Read and judge the file.

    Args:
        path: the file.
        units: how numbers are compared, without any mapping.
        alone: each line is a row, and a faulty one is left out.

    Raises:
        PatientsFileInvalid: with every faulty line; with ``alone``, of the first line only.
    """
    text = first_lines(path, *_NAMED) if alone else read_text(path, *_NAMED)
    found = header_of(text, _WANTED, (NUMBER,))
    header, delimiter = found.cells, found.delimiter
    for name in (*_WANTED, ISSUER):
        if header.count(name) != 1 and (name != ISSUER or name in header):
            times = f"the column '{name}' {header.count(name)} times"
            raise PatientsFileInvalid(
                f"The patients file has {times if name in header else f'no column {name!r}'}.",
                why=described(header, (*_WANTED, ISSUER)),
                remedy=_REMEDY,
            )
    rows: list[Assigned] = []
    faults: Faults = []
    seen: dict[Record, Assigned] = {}
    for line, cells in (
        lines_apart(path, delimiter, *_NAMED)
        if alone
        else rows_of(text, delimiter, faults, apart=True)
    ):
        if line <= found.line or not any(cells):
            continue
        if len(cells) != len(header):
            faults.append((line, "has another number of cells than the first line"))
            continue
        cell = dict(zip(header, cells, strict=True))
        one = Assigned(
            line,
            normalised(cell.get(ISSUER, ""), cell[NUMBER]),
            normalised("", cell[PERSON]).number,
        )
        fault = _fault(one, seen.get(_record(units, one)))
        if fault:
            faults.append((line, fault))
            continue
        seen.setdefault(_record(units, one), one)
        rows.append(one)
    if faults and not alone:
        raise PatientsFileInvalid(f"The patients file has {listing(faults)}", remedy=_REMEDY)
    return tuple(rows)


def _fault(one: Assigned, before: Assigned | None) -> str:
    if not one.record.number:
        return f"has no {NUMBER}"
    if not one.person:
        return f"has no {PERSON}"
    if before is None:
        return ""
    if before.person != one.person:
        # Also where they are one only by the settings: both cannot hold.
        return f"names the number of line {before.line} with another {PERSON}"
    return f"names the number of line {before.line} again" if before.record == one.record else ""


def _record(units: Units, one: Assigned) -> Record:
    return units.record(one.record.issuer, one.record.number)
