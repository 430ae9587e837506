"""Per-patient gradients, by one of two engines behind Opacus' interface.

A patient's gradient is that of the mean loss (``Task.losses``) over the patient's images. Adding or
removing one patient moves the exact sum of ``exact_sum`` by at most C only if no other patient's
gradient changes by a single bit. So whatever decides about a patient's gradient, the path, the
shapes of a pass, the number of threads, is a function of that patient's own images, the weights and
public constants; never of who else was drawn, nor of how many.

``patients`` goes from patient to patient, one on each core. It takes any layer and needs the memory
of a bag a core. For a small network, where calls cost more than arithmetic, it takes 16 patients
with equally many images, at most 8, at a time (``torch.func.vmap``); always 16, empty places are
filled up, so that shapes never tell who else is there. Whether that path is fit for a form of
network and bag is tried once, with weights and images that are public constants: the gradients of
16 patients must come out the same, bit by bit, when they change places and beside any neighbour,
else the loop is used.

``opacus`` computes it through Opacus' own hooks, image by image, the losses weighted by one over
the patient's images: one patient a pass, for the matrix products of a pass round each other's
images in ways that depend on its size. It is slower, and there to compare with.

Each pass runs on one core: how a sum is divided among threads would round it in another way.
"""

from __future__ import annotations

import copy
import queue
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cloister_fl.client.training.exact_sum import Block, Weighted
from cloister_fl.client.training.sampling import (
    Bag,
    Cohort,
    FeatureCohort,
    pixels_of,
    targets_of,
)
from cloister_fl.client.training.thread_pool import one_core, side_by_side
from cloister_fl.networks.flat_parameters import form_of
from cloister_fl.tasks import Task

Key: TypeAlias = tuple[object, ...]
Shape: TypeAlias = tuple[int, ...]
"""Shape of one image as the network gets it."""
Engine: TypeAlias = Literal["patients", "opacus"]
Places: TypeAlias = list[int]
"""Places in the bags of a step."""

Told: TypeAlias = Callable[[Exception], None]
"""Gets what fails for one patient."""

_PLACES = 16
"""Patients that a small network takes at a time."""

_MOST_IMAGES = 8
"""Most images of a patient for whom that is done: 16 times a large bag is much memory, which the
patient alone would not need."""

_SMALL = 1 << 17
"""Most parameters of a small network."""

_OUT_OF_MEMORY = ("allocate memory", "out of memory", "not enough memory")
"""What torch says where none is left; "memory format" is of a network, and of every moment."""

_TURNS = (1, 2, 3, 5, 8)
"""By how many places a trial moves 16 patients on, each time."""

_tried: dict[Key, bool] = {}


@dataclass(frozen=True)
class _Pass:
    """Patients of equally many images who go through the network together."""

    places: Places
    images: int
    batched: bool


