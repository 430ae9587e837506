"""Data report for the steward: counts, images, and possible duplicate patients.

The report stays on the site. It names no patient: people stand by their pseudonym within the
study. Two checks look for patients who are in a cohort twice, where a split by patient would put
them on both sides and one patient's privacy would be spent as two: the same pixels under two
patient identifiers, and one person (name and date of birth) under two.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.data.reading import Reading
from cloister_fl.client.data.targets import UNLABELLED
from cloister_fl.client.dicom.facts import AGE_BANDS
from cloister_fl.client.site.folder import Site
from cloister_fl.client.steward.contact_sheet import contact_sheet
from cloister_fl.errors import DataError, Reject
from cloister_fl.study.schema import Study
from cloister_fl.system.files import make_private_dir, write_atomic
from cloister_fl.system.git_ignore import keep_file_out_of_git, keep_out_of_git
from cloister_fl.tasks import Task

HTML, JSON = "data-report.html", "data-report.json"
_SHOWN = 50
_WORD = 64
_UNTOLD = "not told"
"""A key of the JSON; see ``_WORDS``."""
_WORDS = {
    _UNTOLD: "not stated",
    "Images a patient": "Images per patient",
    "Class, patients": "Patients per class",
}
"""How the page shows keys of the JSON."""

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """Counts of a site's data.

    Attributes:
        site, study: their names; no study where none was given.
        files, images, patients: how many.
        tables: counts by a heading: modality, maker, sex, age band, year, size, class, images a
            patient.
        rejects: files that were turned away, by reason.
        held: how many of them are quarantined.
        same_pixels: pseudonyms of patients who share an image's pixels, each group once.
        same_person: pseudonyms of patients who have one name and date of birth.
        undecided: how many sets of patient numbers may be one person's, and were not decided.
        faults: what keeps the data from being used.
        cohort: the images, or None.
        task: of the study, or None.
    """

    site: str
    study: str | None
    files: int
    images: int
    patients: int
    tables: Mapping[str, Counts]
    rejects: Mapping[Reject, int]
    held: int
    same_pixels: tuple[tuple[str, ...], ...]
    same_person: tuple[tuple[str, ...], ...]
    faults: tuple[DataError, ...]
    undecided: int = 0
    cohort: Cohort | None = field(default=None, repr=False, compare=False)
    task: Task | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, object]:
        """What JSON can say."""
        return {
            "site": self.site,
            "study": self.study,
            "files": self.files,
            "images": self.images,
            "patients": self.patients,
            "tables": {title: dict(counts) for title, counts in self.tables.items()},
            "rejects": [
                {"code": one.value, "reason": one.title, "count": count, "held": one.held}
                for one, count in self.rejects.items()
            ],
            "held": self.held,
            "same_pixels_of_several_patients": [list(group) for group in self.same_pixels],
            "one_person_under_several_ids": [list(group) for group in self.same_person],
            "patient_numbers_undecided": self.undecided,
            "faults": [{"code": one.code, "message": str(one)} for one in self.faults],
        }


def survey(
    site: Site, study: Study | None, *, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Read a site's data and count.

    Args:
        site: the opened site.
        study: whose images and labels are looked at; without one, every modality and no labels.
        progress: called with (files done, files in all).

    Raises:
        FolderUnreadable, DecoderUnfit, FileUnreadable: nothing can be read.
        PatientsFileInvalid: the steward's mapping cannot be used.
    """
    reading = read_cohort(
        site, study or any_study(), progress=progress, require_labels=study is not None
    )
    return count(site.name, study, reading)


def count(site: str, study: Study | None, reading: Reading) -> Report:
    """Count what was read; pure."""
    facts = [one for one, _ in reading.facts]
    each = Counter(name for _, name in reading.facts)
    patients = () if reading.cohort is None else reading.cohort.patients
    labels = Counter(
        unit.label for one in patients for unit in one.units if unit.label != UNLABELLED
    )
    ages = Counter(one.age_band for one in facts)
    tables = {
        "Modality": _counted(one.modality for one in facts),
        "Maker": _counted(one.manufacturer[:_WORD] or _UNTOLD for one in facts),
        "Sex": _counted(one.sex or _UNTOLD for one in facts),
        "Age": {band or _UNTOLD: ages[band] for band in (*AGE_BANDS, "") if ages[band]},
        "Year": _in_order(one.year or _UNTOLD for one in facts),
        "Size": _counted(f"{one.rows} x {one.columns}" for one in facts),
        "Images a patient": _in_order(str(images) for images in each.values()),
    }
    if study is not None and labels:
        tables[f"Class, {study.task.unit}s"] = {
            name: labels[index] for index, name in enumerate(study.task.strata)
        }
    return Report(
        site=site,
        study=None if study is None else study.study.name,
        files=reading.files,
        images=len(facts),
        patients=len(each),
        tables=tables,
        rejects=reading.rejects,
        held=sum(number for reason, number in reading.rejects.items() if reason.held),
        same_pixels=_shared((one.pixels, name) for one, name in reading.facts),
        same_person=_shared((one.person, name) for one, name in reading.facts if one.person),
        faults=reading.faults,
        undecided=len(reading.matches),
        cohort=reading.cohort,
        task=None if study is None else study.task,
    )


