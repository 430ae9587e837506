"""Opacus' optimiser with the clipping, the summing and the noise that our proof needs.

Opacus sums clipped gradients in float32, so one patient can move the sum by a little more than C;
it adds float noise, whose low bits tell of the sum (Mironov 2012); it takes both from generators
that a seed repeats; one infinite gradient spoils the weights; and an accumulation that is left
early is carried into the next step. Here

- a patient's gradient that is not finite counts as zero;
- its norm is taken in float64 over all parameters, with a margin for the rounding of the norm;
- each clipped gradient is truncated toward zero to whole multiples of 2^-30 C and summed in int64,
  which is exact: adding or removing one patient moves the sum by at most C, not C (1 + something);
- noise of standard deviation sigma C is rounded to the same grid, so that the noised sum is a
  rounding of (sum + Gaussian): post-processing of the Gaussian mechanism;
- the divisor is a public constant, never the number of patients who happened to be drawn;
- the sum lives in a local variable: there is nothing that a step could leave to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from cloister_client.randomness import SecureRandom
from cloister_common.errors import InternalError

GRID_BITS = 30
"""The grid is 2^-30 of the clipping norm; a clipped gradient has an L2 norm of at most 2^30."""

_PIECE = 1 << 16
"""Values clipped at a time: in float64 they stay in the processor's cache."""


def clipped_sum(blocks: Iterable[Tensor], size: int, clipping_norm: float) -> Tensor:
    """Clip patients' gradients, put them on the grid and sum them.

    Args:
        blocks: float32 gradients, (patients, ``size``) each; any number of blocks, also none.
        size: length of one patient's gradient.
        clipping_norm: C, above 0.

    Returns:
        int64, (``size``,), in units of 2^-30 C. Adding or removing one patient (one row) moves it
        by an L2 norm of at most 2^30, exactly.

    Raises:
        InternalError: a block has another shape.
    """
    total = torch.zeros(size, dtype=torch.int64)
    for block in blocks:
        if block.ndim != 2 or block.shape[1] != size:
            raise InternalError("A patient's gradient has the wrong length.")
        for row in block.detach():
            _add_clipped(total, row, clipping_norm)
    return total


def _add_clipped(total: Tensor, gradient: Tensor, clipping_norm: float) -> None:
    # float32 squared and summed cannot overflow float64, so a norm that is not finite has exactly
    # one cause: a value that is not finite.
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if not math.isfinite(norm):
        return
    # Summing n squares errs by at most a factor 1 + n 2^-53; scaling, the root and the products
    # below add a few 2^-53 more. The margin covers twice that, so rounding never exceeds the clip.
    norm *= 1.0 + (len(gradient) + 16) * 2.0**-52
    factor = 2.0**GRID_BITS / max(norm, clipping_norm)
    if norm < clipping_norm:
        factor = 2.0**GRID_BITS / clipping_norm
    for values, target in zip(
        torch.split(gradient, _PIECE), torch.split(total, _PIECE), strict=True
    ):
        # The conversion to a whole number truncates toward zero: magnitudes only fall. Each is at
        # most 2^30, so int32 holds it, and the sum is exact for up to 2^33 patients.
        target.add_(values.to(torch.float64).mul_(factor).to(torch.int32))


class PatientDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is not typed
    """``opacus.optimizers.DPOptimizer`` whose unit is a patient; see the module.

    ``p.grad_sample`` holds one gradient a patient. ``step()`` works as in Opacus; ``step_on`` takes
    the gradients in blocks, so that not all of them need to be in memory.

    Args:
        optimizer: any torch optimiser over the parameters.
        noise_multiplier: sigma; 0 adds no noise and needs no source of randomness.
        max_grad_norm: C, above 0.
        expected_batch_size: the public divisor, in patients, above 0; may be fractional.
        random: where noise comes from; needed where ``noise_multiplier`` is above 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        random: SecureRandom | None,
    ) -> None:
        if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise InternalError("The clipping norm must be above 0 and finite.")
        if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
            raise InternalError("The expected batch must be above 0 and finite.")
        if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
            raise InternalError("The noise multiplier must be finite and not negative.")
        if noise_multiplier > 0 and not isinstance(random, SecureRandom):
            raise InternalError("Noise comes from SecureRandom and from nothing else.")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._random = random

    @property
    def size(self) -> int:
        """Length of one patient's gradient."""
        return sum(parameter.numel() for parameter in self.params)

    def step_on(self, blocks: Iterable[Tensor]) -> None:
        """Clip, sum, add noise, divide and step, for gradients that come in blocks.

        If ``blocks`` raises, nothing has happened: no parameter and no state has changed.

        Args:
            blocks: as for ``clipped_sum``; none at all is an empty batch, a step of noise only.
        """
        self._finish(clipped_sum(blocks, self.size, self.max_grad_norm))

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step on the gradients that ``p.grad_sample`` holds, as Opacus' training loop does."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        gradients = torch.cat([sample.flatten(start_dim=1) for sample in self.grad_samples], dim=1)
        self.zero_grad()
        self.step_on([gradients])

    def _finish(self, total: Tensor) -> None:
        if self.noise_multiplier > 0:
            assert self._random is not None
            std = self.noise_multiplier * 2.0**GRID_BITS
            noise = self._random.normal(len(total), std)
            total = total + noise.round_().to(torch.int64)
        # What follows depends on the noised sum and public constants alone.
        scale = self.max_grad_norm * 2.0**-GRID_BITS / self.expected_batch_size
        update = total.to(torch.float64).mul_(scale).to(torch.float32)
        position = 0
        try:
            for parameter in self.params:
                part = update[position : position + parameter.numel()]
                parameter.grad = part.view_as(parameter).clone()
                position += parameter.numel()
            if self.step_hook:
                self.step_hook(self)
            self.original_optimizer.step()
        finally:
            self.zero_grad(set_to_none=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, always; Opacus keeps a sum where a step was skipped."""
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.summed_grad = None
        self.original_optimizer.zero_grad(set_to_none)

    def signal_skip_step(self, do_skip: bool = True) -> NoReturn:
        """Refuse: virtual batches would carry a sum from one step to the next."""
        raise InternalError(
            "A privatised step cannot be skipped.",
            remedy="Hand the gradients over in blocks with step_on, without BatchMemoryManager.",
        )

    def clip_and_accumulate(self) -> NoReturn:
        """Refuse: clipping without the rest of the step would leave a sum behind."""
        raise InternalError("Clipping is part of a step; call step or step_on.")

    add_noise = clip_and_accumulate
    scale_grad = clip_and_accumulate
    pre_step = clip_and_accumulate
