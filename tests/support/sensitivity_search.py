"""A search for the patient who moves a clipped sum the most; the bound is held against it.

A case is one step: a network with weights that a coordinator may send, a task, patients with bags
of images, and one of them who is left out. What is searched is not random alone: images and
weights are pushed uphill by gradient ascent (on the length of a patient's gradient, or on how much
its images' gradients cancel), and cases that moved a sum the most are varied further.

The engine is a function from a case's patients to their sum, so that the same search meets shipped
engines, faults that were mended, and mutants.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.training.exact_sum import GRID_BITS, Block, clipped_sum
from cloister_fl.client.training.local_training import trained_part
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network
from cloister_fl.tasks import Task
from cloister_fl.tasks.classification import Classification
from cloister_fl.tasks.segmentation import Segmentation
from support.cohorts import OnePatient
from support.studies import study

Summing: TypeAlias = Callable[
    [nn.Module, Task, Cohort | FeatureCohort, Sequence[Bag], float], Tensor
]
"""From network, task, cohort, bags and clipping norm C to the int64 sum in units of 2^-30 C."""

BOUND = 2**GRID_BITS

TWO = Classification("finding", ("no", "yes"))
THREE = Classification("finding", ("a", "b", "c"))
CLASS_WEIGHTS = (0.37, 1.0, 0.001)
MASKS = Segmentation("lungs")

_TRAINING = study().training
_MARK = 0x1234
"""The first pixel of an image that ``_Fixed`` cannot see."""
_FEATURES = 100
_LEAST = 25
"""Cases that are tried however slow the machine is."""
_MOST_IMAGES = 4_000
"""Images of a case: more take long, and bring nothing new."""


class _Fixed(nn.Module):
    """A network whose first part no training changes, and which fails on some images."""

    fixed = "the least of each row"

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.last = nn.LazyLinear(outputs)

    def features(self, images: Tensor) -> Tensor:
        marks = (images.flatten(1)[:, 0] * 0.25 + 0.5) * 65535
        if bool((marks.round() == _MARK).any()):
            raise MemoryError
        return images.amin(dim=-1).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Form:
    """A network with its task and the shape of its input.

    Attributes:
        name: of the registry; ``linear`` for a head on features, ``fixed`` for a network that
            makes its features by itself.
        side: of the images, in pixels.
        width: the argument of that name; 0 where there is none. Of ``linear``, the features.
        task: what it is trained for.
        depth: slices of a volume; 0 for images.
        patients: the most patients that a case of it takes: a large network is slow.
        images: the most images of a bag.
    """

    name: str
    side: int
    width: int = 0
    task: Task = TWO
    depth: int = 0
    patients: int = 64
    images: int = 16

    def module(self) -> nn.Module:
        if self.name == "linear":
            network = nn.Sequential(nn.Flatten(), nn.Linear(self.width or _FEATURES, 2, bias=False))
            nn.init.zeros_(network[1].weight)
            return network.train()
        if self.name == "fixed":
            head = _Fixed(self.task.outputs)
            head(torch.zeros(1, 1, self.side, self.side))
            return head.train()
        arguments = {"width": self.width} if self.width else {}
        return build(
            Network(name=self.name, arguments=arguments),
            self.task.outputs,
            1,
            size=self.side,
            seed=1,
            depth=self.depth or None,
        )


SMALL = (
    Form("linear", 1, patients=2_000, images=64),
    Form("small-cnn", 16, 4, patients=600),
    Form("fixed", 12, task=THREE, patients=100),
    Form("small-cnn", 33, 8, THREE),
    Form("filter-bank", 32, 8),
    Form("small-cnn-3d", 16, 4, depth=5, patients=20, images=4),
    Form("unet", 16, 4, MASKS, patients=40, images=5),
    Form("small-cnn", 88, 48, patients=20, images=4),
    # An odd number of features: rows of a matrix begin at any multiple of four bytes.
    Form("linear", 1, 101, patients=100, images=8),
)
"""Networks of which many cases can be tried in a minute."""

LARGE = (
    Form("resnet18", 32, patients=6, images=3),
    Form("densenet121", 32, patients=4, images=2),
)
"""Networks that take seconds a case."""

IMAGES = (
    *("noise", "black", "white", "checked", "point", "opposite", "same", "faint", "dim", "near"),
    "climbed",
)
FAILURES = (MemoryError, OSError, ValueError)
"""What reading a patient raises, by how many images there are."""
WEIGHTS = ("first", "zero", "scaled", "turned", "uneven", "climbed", "saturated")
SIZES = ("one", "mixed", "alike", "large", "pairs")


@dataclass(frozen=True)
class Genes:
    """What a case is made of; a seed and these make it again."""

    seed: int
    patients: int
    who: float
    own_images: int
    sizes: str
    own: str
    others: str
    weights: str
    scale: float
    uneven: float
    clip: float
    cancel: bool
    shared: bool
    twin: bool
    fails: float


@dataclass(frozen=True)
class Case:
    """One step, and the patient who is left out of it."""

    module: nn.Module
    task: Task
    cohort: _Given | _Features
    bags: Sequence[Bag]
    who: int
    clip: float

    def summed(self, summed: Summing, places: Sequence[int]) -> Tensor:
        """The sum at a site that has these patients and no others."""
        kept = [self.bags[place].images for place in places]
        rows = np.concatenate(kept) if kept else np.empty(0, np.int64)
        ends = np.cumsum([0, *map(len, kept)])
        bags = [Bag(np.arange(ends[at], ends[at + 1])) for at in range(len(kept))]
        cohort = replace(
            self.cohort,
            images=self.cohort.images[rows],
            targets=self.cohort.targets[rows],
            patients=tuple(OnePatient(0, tuple(bag.images.tolist())) for bag in bags),
            fails=frozenset(
                int(bag.images[0])
                for bag, place in zip(bags, places, strict=True)
                if int(self.bags[place].images[0]) in self.cohort.fails
            ),
        )
        # A copy of its own each time, as a run has: what a network noted of one site's images must
        # not be there for another's.
        return summed(copy.deepcopy(self.module), self.task, cohort, bags, self.clip)


@dataclass(frozen=True)
class _Given:
    images: NDArray[np.uint16]
    patients: tuple[OnePatient, ...]
    targets: NDArray[Any]
    fails: frozenset[int] = frozenset()
    """Places of images whose reading fails."""


@dataclass(frozen=True, eq=False)
class _Features(FeatureCohort):
    fails: frozenset[int] = frozenset()


@dataclass
class Found:
    """What a search found.

    Attributes:
        moved: the largest movement of the sum by one patient, in clipping norms; the bound is 1.
        at: the case that moved it.
        cases: how many were tried.
        changed: cases in which another patient's contribution was not the same to the bit.
        seconds: how long it took.
    """

    moved: float = 0.0
    over: int = 0
    at: str = ""
    cases: int = 0
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def measure(self, case: Case, summed: Summing, told: str) -> float:
        """Leave the patient out, count what that moved, and return how near it came."""
        everyone = range(len(case.bags))
        rest = case.summed(summed, [place for place in everyone if place != case.who])
        alone = case.summed(summed, [case.who])
        return self.count(case.summed(summed, everyone), rest, alone, told)

    def count(self, whole: Tensor, rest: Tensor, alone: Tensor, told: str) -> float:
        """Count a movement; what it is in clipping norms, and what others moved beside it."""
        moved = whole - rest
        exact = square(moved)
        length = math.sqrt(exact) / BOUND
        self.cases += 1
        if exact > BOUND**2:
            self.over += 1
        if length > self.moved:
            self.moved, self.at = length, told
        if not torch.equal(moved, alone):
            self.changed.append(told)
        # Beside the length: what a patient changes in others is where a larger one may be near.
        return length + math.sqrt(square(moved - alone)) / BOUND


class _Reading(PatientGradSampleModule):
    """The shipped engine, where reading some patients fails."""

    def _read(self, cohort: Cohort | FeatureCohort, run: Sequence[Bag]) -> tuple[Tensor, Tensor]:
        fails: frozenset[int] = getattr(cohort, "fails", frozenset())
        if failing := [bag for bag in run if int(bag.images[0]) in fails]:
            raise FAILURES[len(failing[0].images) % len(FAILURES)]
        return super()._read(cohort, run)


def summed_by(engine: Engine) -> Summing:
    """The sum as a shipped engine and the shipped clipping make it."""

    def summed(
        module: nn.Module,
        task: Task,
        cohort: Cohort | FeatureCohort,
        bags: Sequence[Bag],
        clip: float,
    ) -> Tensor:
        seen = cohort
        if isinstance(cohort, _Given):
            module, seen = trained_part(module, cohort, _TRAINING, lambda _: None)
        patients = _Reading(module, task, engine=engine, told=lambda _: None)
        try:
            size = sum(weight.numel() for weight in patients.trained)
            # What a patient's labels make of the contribution: of three classes, three weights.
            weights = CLASS_WEIGHTS if task == THREE else ()
            return clipped_sum(patients.blocks(seen, bags, weights), size, clip)
        finally:
            patients.to_standard_module()

    return summed


def square(total: Tensor) -> int:
    """The squared length of an int64 vector, exactly."""
    if len(total) and int(total.min()) > -(1 << 34) and int(total.max()) < 1 << 34:
        # Of up to 2^24 values: no sum of products of these halves reaches 2^63.
        high, low = total >> 15, total & ((1 << 15) - 1)
        crossed = int((high * low).sum()) << 16
        return (int((high * high).sum()) << 30) + crossed + int((low * low).sum())
    return sum(int(value) ** 2 for value in total.tolist())


def search(
    summed: Summing,
    forms: Sequence[Form],
    *,
    seconds: float = math.inf,
    cases: int | None = None,
    seed: int = 0,
    stop_above: float = math.inf,
) -> Found:
    """Look for the largest movement.

    Args:
        summed: the engine.
        forms: networks to take turns.
        seconds: of the clock, how long to look.
        cases: how many cases to try at most.
        seed: of the search.
        stop_above: a movement, in clipping norms, that is enough.
    """
    rng = random.Random(seed)
    begun = time.monotonic()
    found = Found()
    best: dict[Form, tuple[float, Genes]] = {}
    spent = dict.fromkeys(forms, 0.0)
    while (found.cases < _LEAST or time.monotonic() - begun < seconds) and (
        cases is None or found.cases < cases
    ):
        # Each network gets as much time as any other, so a small one gets many more cases.
        form = min(forms, key=lambda one: spent[one])
        before = best.get(form)
        started = time.thread_time()
        genes = _random(rng, form)
        if before is not None and rng.random() < 0.5:
            genes = _varied(rng, before[1], form)
        score = found.measure(_case(form, genes), summed, f"{form.name} {form.side} px, {genes}")
        if before is None or score >= before[0]:
            best[form] = (score, genes)
        spent[form] += max(time.thread_time() - started, 1e-3)
        if found.moved > stop_above:
            break
    found.seconds = time.monotonic() - begun
    return found


def search_neighbours(
    summed: Summing,
    forms: Sequence[Form],
    *,
    most: int = 1,
    patients: int = 3,
    kinds: Sequence[str] = IMAGES[:-1],
) -> Found:
    """Put a patient of each kind beside others of each kind, one image each, all orders.

    What one patient's images, weights that overflow or a failing image could change in others is
    seen to the bit, though it may move the sum by little.

    Args:
        summed: the engine.
        forms: networks.
        most: images of a patient.
        patients: how many.
        kinds: of images; those that are climbed take long.
    """
    found = Found()
    begun = time.monotonic()
    for form in forms:
        for at, (own, others) in enumerate(itertools.product(kinds, kinds)):
            genes = Genes(
                seed=at,
                patients=patients,
                who=(0.0, 0.5, 1.0)[at % 3],
                own_images=most,
                sizes="alike",
                own=own,
                others=others,
                weights=("first", "scaled")[at // 3 % 2],
                # Where squares overflow in float32, of some patients and not of others.
                scale=10.0,
                uneven=0.0,
                clip=-1.0,
                cancel=False,
                shared=False,
                twin=False,
                fails=(0.0, 0.5)[at % 2],
            )
            found.measure(_case(form, genes), summed, f"{form.name}, {own} beside {others}")
    found.seconds = time.monotonic() - begun
    return found


def _random(rng: random.Random, form: Form) -> Genes:
    numbers = [n for n in (1, 2, 3, 15, 16, 17, 18, 31, 33, 61, 64, 65) if n <= form.patients]
    # Rarely, for it is slow: many.
    if rng.random() < 0.1:
        numbers = [n for n in (511, 512, 513, form.patients) if n <= form.patients]
    return Genes(
        seed=rng.randrange(2**31),
        patients=rng.choice(numbers),
        who=rng.choice((0.0, 0.5, 1.0, rng.random())),
        # Some that fill a pass of their own, some that leave room in it for others.
        own_images=rng.choice((1, 2, 3, min(12, form.images), min(20, form.images), form.images)),
        sizes=rng.choice(SIZES),
        own=rng.choice(IMAGES),
        others=rng.choice((*IMAGES, "opposite", "dim")),
        weights=rng.choice(WEIGHTS),
        scale=rng.choice((0.0, 0.0, rng.uniform(-3, 3), rng.uniform(-25, 25))),
        uneven=rng.choice((0.0, rng.uniform(-20, 20))),
        clip=rng.choice((0.0, -1.0, -2.0, -3.0, rng.uniform(-8, 3))),
        cancel=rng.random() < 0.5,
        shared=rng.random() < 0.5,
        twin=rng.random() < 0.25,
        fails=rng.choice((0.0, 0.0, rng.random() / 2)),
    )


def _varied(rng: random.Random, genes: Genes, form: Form) -> Genes:
    fresh = _random(rng, form)
    names = rng.sample(list(Genes.__dataclass_fields__), rng.choice((1, 1, 2, 3)))
    changed = {name: getattr(fresh, name) for name in names}
    if rng.random() < 0.3:
        changed["scale"] = genes.scale + rng.gauss(0, 1)
        changed["clip"] = genes.clip + rng.gauss(0, 0.5)
    return replace(genes, **changed)


def _case(form: Form, genes: Genes) -> Case:
    rng = np.random.default_rng(genes.seed)
    sizes = _sizes(form, genes, rng)
    who = min(len(sizes) - 1, int(genes.who * len(sizes)))
    ends = np.cumsum([0, *sizes])
    bags = [Bag(np.arange(ends[i], ends[i + 1])) for i in range(len(sizes))]
    module = form.module()
    kinds = [genes.own if place == who else genes.others for place in range(len(sizes))]
    blocks = [_pixels(form, kind, size, rng) for kind, size in zip(kinds, sizes, strict=True)]
    targets = _targets(form, blocks, rng)
    if genes.shared:
        # Others who are alike add up in one direction.
        first = {size: place for place, size in reversed(list(enumerate(sizes))) if place != who}
        for place, size in enumerate(sizes):
            if place != who and first[size] != place:
                blocks[place] = blocks[first[size]]
                start = ends[first[size]]
                targets[ends[place] : ends[place + 1]] = targets[start : start + size]
    if genes.twin and len(sizes) > 1 and form.task is not MASKS:
        # Others have the images of the one who is left out, and other labels.
        own = slice(ends[who], ends[who + 1])
        for place in (at for at, size in enumerate(sizes) if size == sizes[who] and at != who):
            blocks[place] = blocks[who]
            targets[ends[place] : ends[place + 1]] = (targets[own] + 1) % form.task.outputs
    if genes.others == "near":
        # All but one pixel is that of the one who is left out: nearly is not the same.
        for place in (at for at, size in enumerate(sizes) if size == sizes[who] and at != who):
            blocks[place] = blocks[who].copy()
            pixel = blocks[place].reshape(sizes[who], -1)[:, 1]
            pixel[:] = 1 - pixel
    _weigh(module, form, genes, blocks[0], targets[: sizes[0]])
    if "climbed" in (genes.own, genes.others):
        for place, kind in enumerate(kinds):
            if kind == "climbed" and (place in (0, who) or kinds[place] != genes.others):
                own = targets[ends[place] : ends[place + 1]]
                blocks[place] = _climbed(module, form, blocks[place], own, cancel=genes.cancel)
    images = np.concatenate(blocks)
    patients = tuple(OnePatient(0, tuple(bag.images.tolist())) for bag in bags)
    broken = rng.random(len(bags)) < genes.fails
    # The one who is left out may fail as well; the sum then is the same without.
    fails = frozenset(int(bag.images[0]) for bag, one in zip(bags, broken, strict=True) if one)
    if form.name == "linear":
        cohort: _Given | _Features = _Features(images, patients, targets, fails)
    elif form.name == "fixed":
        # Here it is an image that fails, before any pass.
        cohort = _Given(np.rint(images * 65535).astype(np.uint16), patients, targets)
        cohort.images[sorted(fails), 0, 0] = _MARK
    else:
        cohort = _Given(np.rint(images * 65535).astype(np.uint16), patients, targets, fails)
    norm = _norm(module, form, blocks[who], targets[ends[who] : ends[who + 1]])
    usual = norm if math.isfinite(norm) and norm > 0 else 1.0
    clip = min(max(usual * 10.0**genes.clip, 1e-12), 1e6)
    # With these weights, and nothing that it noted of the images above.
    fresh = form.module()
    fresh.load_state_dict(module.state_dict())
    return Case(fresh, form.task, cohort, bags, who, clip)


def _sizes(form: Form, genes: Genes, rng: np.random.Generator) -> list[int]:
    most = form.images if genes.patients <= 64 else min(form.images, 4)
    count = genes.patients
    each = {
        "one": np.ones(count, int),
        "mixed": rng.integers(1, most + 1, count),
        "alike": np.full(count, min(genes.own_images, most)),
        "large": np.full(count, most),
        "pairs": np.full(count, min(2, most)),
    }[genes.sizes].tolist()
    while count > 2 and sum(each) > _MOST_IMAGES:
        count = count // 2 + 1
        each = each[:count]
    each[min(count - 1, int(genes.who * count))] = min(genes.own_images, form.images)
    return each


def _shape(form: Form) -> tuple[int, ...]:
    if form.name == "linear":
        return (form.width or _FEATURES, 1, 1)
    return (form.depth, form.side, form.side) if form.depth else (form.side, form.side)


def _pixels(form: Form, kind: str, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Images of one patient, from 0 to 1; features, any number."""
    shape = (size, *_shape(form))
    plain: NDArray[np.float64] = rng.random(shape)
    if form.name == "linear":
        plain = rng.normal(size=shape)
        plain /= np.linalg.norm(plain[0])
    if kind in {"black", "white"}:
        plain = np.full(shape, float(kind == "white"))
    elif kind == "checked":
        plain = (np.indices(shape).sum(axis=0) % 2).astype(np.float64)
    elif kind == "point":
        plain = np.zeros(shape)
        plain.reshape(size, -1)[:, rng.integers(plain[0].size)] = 1
    elif kind == "opposite":
        # Images whose gradients nearly cancel.
        turned = -plain[:1] if form.name == "linear" else 1 - plain[:1]
        near = 1 - 10.0 ** -rng.uniform(1, 7)
        plain = np.stack([plain[0] if at % 2 == 0 else turned[0] * near for at in range(size)])
    elif kind == "same":
        plain = np.repeat(plain[:1], size, axis=0)
    elif kind == "faint":
        plain = 0.5 + (plain - 0.5) * 1e-4
    elif kind == "dim":
        # As 12 bits in 16 that nobody scaled.
        plain = plain / 16
    return plain.astype(np.float32)


