"""List of the patient numbers that may be one person's, for the steward to decide on.

The list names patients: it is written for its owner alone, and stays at the site.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.data.patients.mapping import ISSUER, NUMBER, PERSON, mapping_of
from cloister_fl.client.data.patients.possible_matches import REASONS, Match
from cloister_fl.client.data.patients.units import Record
from cloister_fl.client.site.folder import Site
from cloister_fl.client.steward.data_report import any_study
from cloister_fl.errors import OutputInTheWay
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.system.git_ignore import keep_file_out_of_git
from cloister_fl.system.text import counted


def matches_of(
    site: Site, study: Study | None, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Match, ...]:
    """Read a site's data and find what the steward has not decided.

    Args:
        site: the opened site.
        study: whose images are looked at; without one, every modality.
        progress: called with (files done, files in all).

    Raises:
        FolderUnreadable, DecoderUnfit, FileUnreadable, PatientsFileInvalid: see ``read_cohort``.
    """
    # Before the images are read, which takes long.
    mapping_of(site)
    reading = read_cohort(site, study or any_study(), progress=progress, require_labels=False)
    return reading.matches


def prepare(out: Path) -> None:
    """See that the list can be written, and keep it out of any git repository.

    Raises:
        OutputInTheWay: the file exists, or see ``keep_file_out_of_git``.
    """
    if out.exists():
        raise OutputInTheWay(f"{out} exists already.", remedy="Name another file: --out FILE")
    keep_file_out_of_git(out)


def write(matches: Sequence[Match], out: Path) -> int:
    """Write a row for each number, to be completed with the person and used as the mapping.

    Returns:
        The number of rows.

    Raises:
        OutputInTheWay: see ``prepare``; or it cannot be written.
    """
    prepare(out)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow((NUMBER, ISSUER, PERSON, "set", "why"))
    count = 0
    for number, (reasons, records) in enumerate(_joined(matches), start=1):
        why = "; ".join(REASONS[reason] for reason in reasons)
        count += len(records)
        rows.writerows((one.number, one.issuer, "", number, why) for one in records)
    write_atomic(out, text.getvalue().encode("utf-8", "replace"))
    return count


def _joined(matches: Sequence[Match]) -> Iterator[tuple[list[str], list[Record]]]:
    """Unite the matches that share a number, which has one row: why, and the numbers."""
    graph: dict[Record, list[int]] = defaultdict(list)
    for place, match in enumerate(matches):
        for record in match.records:
            graph[record].append(place)
    waiting = dict.fromkeys(range(len(matches)))
    while waiting:
        places = [next(iter(waiting))]
        reasons: set[str] = set()
        records: set[Record] = set()
        while places:
            place = places.pop()
            if place not in waiting:
                continue
            del waiting[place]
            reasons.update(matches[place].reasons)
            new = set(matches[place].records) - records
            records |= new
            places += (each for record in new for each in graph[record])
        yield sorted(reasons, key=list(REASONS).index), sorted(records)


def as_dict(site: Site, matches: Sequence[Match]) -> dict[str, object]:
    """Counts alone, for a script."""
    return {
        "site": site.name,
        "sets": len(matches),
        "patients": sum(one.patients for one in matches),
        "reasons": dict(Counter(reason for one in matches for reason in one.reasons)),
    }


def render(site: Site, matches: Sequence[Match]) -> str:
    """Counts alone, in words."""
    if not matches:
        return f"Site {site.name}: no undecided patient numbers."
    counts = Counter(reason for one in matches for reason in one.reasons)
    return "\n".join(
        [
            f"Site {site.name}: {counted(len(matches), 'set')} of patient numbers may be one "
            "person's each, undecided",
            *(f"  {counts[one]:>7}  {one:<11}  {REASONS[one]}" for one in REASONS if one in counts),
        ]
    )
