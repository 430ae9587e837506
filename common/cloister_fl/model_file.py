"""The model file: trained weights and their study in one safetensors file.

The metadata carry the study in canonical form, so preprocessing, classes and network travel
with the weights, and a model is used as it was trained. No pickle is read or written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.errors import CloisterError, FileUnreadable, ModelFileInvalid
from cloister_fl.networks.flat_parameters import Vector
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.files import write_atomic
from cloister_fl.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["OperatingPoint", "TrainedModel", "load_model", "read_model"]

FORMAT = "cloister/model/v1"
OPERATING_POINT = "operating_point"
"""Key of the metadata: JSON of the fields of ``OperatingPoint``; it may be missing."""

_LONGEST_POINT = 4096
"""Most characters of it: a class has at most 128, each six or twelve as an escape."""
_MOST_PATIENTS = 10**9
_NOT_OURS = "Give the model.safetensors that a Cloister run wrote."


@dataclass(frozen=True)
class OperatingPoint:
    """The score from which a patient is called a class; of two classes only.

    Attributes:
        positive: the class, one of the study's two.
        threshold: a patient is called it at a mean score of ``threshold`` or more, 0 to 1.
        patients: how many patients of a hold-out it was chosen on.
    """

    positive: str
    threshold: float
    patients: int


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a model file holds.

    Attributes:
        network: in evaluation mode.
        study: what it was trained by.
        operating_point: None where none was chosen.
    """

    network: nn.Module
    study: Study
    operating_point: OperatingPoint | None = None


def save_model(
    path: Path,
    study: Study,
    vector: Vector,
    facts: dict[str, object],
    *,
    operating_point: OperatingPoint | None = None,
) -> None:
    """Write the model atomically.

    Args:
        path: the file, replaced as a whole.
        study: what it was trained by.
        vector: the flat model, (D,).
        facts: figures to keep beside it, such as epsilon; JSON values.
        operating_point: where the class is called, as ``predict`` will.
    """
    from safetensors.torch import save

    from cloister_fl.networks import flat_parameters
    from cloister_fl.study import study_network

    module = study_network.build_for(study)
    flat_parameters.load(module, vector)
    metadata = {
        "format": FORMAT,
        "study": study.canonical(),
        "study_hash": study.digest,
        "cloister": __version__,
        "facts": json.dumps(facts, sort_keys=True),
    }
    if operating_point is not None:
        metadata[OPERATING_POINT] = json.dumps(
            {
                "class": operating_point.positive,
                "threshold": operating_point.threshold,
                "patients": operating_point.patients,
            }
        )
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    write_atomic(path, _in_order(save(tensors), metadata), mode=0o644)


def _in_order(data: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with metadata, its header in one order: the library's own differs from
    process to process, and a study without privacy shall give the same bytes twice."""
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": metadata, **json.loads(data[8 : 8 + size])}
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_model(path: StrPath, device: str | torch.device = "cpu") -> tuple[nn.Module, Study]:
    """Read the network and the study of a model that a run wrote; see ``read_model``.

    Args:
        path: the file ``model.safetensors`` of a run.
        device: what torch calls a device, or ``auto``: a GPU where there is one.

    Returns:
        The network, in evaluation mode, and the study that it was trained by.

    Raises:
        FileUnreadable, ModelFileInvalid, OptionInvalid: see ``read_model``.
    """
    model = read_model(path, device)
    return model.network, model.study


def read_model(path: StrPath, device: str | torch.device = "cpu") -> TrainedModel:
    """Read a model that a run wrote, ready to predict.

    Args:
        path: the file ``model.safetensors`` of a run.
        device: what torch calls a device, or ``auto``: a GPU where there is one.

    Raises:
        FileUnreadable: there is no such file.
        ModelFileInvalid: it is no model of ours, its study is not the one that was trained, a
            weight is missing, of another shape or not finite, or its operating point is damaged.
        OptionInvalid: it is no path, or there is no such device.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from cloister_fl.study import study_network

    path = arguments.path("path", path)
    place = usable_device(device)
    if not _is_file(path):
        raise FileUnreadable(f"{path.name} cannot be read.", remedy=_NOT_OURS)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        raise ModelFileInvalid(
            f"{path.name} is not a safetensors file.", remedy=_NOT_OURS
        ) from None
    if metadata.get("format") != FORMAT:
        raise ModelFileInvalid(f"{path.name} carries no study.", remedy=_NOT_OURS)
    try:
        study = study_from_canonical(metadata.get("study", ""))
        module = study_network.build_for(study)
    except CloisterError:
        raise ModelFileInvalid(
            f"The study inside {path.name} is not valid in this version of Cloister.",
            remedy=_NOT_OURS,
        ) from None
    if metadata.get("study_hash") != study.digest:
        raise ModelFileInvalid(
            f"The study inside {path.name} is not the one that the model was trained by.",
            why="Its hash is another than the one that was written with it.",
            remedy=_NOT_OURS,
        )
    point = _operating_point(metadata.get(OPERATING_POINT), study, path.name)
    expected = module.state_dict()
    fits = set(expected) == set(tensors) and all(
        tensors[name].shape == value.shape and tensors[name].dtype == value.dtype
        for name, value in expected.items()
    )
    if not fits or not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ModelFileInvalid(
            f"The weights in {path.name} do not fit the network of its study.", remedy=_NOT_OURS
        )
    module.load_state_dict(tensors)
    return TrainedModel(module.to(place).eval(), study, point)


def _operating_point(text: str | None, study: Study, name: str) -> OperatingPoint | None:
    """Read the operating point of the metadata, which anybody may have written."""
    if text is None:
        return None
    point = _parsed_point(text) if len(text) <= _LONGEST_POINT else None
    classes = study.task.called
    if point is None or len(classes) != 2 or point.positive not in classes:
        raise ModelFileInvalid(
            f"The operating point in {name} is not valid.",
            why="It is a class of a study of two classes, a threshold from 0 to 1 and a number of "
            "patients.",
            remedy=_NOT_OURS,
        )
    return point


def _parsed_point(text: str) -> OperatingPoint | None:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        return None
    # A key that stands twice would be read one way here and another elsewhere.
    if sorted(key for key, _ in pairs) != ["class", "patients", "threshold"]:
        return None
    fields = dict(pairs)
    positive, threshold, patients = fields["class"], fields["threshold"], fields["patients"]
    # Truth is a whole number for Python, and NaN is in no range.
    if (
        not isinstance(positive, str)
        or type(threshold) not in (int, float)
        or type(patients) is not int
        or not 0 <= threshold <= 1
        or not 1 <= patients <= _MOST_PATIENTS
    ):
        return None
    return OperatingPoint(positive, float(threshold), patients)


def usable_device(name: str | torch.device) -> str:
    """Return what torch calls a device that this machine has.

    Args:
        name: ``auto`` for a GPU where there is one; or what torch calls a device.

    Raises:
        OptionInvalid: there is no such device, or it cannot hold a number.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back: the device "meta" takes all numbers and keeps none.
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):
        raise arguments.refused(
            "device",
            str(name) if isinstance(name, torch.device) else name,
            "Use auto, cpu, or cuda if there is a GPU (--device, device=).",
        ) from None
    return str(device)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False
