"""DP-SGD optimiser on Opacus: the clipping, the sum and the noise that the proof needs.

Opacus sums clipped gradients in float32, so one patient can move the sum by a little more than C;
it adds float noise, whose low bits tell of the sum (Mironov 2012); it takes both from generators
that a seed repeats; one infinite gradient spoils the weights; and an accumulation that is left
early is carried into the next step. Here

- a patient's gradient that is not finite counts as zero;
- clipped gradients are put on a grid of 2^-30 C and summed exactly, so that adding or removing one
  patient moves the sum by at most C, not C (1 + something): ``exact_sum``;
- noise of standard deviation sigma C is rounded to the same grid, so that the noised sum is a
  rounding of (sum + Gaussian): post-processing of the Gaussian mechanism;
- the divisor is a public constant, never the number of patients who were drawn or who are there:
  dividing by an actual or expected batch size leaks (arXiv 2605.15648);
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

from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.exact_sum import GRID_BITS, Block, Weighted, clipped_sum
from cloister_fl.errors import InternalError

_PIECE = 1 << 18
"""Values noised at a time: they stay in the processor's cache."""


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

    def step_on(self, blocks: Iterable[Block | Weighted]) -> None:
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
        std = self.noise_multiplier * 2.0**GRID_BITS
        scale = self.max_grad_norm * 2.0**-GRID_BITS / self.expected_batch_size
        update = torch.empty(len(total))
        for piece, out in zip(torch.split(total, _PIECE), torch.split(update, _PIECE), strict=True):
            if self.noise_multiplier > 0:
                assert self._random is not None
                piece.add_(self._random.normal(len(piece), std).round_().to(torch.int64))
            # What follows depends on the noised sum and public constants alone.
            out.copy_(piece.to(torch.float64).mul_(scale))
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
