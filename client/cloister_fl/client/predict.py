"""Prediction: score or segment a folder of images with a finished model, where the images are.

The result is the user's own: scores, one row an image, named by its SOP Instance UID, or a volume,
named by its Series Instance UID; or segmentation masks, one PNG an image. Nothing is sent.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.patients.units import normalised
from cloister_fl.client.data.volumes import assemble
from cloister_fl.client.dicom.file_finder import discover
from cloister_fl.client.dicom.folder_reader import Accepted, Keys, Refused, read_folder, short_id
from cloister_fl.client.predictions.calls import Rule, rule_of
from cloister_fl.client.predictions.output import prepare, write_masks, write_scores
from cloister_fl.client.predictions.score_table import Layout, Scored, table_of
from cloister_fl.errors import Reject, SiteEmpty
from cloister_fl.model_file import OperatingPoint
from cloister_fl.study.schema import Input
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.libraries.imports import undisturbed_imports
from cloister_fl.system.libraries.logs import libraries_silenced
from cloister_fl.system.text import counted

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What was written.

    Attributes:
        images: how many images or volumes were scored or segmented.
        patients: of how many patients.
        rejects: how many files were rejected, by reason.
        out: the file or the folder.
        masks: whether it is a folder of segmentation masks.
        rejected: the reason for each rejected file, by its path within the folder. A path can
            name a patient.
        operating_point: the model's; None where none was chosen.
        threshold: the score from which patients were called; None with more than two classes, and
            where nobody was called.
        calls: how patients were called, in a sentence or two; empty where nobody was.
    """

    images: int
    patients: int
    rejects: Mapping[Reject, int]
    out: Path
    masks: bool
    rejected: Mapping[str, Reject] = field(default_factory=dict, repr=False)
    operating_point: OperatingPoint | None = None
    threshold: float | None = None
    calls: str = ""

    def as_dict(self) -> dict[str, object]:
        """The counts and the rule, ready for JSON; no path of an image and no patient."""
        point = self.operating_point
        return {
            "out": str(self.out),
            "kind": "masks" if self.masks else "scores",
            "images": self.images,
            "patients": self.patients,
            "rejected": sum(self.rejects.values()),
            "reasons": {reason.value: count for reason, count in self.rejects.items()},
            "threshold": self.threshold,
            "operating_point": point
            and {
                "class": point.positive,
                "threshold": point.threshold,
                "patients": point.patients,
            },
        }