def _targets(
    form: Form, blocks: Sequence[NDArray[np.float32]], rng: np.random.Generator
) -> NDArray[Any]:
    if form.task is MASKS:
        masks = [(block > rng.choice((0.2, 0.5, 2.0))).astype(np.uint8) for block in blocks]
        return np.concatenate(masks)
    labels = rng.integers(0, form.task.outputs, len(blocks))
    if rng.random() < 0.3:
        labels[:] = 0
    each = [np.full(len(block), label) for label, block in zip(labels, blocks, strict=True)]
    return np.concatenate(each).astype(np.int64)


def _weigh(
    module: nn.Module,
    form: Form,
    genes: Genes,
    block: NDArray[np.float32],
    targets: NDArray[Any],
) -> None:
    """Give the network weights that a coordinator may send: finite, else anything."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(genes.seed)
    with torch.no_grad():
        for place, weight in enumerate(weights):
            if genes.weights == "zero":
                weight.zero_()
            elif genes.weights == "turned":
                weight.neg_()
            elif genes.weights == "saturated":
                weight.mul_(30)
            elif genes.weights == "uneven":
                # Up in one layer, down in the next: what overflows in one is lost in the other.
                weight.mul_(10.0 ** (genes.uneven if place % 2 else -genes.uneven))
            elif genes.weights == "scaled":
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
            if genes.weights not in {"first", "zero", "climbed"}:
                weight.mul_(10.0**genes.scale)
            weight.nan_to_num_(nan=0.0)
            weight.clamp_(-3e38, 3e38)
    if genes.weights == "climbed":
        pixels = _as_network(form, block)
        for _ in range(3):
            height = _height(module, form, pixels, targets, cancel=genes.cancel)
            rises = torch.autograd.grad(height, weights, allow_unused=True)
            with torch.no_grad():
                for weight, rise in zip(weights, rises, strict=True):
                    if rise is not None and bool(rise.isfinite().all()) and bool(rise.any()):
                        weight.add_(rise, alpha=float(weight.norm().clamp_min(0.1) / rise.norm()))


def _as_network(form: Form, block: NDArray[np.float32]) -> Tensor:
    pixels = torch.from_numpy(block.copy())
    return pixels if form.name == "linear" else ((pixels - 0.5) / 0.25).unsqueeze(1)


def _gradients(
    module: nn.Module, form: Form, pixels: Tensor, targets: NDArray[Any], *, each: bool
) -> list[Tensor]:
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    wanted = form.task.tensor(targets, lambda images: images)
    losses = form.task.losses(module(pixels), wanted)
    rows = []
    for loss in losses if each else [losses.mean()]:
        parts = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts if part is not None]))
    return rows


def _height(
    module: nn.Module, form: Form, pixels: Tensor, targets: NDArray[Any], *, cancel: bool
) -> Tensor:
    """What is climbed: how long a patient's gradient is, or how much of it cancels."""
    (whole,) = _gradients(module, form, pixels, targets, each=False)
    length = whole.square().sum().add(1e-30).log()
    if not cancel or len(pixels) == 1:
        return length
    rows = _gradients(module, form, pixels[:4], targets[:4], each=True)
    lengths = torch.stack([row.square().sum() for row in rows]).sum()
    return lengths.add(1e-30).log() - length


