"""Exact sum of clipped per-patient gradients; rounding never exceeds the sensitivity.

A float32 sum of clipped gradients moves by a little more than C when one patient is added: its
rounding depends on who else is in it. So each clipped gradient is truncated toward zero to whole
multiples of 2^-30 C and summed in whole numbers, which is exact. The norm is taken over all
parameters, of the very values that are summed: rows of 64 in float32, their squares in float64,
with a margin for every rounding on the way. Adding or removing one patient moves the sum by an L2
norm of at most C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cloister_fl.errors import InternalError

GRID_BITS = 30
"""The grid is 2^-30 of the clipping norm; a clipped gradient has an L2 norm of at most 2^30."""


Block: TypeAlias = Tensor | Sequence[Tensor]
"""Several patients' gradients, float32 (patients, size); or one patient's as it comes out of
autograd, one float32 tensor a parameter, which saves a copy."""


@dataclass(frozen=True)
class Weighted:
    """Gradients of patients who count less once they are clipped.

    Attributes:
        block: of some patients.
        weights: of each, above 0 and at most 1: a function of that patient's own labels.
    """

    block: Block
    weights: Sequence[float]


_PIECE = 1 << 18
"""Values clipped at a time: they stay in the processor's cache, and calls cost little."""

_ROW = 64
"""Values of one sum of squares in float32: reading is what a norm costs, and float64 doubles it."""

_ROW_MARGIN = 2.0**-18
"""What a row's norm may err by, twice over: ``_ROW`` roundings of 2^-24 each under a root."""

_LOST = _ROW * 2.0**-126
"""What a row's square may lose to underflow."""

_ROOM = 2.0**31 - 2
"""What a sum in int32 may reach."""


def clipped_sum(blocks: Iterable[Block | Weighted], size: int, clipping_norm: float) -> Tensor:
    """Clip patients' gradients, put them on the grid and sum them.

    Args:
        blocks: gradients; any number of blocks, also none. A weight multiplies the clipped
            gradient: before the clip it would be clipped away.
        size: length of one patient's gradient.
        clipping_norm: C, above 0.

    Returns:
        int64, (``size``,), in units of 2^-30 C. Adding or removing one patient moves it by an L2
        norm of at most 2^30, exactly.

    Raises:
        InternalError: a block has another shape, or a weight is not above 0 and at most 1.
    """
    # One running sum a form: a network may be taken side by side for some bags, not for others.
    sums: dict[tuple[int, ...], _GridSum] = {}
    for block in blocks:
        for parts, weight in _one_by_one(block):
            flat = [part.detach().reshape(-1) for part in parts]
            sizes = tuple(len(part) for part in flat)
            if sum(sizes) != size:
                raise InternalError("A patient's gradient has the wrong length.")
            if sizes not in sums:
                sums[sizes] = _GridSum(sizes, clipping_norm)
            sums[sizes].add(flat, weight)
    total = torch.zeros(size, dtype=torch.int64)
    for part_sum in sums.values():
        total.add_(part_sum.finish())
    return total


def _one_by_one(block: Block | Weighted) -> Iterable[tuple[Sequence[Tensor], float]]:
    if isinstance(block, Weighted):
        rows = [parts for parts, _ in _one_by_one(block.block)]
        if len(rows) != len(block.weights) or not all(0 < one <= 1 for one in block.weights):
            raise InternalError("A patient's weight is missing, or is not above 0 and at most 1.")
        return list(zip(rows, block.weights, strict=True))
    if isinstance(block, Tensor):
        return [([row], 1.0) for row in block]
    return [(block, 1.0)]


class _GridSum:
    """A running sum, kept in int32 where it cannot overflow and moved to int64 before it could.

    Memory traffic is what this costs, so the running part is as narrow as it can be. A piece of a
    gradient holds no value above the piece's norm, so most pieces take many patients.
    """

    def __init__(self, sizes: tuple[int, ...], clipping_norm: float) -> None:
        self.size = sum(sizes)
        self._clip = clipping_norm
        self._running = torch.zeros(self.size, dtype=torch.int32)
        self._total = torch.zeros(self.size, dtype=torch.int64)
        self._pieces = self._split(list(torch.split(self._running, list(sizes))))
        self._wide = self._split(list(torch.split(self._total, list(sizes))))
        self._reached = [0.0] * len(self._pieces)
        counts = [-(-len(piece) // _ROW) for piece in self._pieces]
        self._owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

    @staticmethod
    def _split(parts: list[Tensor]) -> list[Tensor]:
        return [piece for part in parts for piece in torch.split(part, _PIECE)]

    def add(self, parts: list[Tensor], weight: float) -> None:
        """Add one patient's gradient; what is not finite counts as zero."""
        pieces = self._split(parts)
        norms = self._norms(parts, pieces)
        norm = math.hypot(*norms)
        if not math.isfinite(norm):
            return
        # Summing n squares errs by at most a factor 1 + n 2^-53, roots and hypot by a few 2^-53;
        # the product below, in float32, by 1 + 2^-24. The margin covers twice all that, and the
        # factor is rounded down, so rounding never exceeds the clip.
        norm *= 1.0 + (self.size + 64) * 2.0**-52 + 2.0**-23 + _ROW_MARGIN
        # A weight of at most 1 only makes the factor smaller: what holds without it, holds with it.
        factor = _float32_below(weight * (2.0**GRID_BITS / max(norm, self._clip)))
        for place, (piece, own) in enumerate(zip(pieces, norms, strict=True)):
            # The conversion to a whole number truncates toward zero: magnitudes only fall.
            highest = own * factor * (1 + 2.0**-20)
            if highest > _ROOM:
                self._wide[place].add_(piece.mul(factor).to(torch.int64))
                continue
            if self._reached[place] + highest > _ROOM:
                self._flush(place)
            self._reached[place] += highest
            self._pieces[place].add_(piece.mul(factor).to(torch.int32))

    def _norms(self, parts: list[Tensor], pieces: list[Tensor]) -> list[float]:
        """The norm of each piece, to within ``_ROW_MARGIN``; not finite where a value is not."""
        rows = []
        for part in parts:
            whole = len(part) // _ROW * _ROW
            if whole:
                rows.append(torch.linalg.vector_norm(part[:whole].view(-1, _ROW), dim=1))
            if whole < len(part):
                rows.append(torch.linalg.vector_norm(part[whole:]).reshape(1))
        squares = torch.cat(rows).double().square_().add_(_LOST)
        sums = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, self._owner, squares)
        if bool(sums.isfinite().all()):
            return sums.sqrt().tolist()
        # Squares overflow in float32, never in float64: there only a value that is not finite can.
        wide = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        return torch.stack(wide).tolist()

    def _flush(self, place: int) -> None:
        self._wide[place].add_(self._pieces[place])
        self._pieces[place].zero_()
        self._reached[place] = 0.0

    def finish(self) -> Tensor:
        """Return the sum; exact for up to 2^33 patients."""
        for place in range(len(self._pieces)):
            self._flush(place)
        return self._total


def _float32_below(value: float) -> float:
    """The largest float32 that is at most ``value``."""
    near = np.float32(value)
    return float(np.nextafter(near, np.float32(0)) if float(near) > value else near)