@libraries_silenced()
def predict(
    model_path: StrPath,
    folder: StrPath,
    out: StrPath | None = None,
    *,
    device: str = "auto",
    patient_ids: bool = False,
    bom: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Write the scores of all usable images of a folder as CSV, or their masks, whole or not.

    The columns are ``SOPInstanceUID``, for volumes ``SeriesInstanceUID``; ``file``, the path within
    the folder, of a volume its first slice's; ``patient``, a pseudonym that holds within this file
    alone; those of the study's task, of a classification ``score_<class>``, probabilities that sum
    to 1; the same as ``patient_score_<class>``, the means over the patient's rows, which the
    figures of a run are measured on, but where the study labels examinations or images, whose own
    means they are measured on; and, of a classification, ``patient_call``: the class that
    the patient is called, at the operating point of the model where it has one, else at 0.5, of
    more than two classes the one with the highest mean. The rows are sorted by the first column.
    For a ROC curve, take one row of each patient, with ``PatientID`` (``patient_ids``), and give
    ``patient_score_<class>`` with the classes of ``labels.csv`` to scikit-learn's roc_curve; the
    area is the AUROC of ``metrics.measure``.
    Masks are PNG files ``<SOPInstanceUID>.png``, of the size that the image is stored with: 255
    where the model segments what its study asks for, else 0. Images are preprocessed as the study
    inside the model says.

    Args:
        model_path: a model that Cloister wrote.
        folder: the images, in any structure.
        out: the file to write, outside ``folder``. For segmentation masks, a folder that is not
            there. None for ``scores.csv`` or ``masks``.
        device: ``auto``, or what torch calls a device.
        patient_ids: whether the scores have a column ``PatientID``.
        bom: whether the scores begin with a byte order mark, by which Excel tells UTF-8.
        overwrite: whether a file of scores that is there is replaced.
        progress: called with (files done, files in all).

    Raises:
        FileUnreadable, ModelFileInvalid: the model cannot be used.
        ExtraMissing, WeightsUnfit: it needs pretrained weights that are missing.
        OptionInvalid: there is no such device, or an argument is not what is described here, or
            is about scores and the model gives masks.
        FolderUnreadable, SiteEmpty: there is nothing to score.
        OutputInTheWay: before an image is read: the output is there already, cannot be written or
            kept out of git, or would lie among the images.
    """
    model = arguments.path("model_path", model_path)
    folder = arguments.path("folder", folder)
    out = None if out is None else arguments.path("out", out)
    asked = {"patient_ids": patient_ids, "bom": bom, "overwrite": overwrite}
    for name, value in asked.items():
        arguments.flag(name, value)
    if progress is not None and not callable(progress):
        raise arguments.refused("progress", progress, "Give None or a function of two numbers.")
    with undisturbed_imports():
        from cloister_fl.client.training.evaluation import answers_for
        from cloister_fl.model_file import read_model, usable_device
        from cloister_fl.networks.frozen_backbone import FrozenBackbone

    trained = read_model(model, usable_device(device))
    module, study = trained.network, trained.study
    if isinstance(module, FrozenBackbone):
        module.require()
    # A task names the numbers that it answers with; one that answers with masks names none.
    masks = not study.task.columns
    for name in (one for one, value in asked.items() if masks and value):
        raise arguments.refused(name, True, "This model segments: it writes masks and no scores.")
    path = Path("masks" if masks else "scores.csv") if out is None else out
    prepare(path, folder, model, masks=masks, overwrite=overwrite)
    accepted, rejected, names = _read(folder, study.input, progress)
    rejects = Counter(rejected.values())
    if not accepted:
        raise SiteEmpty(
            "The folder has no image that this model can score.",
            why=f"The model reads {', '.join(study.input.modalities)}. Rejected: "
            f"{counted(len(rejected), 'file')}{_reasons(rejects)}.",
            remedy="Name a folder with images of these modalities.",
        )
    volumes = study.input.dimensions == 3
    images = [
        Scored(
            one.place.series if volumes else one.keys.sop_instance,
            names.get(one.short_id, b""),
            one.keys.issuer,
            one.keys.patient_id,
        )
        for one in accepted
    ]
    order = sorted(range(len(images)), key=lambda place: images[place].uid)
    accepted, images = [accepted[place] for place in order], [images[place] for place in order]
    # The same forward pass as in training's evaluation, so a score here is the score there.
    cohort = Cohort(
        images=np.stack([one.image.read() for one in accepted]),
        patients=(),
        rejects={},
        modalities={},
        shapes={},
    )
    answers = answers_for(module, cohort, study.task)
    rule: Rule | None = None
    if masks:
        write_masks(path, accepted, answers)
    else:
        rule = rule_of(study.task.called, trained.operating_point)
        uid = "SeriesInstanceUID" if volumes else "SOPInstanceUID"
        layout = Layout(uid, study.task.columns, rule, patient_ids, bom)
        write_scores(path, table_of(images, answers, layout), overwrite=overwrite)
    return Prediction(
        images=len(accepted),
        patients=len({_unit(one.keys) for one in accepted}),
        rejects=dict(sorted(rejects.items(), key=lambda item: item[0].value)),
        out=path,
        masks=masks,
        rejected={
            names.get(one, b"").decode("utf-8", "backslashreplace"): reason
            for one, reason in rejected.items()
        },
        operating_point=trained.operating_point,
        threshold=rule.threshold if rule else None,
        calls=rule.told if rule else "",
    )


def _read(
    folder: Path, spec: Input, progress: Callable[[int, int], None] | None
) -> tuple[list[Accepted], dict[str, Reject], dict[str, bytes]]:
    """Read a folder: images or volumes; why each other file is rejected, and all files' paths
    within the folder, both by short id."""
    key, names = _named([one.name for one in discover(folder)])
    accepted: list[Accepted] = []
    rejected: dict[str, Reject] = {}
    for outcome in read_folder(folder, spec, key=key, unit=_unit, progress=progress):
        if isinstance(outcome, Accepted):
            accepted.append(outcome)
        elif isinstance(outcome, Refused):
            rejected[outcome.short_id] = outcome.reason
    if spec.dimensions == 3:
        volumes, alone = assemble(accepted, spec, [_unit(one.keys) for one in accepted])
        rejected |= {accepted[place].short_id: reason for place, reason in alone.items()}
        accepted = [replace(accepted[one.slices[0]], image=one.image) for one in volumes]
    return accepted, rejected, names


def _named(paths: Sequence[bytes]) -> tuple[bytes, dict[str, bytes]]:
    """A key under which no two files share a short id, and the path of each."""
    while True:
        key = secrets.token_bytes(32)
        names = {short_id(key, path): path for path in paths}
        if len(names) == len(paths):
            return key, names


def _unit(keys: Keys) -> tuple[str, ...]:
    """A patient as a site compares them before its steward decided anything."""
    record = normalised(keys.issuer, keys.patient_id)
    return record.issuer, record.number


def _reasons(rejects: Counter[Reject]) -> str:
    told = (f"{count} {reason.value} ({reason.title})" for reason, count in rejects.most_common())
    return f": {', '.join(told)}" if rejects else ""