def _climbed(
    module: nn.Module,
    form: Form,
    block: NDArray[np.float32],
    targets: NDArray[Any],
    *,
    cancel: bool,
) -> NDArray[np.float32]:
    pixels = torch.from_numpy(block.copy()).requires_grad_()
    for _ in range(4):
        given = pixels if form.name == "linear" else ((pixels - 0.5) / 0.25).unsqueeze(1)
        height = _height(module, form, given, targets, cancel=cancel)
        (rise,) = torch.autograd.grad(height, pixels, allow_unused=True)
        if rise is None or not bool(rise.isfinite().all()) or not bool(rise.any()):
            break
        with torch.no_grad():
            # By the sign: as for adversarial examples (Goodfellow et al. 2015).
            pixels.add_(rise.sign(), alpha=0.2)
            if form.name != "linear":
                pixels.clamp_(0, 1)
    result: NDArray[np.float32] = pixels.detach().numpy()
    return result


def _norm(
    module: nn.Module, form: Form, block: NDArray[np.float32], targets: NDArray[Any]
) -> float:
    (row,) = _gradients(module, form, _as_network(form, block), targets, each=False)
    return float(row.detach().double().norm())


def search_sums(
    summed: Callable[[Sequence[Block], int, float], Tensor], *, seconds: float, seed: int = 0
) -> Found:
    """Look for the largest movement of the sum itself, by gradients that no network need have.

    Long and short ones, whose length lies in one value or in many tiny ones behind a large one, or
    differs from piece to piece; many that point the same way; infinities and what is no number; as
    rows of one block, and each as parts.

    Args:
        summed: ``clipped_sum`` or what is in its place.
        seconds: of the clock.
        seed: of the search.
    """
    rng = np.random.default_rng(seed)
    begun = time.monotonic()
    found = Found()
    for own, others in itertools.product(ROWS, ROWS):
        # First each kind before others of each kind, in one running sum.
        rows = [_row(kind, 1_003, 1.0, rng) for kind in (own, others, others, others)]
        whole, rest, alone = (
            summed([torch.stack(some)], 1_003, 1.0) for some in (rows, rows[1:], rows[:1])
        )
        found.count(whole, rest, alone, f"{own} before {others}")
    while found.cases < _LEAST or time.monotonic() - begun < seconds:
        size = int(rng.choice((1, 7, 1_003, 8_400, 70_001, *[2**18 + 70] * 2, 3 * 2**18)))
        count = int(rng.integers(1, 9 if size > 10_000 else 40))
        clip = float(10.0 ** rng.uniform(-4, 3))
        kinds = rng.choice(ROWS, count)
        alike = bool(rng.random() < 0.5)
        kinds[:] = kinds[0] if alike else kinds
        rows = [_row(str(kind), size, clip, rng) for kind in kinds]
        if alike:
            rows = [rows[0]] * count
        blocks = [_as_block(row, rng) for row in rows]
        who = int(rng.integers(count))
        whole = summed(blocks, size, clip)
        rest = summed(blocks[:who] + blocks[who + 1 :], size, clip)
        alone = summed([blocks[who]], size, clip)
        told = f"{size} values, {count} rows, clip {clip:g}, {kinds[who]}"
        found.count(whole, rest, alone, told)
    found.seconds = time.monotonic() - begun
    return found


