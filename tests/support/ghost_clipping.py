"""A gradient engine that broke the bound, kept as a specimen: a search must find it.

Clipped sums of patients' gradients from one backward pass over many patients (Bu et al. 2023), as
Cloister once offered them under the name ``book-keeping``. A layer's norm is either that of the
patient's gradient, which is computed and kept, or a ghost norm: inner products of inputs and of
output gradients between the places of a patient's images (Goodfellow 2015; Li et al. 2022). Its
three faults, each a decision about one patient that others take part in:

- ``by_largest``: whether a layer is kept or taken as a ghost follows the most images that a patient
  of the pass has. Only ghosts bound the terms that cancel, so a patient of many images changes how
  the others are clipped.
- ``beyond``: patients after the 512th of a step are taken one by one, to the gradient's own norm.
- ``tried_once``: whether the books agree with the loop is tried with the first weights that a
  process sees, and holds for all that come later.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloister_fl.client.training.exact_sum import GRID_BITS
from cloister_fl.client.training.sampling import (
    Bag,
    Cohort,
    FeatureCohort,
    chunks,
    pixels_of,
    targets_of,
)
from cloister_fl.tasks import Task

ETA = 2.0**-5
"""Excess of the sensitivity over the norm that patients are clipped to."""

GROUP = 16
"""Patients whose gradients are summed in float32 before they go to the grid."""

MOST = 512
"""Most patients of a step that the account of ``ETA`` covers."""

_PLACES = 128
_THIN = 64
"""Most weights of an output for which a convolution's gradient is a product of matrices."""

_GHOSTS = 4
"""Patients whose inner products are worked out at a time: they stay in the processor's cache."""
_CANCELLING = 16.0


@dataclass(frozen=True)
class _Seen:
    """A layer in one pass: its input and the gradient of the loss by its output."""

    layer: nn.Module
    given: Tensor
    answer: Tensor


def supported(module: nn.Module) -> bool:
    """Whether there is a rule for every layer that holds weights to be trained."""
    for layer in module.modules():
        own = [weight for weight in layer.parameters(recurse=False) if weight.requires_grad]
        if not own:
            continue
        if not all(weight.requires_grad for weight in layer.parameters(recurse=False)):
            return False
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                return False
        elif type(layer) not in {nn.Linear, nn.GroupNorm}:
            return False
    return True


class UnfitPass(Exception):
    """The network did in a pass what no rule covers; the caller goes from patient to patient."""


def clipped_groups(
    module: nn.Module,
    task: Task,
    pixels: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    norm: float,
) -> Iterator[list[Tensor]]:
    """Yield sums of gradients, each patient's clipped to ``norm``, group by group.

    A patient's gradient is that of the mean loss over its images. A patient whose
    gradient is not finite counts as zero.

    Args:
        module: a network that ``supported`` accepts.
        task: gives the losses.
        pixels: float32 (images, channels, S, S) or (images, channels, D, S, S), patient after
            patient.
        targets: of each image; see ``Task.losses``.
        sizes: images of each patient, at least 1.
        norm: C', above 0.

    Yields:
        One float32 tensor for each trained parameter, in its shape and their order.

    Raises:
        UnfitPass: a layer ran more than once, or on an input that no rule covers.
    """
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    seen = _backward(module, task, pixels, targets, sizes, owner)
    squares = torch.zeros(len(sizes), dtype=torch.float64)
    masses = torch.zeros(len(sizes), dtype=torch.float64)
    kept: dict[nn.Parameter, Tensor] = {}
    second: list[_Seen] = []
    for each in seen:
        kept.update(_small(each, owner, len(sizes)))
        if not isinstance(each.layer, nn.GroupNorm):
            if _by_ghost(each, max(sizes)):
                square, mass = _ghost(each, sizes)
                squares += square
                masses += mass.square()
                second.append(each)
            else:
                kept[_weight(each.layer)] = _unit_weights(each, sizes)
    for rows in kept.values():
        square = squares_at_most(rows.flatten(1))
        squares += square
        masses += square
    squares += masses * 2.0**-40
    alive = torch.isfinite(squares) & torch.isfinite(masses)
    # Smaller numbers are scaled as this one is; it keeps the division defined.
    tiny = torch.finfo(torch.float64).tiny
    factors = (norm / squares.sqrt().clamp_min(tiny)).clamp_max(1.0)
    factors = torch.minimum(factors, _CANCELLING * norm / masses.sqrt().clamp_min(tiny))
    weights = torch.where(alive, factors, 0.0).to(pixels.dtype)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    for start in range(0, len(sizes), GROUP):
        units = slice(start, start + GROUP)
        sums = {p: _weighted(rows[units], weights[units], alive[units]) for p, rows in kept.items()}
        images = slice(sum(sizes[:start]), sum(sizes[: start + GROUP]))
        for each in second:
            sums[_weight(each.layer)] = _second(each, images, weights[owner], alive[owner])
        yield [sums[weight] for weight in trained]


