"""Data checks before a study: counts of a site's data, and everything wrong with them.

The report speaks in counts. It names no patient, file or path, so that it can be shown to
whoever helps to mend the data; pseudonyms in it are cut short and hold for one study only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister_fl.client.admission import gate
from cloister_fl.client.data import frozen_dataset
from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.client.data.loading import read_cohort, read_for_check
from cloister_fl.client.data.patients import other_ledgers
from cloister_fl.client.data.patients.mapping import mapping_of
from cloister_fl.client.data.patients.possible_matches import undecided_error
from cloister_fl.client.data.reading import Reading, fault_as_dict
from cloister_fl.client.data.tables.csv_file import lines as lines_of
from cloister_fl.client.data.targets import UNLABELLED, faults_alone
from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.client.site.policy import bound_missing, refusals
from cloister_fl.client.steward.budget import line, study_promised
from cloister_fl.errors import (
    CloisterError,
    DataError,
    DecoderUnfit,
    FolderUnreadable,
    Reject,
)
from cloister_fl.study.cost import UNITS
from cloister_fl.study.schema import About, Input, Study
from cloister_fl.system.text import counted
from cloister_fl.tasks.classification import ClassificationTarget

_SIZES_SHOWN = 6
_ANY_STUDY = Study(
    study=About(name="check", question="What is there?"),
    input=Input(modalities=("CR", "DX", "MG", "CT", "MR", "US")),
    target=ClassificationTarget(column="none", classes=("none", "other")),
)


@dataclass(frozen=True)
class DataReport:
    """What ``inspect`` found.

    Attributes:
        site: the site's name.
        study: the study's name, or None where the data were looked at without one.
        files: files found, DICOMDIR files and links within the folder left out.
        accepted: images that can be used.
        patients: patients with such an image.
        images_per_patient: how many patients have so many images.
        labels: patients by class, or what else has a label of its own; empty without a study or
            without usable labels.
        unit: what has a label of its own, see ``Task.unit``.
        modalities: images by modality.
        sizes: images by stored (rows, columns).
        rejects: files turned away, by reason.
        faults: all that keeps the site from taking part, in the order in which to mend it.
        policy: why the site's policy or budget does not allow the study, in words.
        promised_study: epsilon that all runs of the study have reserved or spent here.
        promised: epsilon that all studies together have reserved or spent here.
        lifetime: the most that they may.
        reading: all that was read, or None; nothing of it is in an output but the contact sheet.
        volumes: whether an image is a volume of slices.
        faded: how many images have something marked of which nothing is left at the study's size.
        unused: lines of the patients file whose number no image has.
        remarks: what a steward should know, and nothing is wrong with.
    """

    site: str
    study: str | None
    files: int
    accepted: int
    patients: int
    images_per_patient: Mapping[int, int]
    labels: Mapping[str, int]
    modalities: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    rejects: Mapping[Reject, int]
    faults: tuple[CloisterError, ...]
    policy: tuple[str, ...]
    promised_study: float = 0.0
    promised: float = 0.0
    lifetime: float = 0.0
    reading: Reading | None = field(default=None, repr=False, compare=False)
    volumes: bool = False
    faded: int = 0
    unused: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    unit: str = "patient"

    @property
    def cohort(self) -> Cohort | None:
        """The images, or None."""
        return self.reading.cohort if self.reading is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can say: counts, words and ids, no image."""
        return {
            "site": self.site,
            "study": self.study,
            "usable": not self.faults,
            "would_take_part": not self.faults and not self.policy,
            "epsilon_study": None if self.study is None else self.promised_study,
            "epsilon_promised": self.promised,
            "epsilon_lifetime": self.lifetime,
            "files": self.files,
            "accepted": self.accepted,
            "patients": self.patients,
            "images_per_patient": {str(k): v for k, v in self.images_per_patient.items()},
            "labels": dict(self.labels),
            "unit": self.unit,
            "modalities": dict(self.modalities),
            "marked_too_small": self.faded,
            "patients_file_lines_without_image": list(self.unused),
            "remarks": list(self.remarks),
            "sizes": {f"{rows}x{columns}": n for (rows, columns), n in self.sizes.items()},
            "rejects": [
                {"code": reason.value, "reason": reason.title, "count": count}
                for reason, count in self.rejects.items()
            ],
            "faults": [fault_as_dict(fault) for fault in self.faults],
            "left_out": [
                fault_as_dict(fault)
                for fault in (() if self.reading is None else self.reading.left_out)
            ],
            "policy": list(self.policy),
        }