class PatientGradSampleModule(AbstractGradSampleModule):  # type: ignore[misc]  # Opacus is not typed
    """A module whose ``grad_sample`` holds one gradient a patient.

    Args:
        m: the network, in training mode.
        task: gives losses and targets.
        engine: they give the same gradients up to rounding.
        told: gets what fails for one patient, who then adds nothing while all others add what they
            would; without it, it is raised.

    Call ``to_standard_module`` when done: Opacus leaves marks on the parameters.
    """

    def __init__(
        self,
        m: nn.Module,
        task: Task,
        *,
        engine: Engine = "patients",
        told: Told | None = None,
    ) -> None:
        super().__init__(m, batch_first=True, loss_reduction="sum")
        self.task = task
        self.engine: Engine = engine
        self._told = told
        self._small = sum(parameter.numel() for parameter in self.trained) <= _SMALL
        self._hooked = GradSampleModule(m, loss_reduction="sum") if engine == "opacus" else None
        self._form = form_of(m)
        # torch.func swaps the weights of a module while it runs: no two threads may share one.
        self._spare: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that have gradients, in the order of the flat vector."""
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def blocks(
        self,
        cohort: Cohort | FeatureCohort,
        bags: Sequence[Bag],
        class_weights: Sequence[float] = (),
    ) -> Iterator[Block | Weighted]:
        """Yield gradients, a few patients at a time.

        The patients come in any order.

        Args:
            cohort: the site's patients.
            bags: whose images are drawn.
            class_weights: of each class, above 0 and at most 1; none for 1 each. A patient's is
                the mean over the drawn images.
        """
        for places, block in self._placed_blocks(cohort, bags):
            if not class_weights:
                yield block
                continue
            # Labels as they are: the targets of an augmented image are those of the image.
            of_class = np.asarray(class_weights)
            own = [float(of_class[cohort.targets[bags[place].images]].mean()) for place in places]
            yield Weighted(block, own)

    def fill_grad_samples(self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]) -> None:
        """Set ``p.grad_sample`` of each parameter to (patients, *shape), as Opacus users expect."""
        size = sum(parameter.numel() for parameter in self.trained)
        # A patient who fails adds nothing.
        gradients = torch.zeros(len(bags), size, dtype=self.trained[0].dtype)
        for places, block in self._placed_blocks(cohort, bags):
            gradients[places] = _flat(block)
        position = 0
        for parameter in self.trained:
            part = gradients[:, position : position + parameter.numel()]
            parameter.grad_sample = part.reshape(len(bags), *parameter.shape)  # type: ignore[attr-defined]
            position += parameter.numel()

    def _placed_blocks(
        self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]
    ) -> Iterator[tuple[Places, Block]]:
        """Yield gradients with the places of their patients in ``bags``."""
        if self._hooked is not None:
            with one_core():
                for place, bag in enumerate(bags):
                    try:
                        block = self._by_hooks(self._hooked, *self._read(cohort, [bag]))
                    except Exception as error:
                        self._forget_pass()
                        self._tell(error)
                        continue
                    yield [place], block
            return
        passes = list(self._passes(_shape(cohort), bags))
        failed: list[_Pass] = []

        def gradients(one: _Pass) -> Block | None:
            try:
                return self._of_pass(cohort, bags, one)
            except Exception:
                if self._told is None:
                    raise
                failed.extend(replace(one, places=[place]) for place in one.places)
                return None

        def alone(one: _Pass) -> Block | None:
            try:
                return self._of_pass(cohort, bags, one)
            except Exception as error:
                self._tell(error)
                return None

        yield from _made(passes, side_by_side(gradients, passes))
        # What failed may have failed for want of the memory that passes beside it held. Alone, in a
        # pass of the same shape, a patient has the same bits, or fails by its own images.
        for one in failed:
            yield from _made([one], side_by_side(alone, [one]))

    def _tell(self, error: Exception) -> None:
        if self._told is None:
            raise error
        self._told(error)

    def _passes(self, one: Shape, bags: Sequence[Bag]) -> Iterator[_Pass]:
        """Who goes through the network together: patients of equally many images, or one alone."""
        by_images: dict[int, Places] = {}
        for place, bag in enumerate(bags):
            by_images.setdefault(len(bag.images), []).append(place)
        for images, places in by_images.items():
            batched = self._batched(images, one)
            each = _PLACES if batched else 1
            for start in range(0, len(places), each):
                yield _Pass(places[start : start + each], images, batched)

    def _of_pass(self, cohort: Cohort | FeatureCohort, bags: Sequence[Bag], one: _Pass) -> Block:
        pixels, targets = self._read(cohort, [bags[place] for place in one.places])
        if one.batched:
            return self._side_by_side(pixels, targets, one.images)
        return self._of_patient(pixels, targets)

    def _read(self, cohort: Cohort | FeatureCohort, run: Sequence[Bag]) -> tuple[Tensor, Tensor]:
        return pixels_of(cohort, run), targets_of(self.task, cohort, run)

    def _side_by_side(self, pixels: Tensor, targets: Tensor, images: int) -> Tensor:
        """Gradients of up to 16 patients who have ``images`` images each."""
        return self._with_weights(dict(self._module.named_parameters()), pixels, targets, images)

    def _with_weights(
        self, weights: Mapping[str, Tensor], pixels: Tensor, targets: Tensor, images: int
    ) -> Tensor:
        count = len(pixels) // images

        def filled_up(rows: Tensor) -> Tensor:
            places = torch.zeros(_PLACES, images, *rows.shape[1:], dtype=rows.dtype)
            places[:count] = rows.view(count, images, *rows.shape[1:])
            return places

        trained: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        for name, weight in self._module.named_parameters():
            (trained if weight.requires_grad else fixed)[name] = weights[name].detach()
        try:
            module = self._spare.get_nowait()
        except queue.Empty:
            module = copy.deepcopy(self._module)

        def loss(some: dict[str, Tensor], bag: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(module, {**some, **fixed}, (bag,))
            return self.task.losses(logits, target).mean()

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(
            trained, filled_up(pixels), filled_up(targets)
        )
        self._spare.put(module)
        flat = torch.cat([gradients[name].flatten(start_dim=1) for name in trained], dim=1)
        return flat[:count]

    def _batched(self, images: int, one: Shape) -> bool:
        """Whether patients of so many images go 16 at a time: a function of public constants."""
        if not self._small or images > _MOST_IMAGES:
            return False
        key: Key = (self._form, self.task, images, one)
        if key not in _tried:
            # Where passes run: in a thread with one core.
            (fit,) = side_by_side(lambda _: self._tries(images, one), [None])
            if fit is None:
                return False
            _tried[key] = fit
        return _tried[key]

    def _tries(self, images: int, one: Shape) -> bool | None:
        """Whether such a pass is fit; None where memory did not suffice to tell."""
        try:
            return self._try_places(images, one)
        except MemoryError:
            return None
        except (RuntimeError, NotImplementedError) as error:
            if any(words in str(error) for words in _OUT_OF_MEMORY):
                # That is of the moment, and would decide for as long as the process runs.
                return None
            # The network does what torch.func has no rule for.
            return False

    def _try_places(self, images: int, one: Shape) -> bool:
        """Whether a patient's gradient has the same bits in any place, beside any neighbour."""
        # Public numbers, unlike anything that privacy rests on; not the weights of the moment, or
        # what a process saw first would decide.
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(weight.shape, generator=generator).to(weight.dtype)
            / max(1, weight[0].numel() if weight.ndim else 1) ** 0.5
            for name, weight in self._module.named_parameters()
        }
        crowd = torch.randn((_PLACES, images, *one), generator=generator)
        crowd = crowd.to(self.trained[0].dtype)
        targets = self.task.example(crowd.flatten(0, 1))
        each = targets.view(_PLACES, images, *targets.shape[1:])

        def gradients(patients: Tensor, theirs: Tensor) -> Tensor:
            return self._with_weights(weights, patients.flatten(0, 1), theirs.flatten(0, 1), images)

        expected = gradients(crowd, each)
        # A matrix product may round by where a patient's rows begin in memory. Two places often
        # agree by luck: of one patient alone, a linear layer on odd images passed.
        for turn in _TURNS:
            turned = gradients(crowd.roll(turn, 0), each.roll(turn, 0))
            if not torch.equal(turned.roll(-turn, 0), expected):
                return False
        for place, neighbours in (
            (0, 1e4), (0, 0.0), (7, 100.0), (7, float("nan")), (_PLACES - 1, -1.0)
        ):  # fmt: skip
            others = crowd * neighbours
            others[place] = crowd[place]
            if not torch.equal(gradients(others, each)[place], expected[place]):
                return False
        return True

    def _of_patient(self, images: Tensor, targets: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(
            self.task.losses(self._module(images), targets).mean(), self.trained
        )

    def _by_hooks(self, hooked: GradSampleModule, images: Tensor, targets: Tensor) -> Block:
        hooked.set_grad_sample_to_none()
        try:
            losses = self.task.losses(hooked(images), targets)
            with warnings.catch_warnings():
                # torch remarks that no input of the first layer needs a gradient; none should.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                torch.autograd.backward(losses.mean())
            return [weight.grad_sample.sum(dim=0) for weight in self.trained]  # type: ignore[attr-defined]
        finally:
            hooked.zero_grad(set_to_none=True)

    def _forget_pass(self) -> None:
        """Throw away what hooks keep of a pass that broke off: it would go to the next patient."""
        for layer in self._module.modules():
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)
        for weight in self.trained:
            weight._forward_counter = 0  # type: ignore[attr-defined]
            weight.__dict__.pop("_current_grad_sample", None)

    def remove_hooks(self) -> None:
        """Take Opacus' hooks off the network."""
        if self._hooked is not None:
            self._hooked.remove_hooks()
            self._hooked = None


def _made(
    passes: Iterable[_Pass], blocks: Iterable[Block | None]
) -> Iterator[tuple[Places, Block]]:
    for one, block in zip(passes, blocks, strict=True):
        if block is not None:
            yield one.places, block


def _flat(block: Block) -> Tensor:
    """A block as float32 (patients, parameters)."""
    if isinstance(block, Tensor):
        return block
    return torch.cat([part.reshape(-1) for part in block]).unsqueeze(0)


def _shape(cohort: Cohort | FeatureCohort) -> Shape:
    shape = cohort.images.shape[1:]
    return shape if isinstance(cohort, FeatureCohort) else (1, *shape)