def prepare(folder: Path) -> None:
    """Make the report's folder, and keep what it will hold out of any git repository.

    A folder that holds nothing else is covered whole; another one is a person's own, of which the
    report's files alone are covered. Can be repeated.

    Raises:
        OutputInTheWay: it cannot be made, or see ``keep_file_out_of_git``.
    """
    if not folder.is_dir():
        make_private_dir(folder)
    with suppress(PermissionError):  # one that may be written to, but not listed
        if {path.name for path in folder.iterdir()} <= {HTML, JSON}:
            keep_out_of_git(folder)
    for name in (HTML, JSON):
        keep_file_out_of_git(folder / name)


def write(report: Report, folder: Path) -> None:
    """Write the report as HTML and JSON, for their owner alone.

    Raises:
        OutputInTheWay: it cannot be written; see ``prepare``.
    """
    prepare(folder)
    write_atomic(folder / JSON, (json.dumps(report.as_dict(), indent=2) + "\n").encode())
    write_atomic(folder / HTML, page(report).encode("utf-8", "replace"))


def page(report: Report) -> str:
    """The report as one page that loads nothing from anywhere."""
    title = f"Data of {report.site}" + (f" for {report.study}" if report.study else "")
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p class=note>This page shows patients' images. It stays at the site.</p>",
        f"<p>{report.files} files, {report.images} images of {report.patients} patients; "
        f"{sum(report.rejects.values())} files rejected, {report.held} of them quarantined for "
        "review.</p>",
    ]
    parts += [f"<p class=fault>{escape(str(one))}</p>" for one in report.faults]
    parts.append("<h2>Possible duplicate patients</h2>")
    parts.append(
        _groups(
            report.same_pixels,
            "The same pixels under several patient identifiers",
            "No two patients share an image.",
        )
    )
    parts.append(
        _groups(
            report.same_person,
            "One name and date of birth under several patient identifiers",
            "No person has two patient identifiers, according to the files.",
        )
    )
    if report.undecided:
        parts.append(
            "<p class=fault>Sets of patient numbers, or of names and birth dates, that the steward "
            f"has not decided: {report.undecided}. List them: cloister client patients --out FILE"
            "</p>"
        )
    parts.append("<h2>Counts</h2><div class=tables>")
    parts += [_table(title, counts) for title, counts in report.tables.items()]
    turned = {f"{one.value} {one.title}": number for one, number in report.rejects.items()}
    parts.append(_table("Rejected", turned) + "</div>")
    if report.cohort is not None:
        shown, png = contact_sheet(report.cohort, report.task)
        image = base64.b64encode(png).decode()
        parts.append(
            f"<h2>Preprocessed images</h2><p>One image of each of {shown} patients.</p>"
            f'<img alt="contact sheet" src="data:image/png;base64,{image}">'
        )
    return _PAGE.replace("TITLE", escape(title)).replace("BODY", "\n".join(parts))


def any_study() -> Study:
    return Study.model_validate(
        {
            "study": {"name": "any", "question": "any"},
            "input": {"modalities": ["CR", "DX", "MG", "CT", "MR", "US"], "size": 128},
            "target": {"column": "any", "classes": ("no", "yes")},
        }
    )


def _counted(words: Iterable[str]) -> Counts:
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))


def _in_order(numbers: Iterable[str]) -> Counts:
    """Counts of numbers, which are looked for by their order; what is none comes last."""
    return dict(
        sorted(
            Counter(numbers).items(),
            key=lambda item: (not item[0].isdecimal(), len(item[0]), item[0]),
        )
    )


def _shared(pairs: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], ...]:
    """Groups of names that share what stands before them."""
    names: dict[Hashable, set[str]] = defaultdict(set)
    for key, name in pairs:
        names[key].add(name)
    return tuple(sorted({tuple(sorted(group)) for group in names.values() if len(group) > 1}))


def _groups(groups: tuple[tuple[str, ...], ...], what: str, none: str) -> str:
    if not groups:
        return f"<p>{none}</p>"
    rows = "".join(
        f"<li>{', '.join(name[:12] for name in group)}</li>" for group in groups[:_SHOWN]
    )
    more = f"<li>and {len(groups) - _SHOWN} more</li>" if len(groups) > _SHOWN else ""
    return f"<p class=fault>{what}: {len(groups)}</p><ul>{rows}{more}</ul>"


def _table(title: str, counts: Counts) -> str:
    if not counts:
        return ""
    most = max(counts.values()) or 1
    rows = "".join(
        f"<tr><td>{escape(_WORDS.get(word, word))}</td><td class=n>{number}</td>"
        f'<td class=bar><div style="width:{100 * number / most:.1f}%"></div></td></tr>'
        for word, number in list(counts.items())[:_SHOWN]
    )
    rest = sum(list(counts.values())[_SHOWN:])
    rows += f"<tr><td>others</td><td class=n>{rest}</td><td></td></tr>" if rest else ""
    return f"<table><caption>{escape(_WORDS.get(title, title))}</caption>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
 color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.note { color: #5a6472; } .fault { border-left: 4px solid #b3261e; padding-left: .7rem; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.5rem; }
table { border-collapse: collapse; width: 100%; align-self: start; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
td { border-top: 1px solid #d9dee5; padding: .15rem .5rem .15rem 0; vertical-align: middle; }
.n { text-align: right; font-variant-numeric: tabular-nums; width: 5rem; }
.bar { width: 8rem; } .bar div { background: #3d6ea8; height: .7rem; min-width: 1px; }
img { max-width: 100%; background: #000; }
</style></head><body>
BODY
</body></html>
"""