def inspect(
    site: Site, study: Study | None, *, progress: Callable[[int, int], None] | None = None
) -> DataReport:
    """Read a site's data as a run would, and report instead of raising at the first fault.

    Where the study's data are frozen, what is no longer as it was is a fault.

    Args:
        site: the opened site.
        study: the study to judge by; without one, every modality is read and labels are not.
        progress: called with (files done, files in all).
    """
    faults: list[CloisterError] = []
    reading: Reading | None = None
    # With a study, its refusals tell.
    undeclared = bound_missing(site.policy) if study is None else ""
    remarks = [undeclared] if undeclared else []
    try:
        if study is None:
            reading = read_cohort(site, _ANY_STUDY, progress=progress, require_labels=False)
        else:
            reading = read_for_check(site, study, progress=progress)
        # First who is whom: labels and classes are of patients.
        undecided = undecided_error(site, reading.matches)
        faults += [*([undecided] if undecided else []), *reading.faults]
        remarks += [f"Left out, as site.toml says: {one}" for one in reading.left_out]
        looked = other_ledgers.look(site, reading.traits)
        faults += [looked.error] if looked.error else []
        remarks += [looked.remark] if looked.remark else []
        remarks += _frozen_otherwise(site, study)
    except DataError as error:
        # Nothing could be read, or the study's manifest is not the one that was signed.
        faults.append(error)
        if study is not None and isinstance(error, FolderUnreadable | DecoderUnfit):
            faults += faults_alone(site, study.task)
    cohort = reading.cohort if reading is not None else None
    patients = cohort.patients if cohort is not None else ()
    labels = Counter(
        unit.label for patient in patients for unit in patient.units if unit.label != UNLABELLED
    )
    # How many sites are invited is the coordinator's to say; the check does not judge it.
    allowed = () if study is None else _refusals(site, study)
    return DataReport(
        site=site.name,
        study=study.study.name if study is not None else None,
        files=reading.files if reading is not None else 0,
        accepted=len(cohort.images) if cohort is not None else 0,
        patients=len(patients),
        images_per_patient=dict(sorted(Counter(len(one.images) for one in patients).items())),
        labels={}
        if study is None or not labels
        else {name: labels[index] for index, name in enumerate(study.task.strata)},
        modalities=cohort.modalities if cohort is not None else {},
        sizes=cohort.shapes if cohort is not None else {},
        rejects=reading.rejects if reading is not None else {},
        faults=tuple(faults),
        policy=allowed,
        promised_study=0.0 if study is None else study_promised(site, study),
        promised=gate.promised(site),
        lifetime=site.policy.max_epsilon_lifetime,
        reading=reading,
        volumes=study is not None and study.input.dimensions == 3,
        faded=reading.faded if reading is not None else 0,
        unused=reading.unused if reading is not None else (),
        remarks=(*remarks, *_uncounted(study, patients)),
        unit="patient" if study is None else study.task.unit,
    )


def _uncounted(study: Study | None, patients: Sequence[Patient]) -> list[str]:
    """Say who adds nothing to a count of what the site's patients score."""
    many = sum(len(patient.units) > UNITS for patient in patients)
    counts = study is not None and (study.releases or not study.privacy.enabled)
    if study is None or not counts or not many:
        return []
    return [
        f"{counted(many, 'patient has', 'patients have')} more than {UNITS} {study.task.unit}s, "
        "and would add nothing where the site's own patients are measured."
    ]


def _frozen_otherwise(site: Site, study: Study | None) -> list[str]:
    """Say where a frozen study goes on with other decisions on patients than the present ones."""
    if study is None:
        return []
    # What is wrong with a manifest is told where it is used.
    with suppress(DataError):
        frozen = frozen_dataset.load(site, study)
        if frozen is not None and frozen.patients.digest != mapping_of(site).decisions.digest:
            return [
                "The study is frozen with other decisions on patients ([data.patients]) and goes "
                "on with those. To use the present ones: "
                + site.command("freeze STUDY --again --why '...'")
            ]
    return []


def _refusals(site: Site, study: Study) -> tuple[str, ...]:
    told = refusals(site.policy, study, site.policy.min_sites)
    if told:
        return told
    short = gate.shortfall(site, study)
    return () if short is None else (f"{short.what} {short.why}",)


def render(report: DataReport, root: Path | None = None) -> str:
    """Return the report on the site at ``root`` as text for a terminal."""
    lines = [f"Site {report.site}" + (f", study {report.study}" if report.study else "")]
    lines.append(f"  files       {report.files}")
    word = "volumes" if report.volumes else "images"
    lines.append(f"  {word:<10}  {report.accepted}{_brackets(report.modalities)}")
    lines.append(f"  patients    {report.patients}")
    if report.images_per_patient:
        told = ", ".join(
            f"{counted(patients, 'patient')} with {counted(images, word[:-1])}"
            for images, patients in report.images_per_patient.items()
        )
        lines.append(f"  each        {told}")
    if report.sizes:
        lines.append(f"  sizes       {_sizes(report.sizes)}")
    if report.labels:
        told = ", ".join(f"{name} {count}" for name, count in report.labels.items())
        lines.append(f"  labels      {told} ({report.unit}s)")
    if report.faded:
        lines.append(
            f"  too small   the segmentation mask of {counted(report.faded, 'image')}: empty at "
            "the study's size"
        )
    if report.unused:
        lines.append(
            f"  no image    for the number of {lines_of(report.unused).lower()} of the patients "
            "file; is it misspelt?"
        )
    if report.rejects:
        lines.append("  rejected")
        lines += [
            f"    {count:>7}  {reason.value}  {reason.title}"
            for reason, count in report.rejects.items()
        ]
        lines.append(f"    Which files: {command_at(root, 'find CODE')}")
    study = None if report.study is None else report.promised_study
    lines.append(f"  budget      promised so far, {line(study, report.promised, report.lifetime)}")
    if report.study is None:
        lines.append("Labels were not checked: name a study with --study STUDY.")
    lines += [f"This site would refuse the study: {sentence}" for sentence in report.policy]
    lines += [str(fault) for fault in report.faults]
    lines += report.remarks
    quarantined = sum(count for reason, count in report.rejects.items() if reason.held)
    if quarantined:
        lines.append(f"Quarantined: {quarantined}. Review them: {command_at(root, 'quarantine')}")
    if report.faults:
        lines.append("The data cannot be used as they are.")
    elif report.policy:
        lines.append("The data can be used, but the site would not take part in this study.")
    else:
        lines.append("The data can be used.")
    return "\n".join(lines)


def _brackets(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    return " (" + ", ".join(f"{name} {count}" for name, count in counts.items()) + ")"


def _sizes(sizes: Mapping[tuple[int, int], int]) -> str:
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{rows} x {columns} ({count})" for (rows, columns), count in ordered[:_SIZES_SHOWN]]
    rest = sum(count for _, count in ordered[_SIZES_SHOWN:])
    return ", ".join(told) + (f", others ({rest})" if rest else "")
