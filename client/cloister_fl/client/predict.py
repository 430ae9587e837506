"""Prediction: score or segment a folder of images with a finished model, where the images are.

The result is the user's own: scores, one row an image, named by its SOP Instance UID, or a volume,
named by its Series Instance UID; or segmentation masks, one PNG an image. Nothing is sent.
"""

from __future__ import annotations

import csv
import io
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.volumes import assemble
from cloister_fl.client.dicom.folder_reader import Accepted, Refused, read_folder
from cloister_fl.errors import OutputInTheWay, Reject, SiteEmpty
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.files import write_atomic
from cloister_fl.system.git_ignore import keep_file_out_of_git, keep_out_of_git
from cloister_fl.system.libraries.imports import undisturbed_imports
from cloister_fl.system.libraries.logs import libraries_silenced
from cloister_fl.system.text import counted

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What was written.

    Attributes:
        images: how many images were scored or segmented.
        rejects: how many files were rejected, by reason.
        out: the file or the folder.
        masks: whether it is a folder of segmentation masks.
    """

    images: int
    rejects: Mapping[Reject, int]
    out: Path
    masks: bool


@libraries_silenced()
def predict(
    model_path: StrPath,
    folder: StrPath,
    out: StrPath | None = None,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Write the scores of all usable images of a folder as CSV, or their masks, whole or not.

    The columns are ``SOPInstanceUID``, for volumes ``SeriesInstanceUID``, and those of the
    study's task: of a classification ``score_<class>``, probabilities that sum to 1. The rows are
    sorted by the first.
    A patient's score, which the figures of a run are measured on, is the mean over the rows of the
    patient's images; where the study labels examinations or images, that of each of these is.
    For a ROC curve, read ``PatientID`` and the UID of each file with
    ``pydicom.dcmread(file, stop_before_pixels=True)``, take the mean of ``score_<class>`` by
    ``PatientID``, and give it with the classes of ``labels.csv`` to scikit-learn's roc_curve;
    the area is the AUROC of ``metrics.measure``.
    Masks are PNG files ``<SOPInstanceUID>.png``, of the size that the image is stored with: 255
    where the model segments what its study asks for, else 0. Images are preprocessed as the study
    inside the model says.

    Args:
        model_path: a model that Cloister wrote.
        folder: the images, in any structure.
        out: the file to write; one that is there is replaced. For segmentation
            masks, a folder that is not there. None for ``scores.csv`` or ``masks``.
        device: ``auto``, or what torch calls a device.
        progress: called with (files done, files in all).

    Raises:
        FileUnreadable, ModelFileInvalid: the model cannot be used.
        ExtraMissing, WeightsUnfit: it needs pretrained weights that are missing.
        OptionInvalid: there is no such device, or an argument is not what is described here.
        FolderUnreadable, SiteEmpty: there is nothing to score.
        OutputInTheWay: the scores cannot be written or kept out of git, or the folder is not
            empty.
    """
    model = arguments.path("model_path", model_path)
    folder = arguments.path("folder", folder)
    out = None if out is None else arguments.path("out", out)
    if progress is not None and not callable(progress):
        raise arguments.refused("progress", progress, "Give None or a function of two numbers.")
    with undisturbed_imports():
        from cloister_fl.client.training.evaluation import answers_for
        from cloister_fl.model_file import load_model, usable_device
        from cloister_fl.networks.frozen_backbone import FrozenBackbone

    module, study = load_model(model, usable_device(device))
    if isinstance(module, FrozenBackbone):
        module.require()
    # A task names the numbers that it answers with; one that answers with masks names none.
    masks = not study.task.columns
    path = Path("masks" if masks else "scores.csv") if out is None else out
    if not masks:
        keep_file_out_of_git(path)
    rejects: Counter[Reject] = Counter()
    accepted: list[Accepted] = []
    key = secrets.token_bytes(32)
    for outcome in read_folder(folder, study.input, key=key, progress=progress):
        if isinstance(outcome, Accepted):
            accepted.append(outcome)
        elif isinstance(outcome, Refused):
            rejects[outcome.reason] += 1
    if study.input.dimensions == 3:
        volumes, alone = assemble(accepted, study.input)
        accepted = [replace(accepted[one.slices[0]], image=one.image) for one in volumes]
        rejects.update(alone.values())
    if not accepted:
        raise SiteEmpty(
            "The folder has no image that this model can score.",
            why=f"The model reads {', '.join(study.input.modalities)}. Rejected: "
            f"{counted(sum(rejects.values()), 'file')}.",
            remedy="Name a folder with images of these modalities.",
        )
    column, name = "SOPInstanceUID", _instance
    if study.input.dimensions == 3:
        column, name = "SeriesInstanceUID", _series
    accepted.sort(key=name)
    told = dict(sorted(rejects.items(), key=lambda item: item[0].value))
    # The same forward pass as in training's evaluation, so a score here is the score there.
    images = Cohort(
        images=np.stack([one.image for one in accepted]),
        patients=(),
        rejects={},
        modalities={},
        shapes={},
    )
    answers = answers_for(module, images, study.task)
    if masks:
        _write_masks(path, accepted, answers)
        return Prediction(len(accepted), told, path, True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([column, *study.task.columns])
    for one, row in zip(accepted, answers, strict=True):
        writer.writerow([name(one), *(f"{score:.6f}" for score in row)])
    write_atomic(path, text.getvalue().encode())
    return Prediction(len(accepted), told, path, False)


def _write_masks(folder: Path, accepted: Sequence[Accepted], shown: NDArray[np.bool_]) -> None:
    """Write the segmentation masks into a new folder, which appears when it is complete."""
    from PIL import Image

    taken = OutputInTheWay(f"{folder} is not empty.", remedy="Name another folder (--out, out=).")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise taken
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    except OSError as error:
        raise OutputInTheWay(
            f"{folder} cannot be written.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a folder that you may write to.",
        ) from None
    try:
        keep_out_of_git(building)
        written: Counter[str] = Counter()
        for one, mask in zip(accepted, shown, strict=True):
            # Two patients may have an image each under one UID.
            written[name := _instance(one)] += 1
            name += f"-{written[name]}" if written[name] > 1 else ""
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            size = (one.facts.columns, one.facts.rows)
            file = io.BytesIO()
            image.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
            write_atomic(building / f"{name}.png", file.getvalue())
        building.replace(folder)
    except OSError:
        raise taken from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _instance(one: Accepted) -> str:
    return one.keys.sop_instance


def _series(one: Accepted) -> str:
    return one.place.series