ROWS = (
    *("plain", "spike", "spikes", "spikes", "tail", "uneven", "infinite", "none", "huge", "tiny"),
)


def _row(kind: str, size: int, clip: float, rng: np.random.Generator) -> Tensor:
    row = rng.normal(size=size) * clip
    if kind == "spike":
        row[:] = 0
        row[rng.integers(size)] = clip * 4 * rng.choice((-1, 1))
    elif kind == "spikes":
        # One at each end, so in two pieces of a long row; alike they add up beyond 32 bits.
        row[:] = 0
        row[0], row[-1] = clip * rng.uniform(0.2, 1, 2)
    elif kind == "tail":
        # A large value, then many that a float32 sum of squares would lose one by one.
        row[:] = clip * 10.0 ** rng.uniform(-4.5, -3)
        row[0] = clip
    elif kind == "uneven":
        # The first half carries nearly all of it.
        row[size // 2 :] *= 10.0 ** rng.uniform(-3, 0)
        row = np.abs(row)
    elif kind in {"infinite", "none"}:
        bad = (math.inf, -math.inf) if kind == "infinite" else (math.nan,)
        row[rng.integers(size, size=rng.integers(1, 4))] = rng.choice(bad)
    elif kind == "huge":
        row *= 1e30
    elif kind == "tiny":
        row *= 1e-30
    with np.errstate(over="ignore"):
        return torch.from_numpy(row.astype(np.float32))


def _as_block(row: Tensor, rng: np.random.Generator) -> Block:
    if rng.random() < 0.5:
        return row[None]
    cut = int(rng.integers(len(row) + 1))
    return [part for part in (row[:cut], row[cut:]) if len(part)]
