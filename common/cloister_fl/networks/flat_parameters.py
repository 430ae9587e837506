"""A model's trainable state as one flat vector, and back.

What leaves a site is a vector of float32 whose order is fixed by the network alone: the trainable
parameters in the order of ``named_parameters``. There is nothing else to carry: a module with
buffers is refused, because buffers hold statistics of the data outside the noised gradient.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.errors import NetworkUnfit, UpdateInvalid

if TYPE_CHECKING:
    from torch import nn

Vector: TypeAlias = NDArray[np.float32]

_LABEL = b"cloister/layout/v1\0"
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's trainable parameters, in the order of the vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 over names and shapes, 64 hexadecimal digits: both sides compare it."""
        form = canonical_json([self.names, self.shapes])
        return hashlib.sha256(_LABEL + form.encode()).hexdigest()


def layout_of(module: nn.Module) -> Layout:
    """Return the layout of a module's trainable parameters.

    Raises:
        NetworkUnfit: the module has buffers, or parameters that are not float32.
    """
    import torch

    for name, _ in module.named_buffers():
        raise NetworkUnfit(
            f"The network has a buffer, '{name}', that no vector carries.",
            remedy="Use layers without buffers.",
        )
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise NetworkUnfit(f"The parameter '{name}' is not of type float32.")
        names.append(name)
        shapes.append(tuple(parameter.shape))
    return Layout(tuple(names), tuple(shapes))


def form_of(module: nn.Module) -> tuple[object, ...]:
    """What two modules must share to compute the same but for their weights; hashable.

    The text of a module leaves out what its class does not put there, such as a flag. A function
    is held, not named: another one could come to lie where it was.
    """
    form: list[object] = []
    for name, layer in module.named_modules():
        form += (name, type(layer), repr(layer))
        for key, value in sorted(vars(layer).items()):
            if isinstance(value, _PLAIN):
                form += (key, repr(value))
            elif callable(value):
                form += (key, value)
    for name, weight in module.named_parameters():
        form += (name, tuple(weight.shape), weight.dtype, weight.requires_grad)
    return tuple(form)


def flatten(module: nn.Module) -> Vector:
    """Copy the trainable parameters into one vector of shape (``layout_of(module).size``,).

    Raises:
        NetworkUnfit: as ``layout_of``.
        UpdateInvalid: a weight is not finite.
    """
    import torch

    size = layout_of(module).size
    with torch.no_grad():
        parts = [p.detach().reshape(-1) for p in module.parameters() if p.requires_grad]
        vector: Vector = torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.float32)
    check(vector, size)
    return vector


def load(module: nn.Module, vector: Vector) -> None:
    """Overwrite the trainable parameters from a vector; nothing is changed where it raises.

    Raises:
        NetworkUnfit: as ``layout_of``.
        UpdateInvalid: the vector has another type or length, or is not finite.
    """
    import torch

    check(vector, layout_of(module).size)
    # A copy, so that the module never shares memory with what the caller holds.
    flat = torch.from_numpy(np.array(vector, dtype=np.float32, copy=True))
    position = 0
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                part = flat[position : position + parameter.numel()]
                parameter.copy_(part.view_as(parameter))
                position += parameter.numel()


def check(vector: Vector, size: int) -> None:
    """Refuse what is not a finite float32 vector of ``size`` values.

    Raises:
        UpdateInvalid: naming what is wrong, never a value.
    """
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.ndim != 1:
        raise UpdateInvalid("The vector is not one-dimensional float32.")
    if len(vector) != size:
        raise UpdateInvalid(
            f"The vector has {len(vector)} values; the network has {size}.",
            why="It belongs to another network or to another study.",
        )
    if not np.isfinite(vector).all():
        raise UpdateInvalid("The vector holds values that are not finite.")
