"""Per-patient gradients, by one of three engines behind Opacus' interface.

A patient's gradient is that of the mean loss (``Task.losses``) over the patient's images.

``patients`` goes from patient to patient, one on each core. It takes any layer, needs the memory
of a bag a core, and computes each gradient from nothing but that patient's images, so that the
exact sensitivity of ``dp_optimizer`` holds for the whole step. For a small network, where calls
cost more than arithmetic, it takes 16 patients with equally many images at a time
(``torch.func.vmap``); always 16, empty places are filled up, so that shapes never tell who else is
there. Before that path is used for a shape, it is tried: a patient's gradient must come out the
same, bit by bit, in every place tried and beside any neighbour, else the loop is used.

``opacus`` pushes many images through Opacus' hooks at once, each loss weighted by one over the
patient's images, and sums the image gradients by patient. Its matrix products see the whole batch,
so the rounding error of one patient's gradient (about 1e-7 of it) may depend on who else is in the
batch; the proof of sensitivity starts after that rounding.

``book-keeping`` gives sums of clipped gradients from one backward pass, see ``ghost_clipping``.
Before it is used for a network and a size of image, it is tried: single patients must come out as
from the loop. Where they do not, or a layer has no rule, the loop is used, with the whole clipping
norm. It does not support a privacy claim (see there), and no study with privacy may name it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cloister_fl.client.training import ghost_clipping
from cloister_fl.client.training.exact_sum import Block, Clipped
from cloister_fl.client.training.sampling import (
    Bag,
    Cohort,
    FeatureCohort,
    chunks,
    images_at_once,
    pixels_of,
    targets_of,
)
from cloister_fl.client.training.thread_pool import side_by_side
from cloister_fl.errors import InternalError
from cloister_fl.tasks import Task

Key: TypeAlias = tuple[object, ...]
Shape: TypeAlias = tuple[int, ...]
"""Shape of one image as the network gets it."""
Engine: TypeAlias = Literal["patients", "opacus", "book-keeping"]

_PLACES = 16
"""Patients that a small network takes at a time."""

_SMALL = 1 << 17
"""Most parameters of a small network."""

_IMAGES_AT_ONCE = 64
"""Most images that ``opacus`` and ``book-keeping`` take in one pass."""


_AGREE = 1e-3
"""Largest relative difference between book-keeping and the loop: float32 rounding, and no fault."""

_tried: dict[Key, bool] = {}


class PatientGradSampleModule(AbstractGradSampleModule):  # type: ignore[misc]  # Opacus is not typed
    """A module whose ``grad_sample`` holds one gradient a patient.

    Args:
        m: the network, in training mode.
        task: gives losses and targets.
        engine: they give the same gradients up to rounding.
        clipping_norm: C; ``book-keeping`` needs it, for it clips by itself.

    Call ``to_standard_module`` when done: Opacus leaves marks on the parameters.
    """

    def __init__(
        self,
        m: nn.Module,
        task: Task,
        *,
        engine: Engine = "patients",
        clipping_norm: float = math.inf,
    ) -> None:
        super().__init__(m, batch_first=True, loss_reduction="sum")
        self.task = task
        self.engine: Engine = engine
        self._limit = clipping_norm / (1 + ghost_clipping.ETA)
        self._small = sum(parameter.numel() for parameter in self.trained) <= _SMALL
        self._hooked = GradSampleModule(m, loss_reduction="sum") if engine == "opacus" else None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that have gradients, in the order of the flat vector."""
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def blocks(self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]) -> Iterator[Block]:
        """Yield gradients, a few patients at a time.

        The patients come in any order.
        """
        if self.engine == "book-keeping" and self._kept_books_agree(_shape(cohort)):
            yield from self._by_ghost_clipping(cohort, bags)
            return
        for _, block in self._placed_blocks(cohort, bags):
            yield block

    def fill_grad_samples(self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]) -> None:
        """Set ``p.grad_sample`` of each parameter to (patients, *shape), as Opacus users expect."""
        size = sum(parameter.numel() for parameter in self.trained)
        gradients = torch.empty(len(bags), size, dtype=self.trained[0].dtype)
        for places, block in self._placed_blocks(cohort, bags):
            gradients[places] = _flat(block)
        position = 0
        for parameter in self.trained:
            part = gradients[:, position : position + parameter.numel()]
            parameter.grad_sample = part.reshape(len(bags), *parameter.shape)  # type: ignore[attr-defined]
            position += parameter.numel()

    def _placed_blocks(
        self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]
    ) -> Iterator[tuple[list[int], Block]]:
        """Yield gradients with the places of their patients in ``bags``."""
        if self._hooked is not None:
            start = 0
            for run in chunks(bags, images_at_once(cohort, _IMAGES_AT_ONCE)):
                pixels, targets = pixels_of(cohort, run), targets_of(self.task, cohort, run)
                block = self._by_hooks(self._hooked, pixels, targets, run)
                yield list(range(start, start + len(run))), block
                start += len(run)
            return
        by_images: dict[int, list[int]] = {}
        for place, bag in enumerate(bags):
            by_images.setdefault(len(bag.images), []).append(place)
        for images, places in by_images.items():
            if self._small and self._independent(images, _shape(cohort)):
                for start in range(0, len(places), _PLACES):
                    some = places[start : start + _PLACES]
                    run = [bags[place] for place in some]
                    pixels, targets = pixels_of(cohort, run), targets_of(self.task, cohort, run)
                    yield some, self._side_by_side(pixels, targets, images)
            else:
                gradients = side_by_side(
                    lambda bag: self._of_bag(cohort, bag), (bags[place] for place in places)
                )
                for place, gradient in zip(places, gradients, strict=True):
                    yield [place], gradient

    def _side_by_side(self, pixels: Tensor, targets: Tensor, images: int) -> Tensor:
        """Gradients of up to 16 patients who have ``images`` images each."""
        count = len(pixels) // images

        def filled_up(rows: Tensor) -> Tensor:
            places = torch.zeros(_PLACES, images, *rows.shape[1:], dtype=rows.dtype)
            places[:count] = rows.view(count, images, *rows.shape[1:])
            return places

        names = [name for name, weight in self._module.named_parameters() if weight.requires_grad]
        weights = {name: weight.detach() for name, weight in self._module.named_parameters()}
        fixed = {name: weights.pop(name) for name in list(weights) if name not in names}

        def loss(trained: dict[str, Tensor], bag: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(self._module, {**trained, **fixed}, (bag,))
            return self.task.losses(logits, target).mean()

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(
            weights, filled_up(pixels), filled_up(targets)
        )
        flat = torch.cat([gradients[name].flatten(start_dim=1) for name in names], dim=1)
        return flat[:count]

    def _independent(self, images: int, one: Shape) -> bool:
        """Whether side by side, a patient's gradient is the same whoever is there; tried once."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self._module.named_parameters())
        key: Key = (type(self._module), shapes, self.task, images, one, torch.get_num_threads())
        if key not in _tried:
            _tried[key] = self._try_places(images, one)
        return _tried[key]

    def _try_places(self, images: int, one: Shape) -> bool:
        # Public numbers, unlike anything that privacy rests on.
        generator = torch.Generator().manual_seed(0)
        shape = (_PLACES, images, *one)
        crowd = torch.randn(shape, generator=generator).to(self.trained[0].dtype)
        targets = self.task.example(crowd.flatten(0, 1))
        seen: list[Tensor] = []
        for place, neighbours in (
            (0, 1.0), (0, 0.0), (7, 100.0), (7, float("nan")), (_PLACES - 1, 1.0)
        ):  # fmt: skip
            others = crowd * neighbours
            others[place] = crowd[0]
            mine = targets.clone()
            mine[place * images : (place + 1) * images] = targets[:images]
            seen.append(self._side_by_side(others.flatten(0, 1), mine, images)[place])
        return all(torch.equal(gradient, seen[0]) for gradient in seen)

    def _of_patient(self, images: Tensor, targets: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(
            self.task.losses(self._module(images), targets).mean(), self.trained
        )

    def _of_bag(self, cohort: Cohort | FeatureCohort, bag: Bag) -> Sequence[Tensor]:
        return self._of_patient(pixels_of(cohort, [bag]), targets_of(self.task, cohort, [bag]))

    def _by_ghost_clipping(
        self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]
    ) -> Iterator[Block]:
        if not math.isfinite(self._limit):
            raise InternalError("Ghost clipping needs the clipping norm.")

        def groups(run: Sequence[Bag]) -> list[Clipped]:
            pixels, targets = pixels_of(cohort, run), targets_of(self.task, cohort, run)
            sizes = [len(bag.images) for bag in run]
            found = ghost_clipping.clipped_groups(
                self._module, self.task, pixels, targets, sizes, self._limit
            )
            return [Clipped(parts) for parts in found]

        # All cores together hold as many images as the other engines in one pass, or a group each.
        at_once = max(ghost_clipping.GROUP, _IMAGES_AT_ONCE // torch.get_num_threads())
        for clipped in side_by_side(groups, chunks(bags[: ghost_clipping.MOST], at_once)):
            yield from clipped
        for bag in bags[ghost_clipping.MOST :]:
            # To the same norm as the others: one patient more must not change another's clipping.
            alone = self._of_bag(cohort, bag)
            norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in alone]
            norm = math.hypot(*(float(each) for each in norms))
            if math.isfinite(norm):
                factor = self._limit / max(norm, self._limit)
                yield Clipped([part * factor for part in alone])

    def _kept_books_agree(self, one: Shape) -> bool:
        """Whether book-keeping gives single patients what the loop gives; tried once."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self._module.named_parameters())
        key: Key = ("book-keeping", type(self._module), shapes, self.task, one)
        if not ghost_clipping.supported(self._module):
            return False
        if key not in _tried:
            _tried[key] = self._try_books(one)
        return _tried[key]

    def _try_books(self, one: Shape) -> bool:
        # Public numbers; one patient of one image, one of three, as others see the second alone.
        pixels = torch.randn((4, *one), generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(self.trained[0].dtype)
        targets, sizes = self.task.example(pixels), [1, 3]
        try:
            apart = ghost_clipping.unit_norms(self._module, self.task, pixels, targets, sizes)
            (both,) = ghost_clipping.clipped_groups(
                self._module, self.task, pixels, targets, sizes, 1e30
            )
        except ghost_clipping.UnfitPass:
            return False
        exact = [
            _flat(self._of_patient(*each))[0]
            for each in zip(torch.split(pixels, sizes), torch.split(targets, sizes), strict=True)
        ]
        pairs = [*zip(apart, exact, strict=True), (_flat(both)[0], exact[0] + exact[1])]
        return all(float((a - b).norm()) <= _AGREE * float(b.norm()) for a, b in pairs)

    def _by_hooks(
        self, hooked: GradSampleModule, images: Tensor, targets: Tensor, run: Sequence[Bag]
    ) -> Tensor:
        sizes = torch.tensor([len(bag.images) for bag in run])
        owner = torch.repeat_interleave(torch.arange(len(run)), sizes)
        hooked.set_grad_sample_to_none()
        try:
            losses = self.task.losses(hooked(images), targets)
            with warnings.catch_warnings():
                # torch remarks that no input of the first layer needs a gradient; none should.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                torch.autograd.backward((losses / sizes[owner]).sum())
            samples = torch.cat(
                [weight.grad_sample.flatten(start_dim=1) for weight in self.trained],  # type: ignore[attr-defined]
                dim=1,
            )
        finally:
            hooked.zero_grad(set_to_none=True)
        # Patient by patient, not by index_add: a NaN must stay with its owner.
        return torch.stack([part.sum(dim=0) for part in torch.split(samples, sizes.tolist())])

    def remove_hooks(self) -> None:
        """Take Opacus' hooks off the network."""
        if self._hooked is not None:
            self._hooked.remove_hooks()
            self._hooked = None


def _flat(block: Block) -> Tensor:
    """A block as float32 (patients, parameters)."""
    if isinstance(block, Tensor):
        return block
    parts = block.parts if isinstance(block, Clipped) else block
    return torch.cat([part.reshape(-1) for part in parts]).unsqueeze(0)


def _shape(cohort: Cohort | FeatureCohort) -> Shape:
    shape = cohort.images.shape[1:]
    return shape if isinstance(cohort, FeatureCohort) else (1, *shape)
