"""Score a folder of images with a finished model, on the machine where the images are.

The result is the user's own: one row an image, named by its SOP Instance UID, or a volume, named by
its Series Instance UID. Nothing is sent.
"""

from __future__ import annotations

import csv
import io
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloister_client.cohort import Cohort
from cloister_client.dicom.folder import Accepted, read_folder
from cloister_client.volumes import assemble
from cloister_common.errors import OptionInvalid, Reject, SiteEmpty
from cloister_common.files import write_atomic


@dataclass(frozen=True)
class Prediction:
    """How many images were scored, and how many files were turned away, by reason."""

    images: int
    rejects: Mapping[Reject, int]


def predict(
    model_path: Path,
    folder: Path,
    out_csv: Path,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Write the scores of all usable images of a folder as CSV, whole or not at all.

    The columns are ``SOPInstanceUID``, for volumes ``SeriesInstanceUID``, and ``score_<class>`` for
    each class of the model's study, probabilities that sum to 1; the rows are sorted by the first.
    Images are preprocessed as the study inside the model says.

    Args:
        model_path: a model that Cloister wrote.
        folder: the images, in any structure.
        out_csv: the file to write; one that is there is replaced.
        device: ``auto``, or what torch calls a device.
        progress: called with (files done, files in all).

    Raises:
        FileUnreadable, ModelFileInvalid: the model cannot be used.
        ExtraMissing, WeightsUnfit: it stands on pretrained weights that are not here.
        OptionInvalid: there is no such device.
        FolderUnreadable, SiteEmpty: there is nothing to score.
        OutputInTheWay: the scores cannot be written.
    """
    from cloister_client.evaluation import image_scores
    from cloister_common.frozen_backbone import FrozenBackbone
    from cloister_common.modelfile import load_model

    module, study = load_model(model_path, _device(device))
    if isinstance(module, FrozenBackbone):
        module.require()
    rejects: Counter[Reject] = Counter()
    accepted: list[Accepted] = []
    key = secrets.token_bytes(32)
    for outcome in read_folder(folder, study.input, key=key, progress=progress):
        if isinstance(outcome, Accepted):
            accepted.append(outcome)
        else:
            rejects[outcome.reason] += 1
    if study.input.dimensions == 3:
        volumes, alone = assemble(accepted, study.input)
        accepted = [replace(accepted[one.slices[0]], image=one.image) for one in volumes]
        rejects.update(alone.values())
    if not accepted:
        raise SiteEmpty(
            "The folder holds no image that this model can score.",
            why=f"It reads {', '.join(study.input.modalities)}; "
            f"{sum(rejects.values())} files were turned away.",
            remedy="Name a folder with images of these modalities.",
        )
    column, name = "SOPInstanceUID", _instance
    if study.input.dimensions == 3:
        column, name = "SeriesInstanceUID", _series
    accepted.sort(key=name)
    # The same forward pass as in training's evaluation, so a score here is the score there.
    scores = image_scores(
        module,
        Cohort(
            images=np.stack([one.image for one in accepted]),
            patients=(),
            rejects={},
            modalities={},
            shapes={},
        ),
    )
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([column, *(f"score_{name}" for name in study.target.classes)])
    for one, row in zip(accepted, scores, strict=True):
        writer.writerow([name(one), *(f"{score:.6f}" for score in row)])
    write_atomic(out_csv, text.getvalue().encode())
    return Prediction(len(accepted), dict(sorted(rejects.items(), key=lambda item: item[0].value)))


def _instance(one: Accepted) -> str:
    return one.keys.sop_instance


def _series(one: Accepted) -> str:
    return one.place.series


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OptionInvalid(
            f"There is no device {name!r} here.",
            remedy="Use auto, cpu, or cuda where there is one.",
        ) from None
    return name