def _backward(
    module: nn.Module,
    task: Task,
    pixels: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    owner: Tensor,
) -> list[_Seen]:
    layers: list[nn.Module] = []
    given: list[Tensor] = []
    outputs: list[Tensor] = []

    me = threading.get_ident()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() != me:
            # Another thread's patients go through the same network at the same time.
            return
        if len(inputs) != 1 or (isinstance(layer, nn.Linear) and inputs[0].ndim != 2):
            raise UnfitPass
        layers.append(layer)
        given.append(inputs[0].detach())
        outputs.append(output)

    trained = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    trained = [m for m in trained if next(m.parameters(recurse=False)).requires_grad]
    handles = [layer.register_forward_hook(note) for layer in trained]
    try:
        losses = task.losses(module(pixels), targets)
    finally:
        for handle in handles:
            handle.remove()
    if len(set(map(id, layers))) != len(layers) or len(layers) != len(trained):
        raise UnfitPass
    if any(len(output) != len(pixels) for output in outputs):
        raise UnfitPass
    shares = torch.tensor(sizes, dtype=losses.dtype)[owner]
    # Asked for outputs only, autograd computes no gradient of a weight.
    answers = torch.autograd.grad((losses / shares).sum(), outputs)
    return [_Seen(*each) for each in zip(layers, given, answers, strict=True)]


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _small(each: _Seen, owner: Tensor, count: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Biases, and the weights of GroupNorm: one number a channel, always kept."""
    layer, answer = each.layer, each.answer

    def by_unit(values: Tensor) -> Tensor:
        rows = values.flatten(2).sum(dim=2) if values.ndim > 2 else values
        return torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, owner, rows)

    if isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(each.given, layer.num_groups, eps=layer.eps)
        yield _weight(layer), by_unit(answer * normal)
    bias = layer.bias
    if isinstance(bias, nn.Parameter):
        yield bias, by_unit(answer)


def _by_ghost(each: _Seen, images: int) -> bool:
    if isinstance(each.layer, nn.Conv3d):
        return False
    if isinstance(each.layer, nn.Conv2d) and each.layer.groups != 1:
        return False
    places = images * (each.answer[0, 0].numel() if each.answer.ndim > 2 else 1)
    return places <= _PLACES and 2 * places**2 < _weight(each.layer).numel()


def _ghost(each: _Seen, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Squared norms of the patients' gradients, and their masses, float64 (patients,)."""
    squares = torch.zeros(len(sizes), dtype=torch.float64)
    masses = torch.zeros(len(sizes), dtype=torch.float64)
    starts = [0, *accumulate(sizes)]

    def measure(units: Sequence[int]) -> None:
        size = sizes[units[0]]
        places = torch.tensor([starts[unit] + image for unit in units for image in range(size)])
        one = _input_products(each.layer, each.given[places], size)
        other = _products(each.answer[places], size)
        squares[units] = (one * other).sum(dim=(1, 2)).clamp_min(0)
        lengths = one.diagonal(dim1=1, dim2=2) * other.diagonal(dim1=1, dim2=2)
        masses[units] = lengths.sqrt().sum(dim=1)

    alike = [
        [unit for unit, images in enumerate(sizes) if images == size] for size in sorted(set(sizes))
    ]
    for units in alike:
        for at in range(0, len(units), _GHOSTS):
            measure(units[at : at + _GHOSTS])
    return squares, masses


def _products(values: Tensor, size: int) -> Tensor:
    """Inner products between the places of each patient, float64 (patients, places, places).

    Args:
        values: (images, channels, ...), ``size`` images after each other for each patient.
    """
    wide = values.double().flatten(2) if values.ndim > 2 else values.double().unsqueeze(2)
    rows = wide.transpose(1, 2).reshape(len(values) // size, -1, values.shape[1])
    return torch.bmm(rows, rows.transpose(1, 2))


def _input_products(layer: nn.Module, given: Tensor, size: int) -> Tensor:
    """The same for what the layer multiplies its weights with at each place of its output.

    A convolution's is the sum over the kernel of the products between pixels, shifted. That is
    less work than to lay the kernel's pixels side by side, but where the stride skips most.
    """
    if not isinstance(layer, nn.Conv2d):
        return _products(given, size)
    assert not isinstance(layer.padding, str)
    (up, left), (high, wide) = layer.padding, layer.kernel_size
    padded = F.pad(given, (left, left, up, up))
    starts = [
        (slice(y, padded.shape[2] - (high - 1) * layer.dilation[0] + y, layer.stride[0]),
         slice(x, padded.shape[3] - (wide - 1) * layer.dilation[1] + x, layer.stride[1]))
        for y in range(0, high * layer.dilation[0], layer.dilation[0])
        for x in range(0, wide * layer.dilation[1], layer.dilation[1])
    ]  # fmt: skip
    one = padded[:, :, starts[0][0], starts[0][1]]
    if padded[0, 0].numel() ** 2 > one[0, 0].numel() ** 2 * len(starts):
        columns = torch.cat([padded[:, :, y, x] for y, x in starts], dim=1)
        return _products(columns, size)
    units, places = len(given) // size, size * one[0, 0].numel()
    pixels = _products(padded, size).view(units, *(size, *padded.shape[2:]) * 2)
    total = torch.zeros(units, *(size, *one.shape[2:]) * 2, dtype=torch.float64)
    for y, x in starts:
        total += pixels[:, :, y, x, :, y, x]
    return total.view(units, places, places)


def _conv_weight(layer: nn.Conv2d | nn.Conv3d, given: Tensor, answer: Tensor) -> Tensor:
    _, gradient, _ = torch.ops.aten.convolution_backward(
        answer, given, layer.weight.detach(), None, layer.stride, layer.padding, layer.dilation,
        False, [0] * (given.ndim - 2), layer.groups, [False, True, False],
    )  # fmt: skip
    result: Tensor = gradient
    return result


def _thin_weight(layer: nn.Conv2d, given: Tensor, answer: Tensor) -> Tensor:
    """As ``_conv_weight``, for few weights an output: a product of matrices is faster there."""
    assert not isinstance(layer.padding, str)
    columns = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    flat = answer.flatten(2)
    total: Tensor = torch.bmm(flat, columns.transpose(1, 2)).sum(dim=0)
    return total.view_as(layer.weight)


def _unit_weights(each: _Seen, sizes: Sequence[int]) -> Tensor:
    """A layer's gradients, (patients, *weight)."""
    rows = torch.empty(len(sizes), *_weight(each.layer).shape, dtype=each.answer.dtype)
    given = torch.split(each.given, list(sizes))
    answers = torch.split(each.answer, list(sizes))

    for row, one, answer in zip(rows, given, answers, strict=True):
        if not isinstance(each.layer, (nn.Conv2d, nn.Conv3d)):
            torch.mm(answer.t(), one, out=row)
        elif (
            isinstance(each.layer, nn.Conv2d) and each.layer.groups == 1 and row[0].numel() <= _THIN
        ):
            row.copy_(_thin_weight(each.layer, one, answer))
        else:
            row.copy_(_conv_weight(each.layer, one, answer))
    return rows


def _weighted(rows: Tensor, weights: Tensor, alive: Tensor) -> Tensor:
    if not bool(alive.all()):
        # Zero times infinity is not zero.
        rows, weights = rows[alive], weights[alive]
    total: Tensor = torch.tensordot(weights.to(rows.dtype), rows, dims=1)
    return total


def _second(each: _Seen, images: slice, weights: Tensor, alive: Tensor) -> Tensor:
    given, answer, there = each.given[images], each.answer[images], alive[images]
    weights = weights[images].to(answer.dtype)
    if not bool(there.all()):
        given, answer, weights = given[there], answer[there], weights[there]
    answer = answer * weights.view(-1, *[1] * (answer.ndim - 1))
    if isinstance(each.layer, nn.Conv2d):
        if not len(given):
            return torch.zeros_like(each.layer.weight.detach())
        return _conv_weight(each.layer, given, answer)
    product: Tensor = torch.mm(answer.t(), given)
    return product


# The engine as it was, around the pass.

_ROW = 64
_ROW_MARGIN = 2.0**-18
_LOST = _ROW * 2.0**-126
_IMAGES_AT_ONCE = 64


def squares_at_most(rows: Tensor) -> Tensor:
    """Squared norms, at most 2^-16 above the true ones and never below, float64 (n,)."""
    count, size = rows.shape
    whole = size - size % _ROW
    total: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=torch.float64).square()
    if not whole:
        return total
    parts = torch.linalg.vector_norm(rows[:, :whole].reshape(count, -1, _ROW), dim=2)
    bound = parts.double().square_().add_(_LOST).sum(dim=1).mul_(1 + 2 * _ROW_MARGIN)
    for row in (~bound.isfinite()).nonzero().flatten().tolist():
        bound[row] = torch.linalg.vector_norm(rows[row, :whole], dtype=torch.float64).square()
    return total.add_(bound)


def summed(
    module: nn.Module,
    task: Task,
    cohort: Cohort | FeatureCohort,
    bags: Sequence[Bag],
    clip: float,
    *,
    by_largest: bool = False,
    beyond: bool = False,
    tried_once: bool = False,
) -> Tensor:
    """The sum of a step, with the faults that are asked for; int64, in units of 2^-30 C."""
    limit = clip / (1 + ETA)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    total = torch.zeros(sum(weight.numel() for weight in trained), dtype=torch.int64)

    def add(parts: Sequence[Tensor]) -> None:
        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        if bool(flat.isfinite().all()):
            total.add_((flat.double() * (2.0**GRID_BITS / clip)).trunc().to(torch.int64))

    def alone(bag: Bag) -> None:
        pixels, targets = pixels_of(cohort, [bag]), targets_of(task, cohort, [bag])
        parts = torch.autograd.grad(task.losses(module(pixels), targets).mean(), trained)
        norm = float(torch.cat([part.reshape(-1) for part in parts]).double().norm())
        if math.isfinite(norm):
            add([part * (limit / max(norm, limit)) for part in parts])

    if not supported(module) or not (tried_once or _agrees(module, task, cohort)):
        for bag in bags:
            alone(bag)
        return total
    runs = [list(bags)]
    if not by_largest:
        sizes = sorted({len(bag.images) for bag in bags})
        runs = [[bag for bag in bags if len(bag.images) == size] for size in sizes]
    for some in runs:
        first = some[:MOST] if beyond else some
        for run in chunks(first, max(GROUP, _IMAGES_AT_ONCE)):
            pixels, targets = pixels_of(cohort, run), targets_of(task, cohort, run)
            images = [len(bag.images) for bag in run]
            for parts in clipped_groups(module, task, pixels, targets, images, limit):
                add(parts)
        for bag in some[len(first) :]:
            alone(bag)
    return total


def _agrees(module: nn.Module, task: Task, cohort: Cohort | FeatureCohort) -> bool:
    """Whether single patients come out as from the loop, with the weights of now."""
    shape = cohort.images.shape[1:]
    one = shape if isinstance(cohort, FeatureCohort) else (1, *shape)
    pixels = torch.randn((4, *one), generator=torch.Generator().manual_seed(0))
    targets, sizes = task.example(pixels), [1, 3]
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        (both,) = clipped_groups(module, task, pixels, targets, sizes, 1e30)
    except UnfitPass:
        return False
    exact = torch.zeros(sum(weight.numel() for weight in trained))
    for some, wanted in zip(torch.split(pixels, sizes), torch.split(targets, sizes), strict=True):
        parts = torch.autograd.grad(task.losses(module(some), wanted).mean(), trained)
        exact += torch.cat([part.reshape(-1) for part in parts])
    got = torch.cat([part.reshape(-1) for part in both])
    return float((got - exact).norm()) <= 1e-3 * float(exact.norm())
