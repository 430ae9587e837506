"""Book-keeping: every network of the registry, bags of 1 to 5 images, and when it gives way.

Comparisons to 1e-6 run in float64 modules: in float32 the rounding of a deep network alone is
1e-5. What float32 adds is tested against the bound that is charged for it.
"""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.training import ghost_clipping, per_patient_gradients
from cloister_fl.client.training.exact_sum import GRID_BITS, Clipped, clipped_sum, squares_at_most
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag, FeatureCohort
from cloister_fl.errors import InternalError
from cloister_fl.networks.registry import REGISTRY, build
from cloister_fl.study.schema import Network
from cloister_fl.tasks import Task
from cloister_fl.tasks.segmentation import Segmentation
from support.cohorts import TASK, OnePatient, every_bag, patients_of, targets_by

UNIT = 2**GRID_BITS
SIZES = (2, 1, 5, 3, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_patient_gradients, "_tried", {})


def cohort_of(
    sizes: tuple[int, ...],
    side: int,
    dtype: str = "float64",
    seed: int = 0,
    depth: tuple[int, ...] = (),
) -> tuple[FeatureCohort, list[Bag]]:
    pixels = (
        np.random.default_rng(seed).normal(size=(sum(sizes), 1, *depth, side, side)).astype(dtype)
    )
    patients = patients_of(sizes)
    cohort = FeatureCohort(pixels, patients, targets_by(patients))
    return cohort, every_bag(cohort)


MASKS = Segmentation("lungs")


def task_of(cohort: FeatureCohort) -> Task:
    return MASKS if cohort.targets.ndim > 1 else TASK


def segmented(cohort: FeatureCohort) -> FeatureCohort:
    """The same cohort with a mask each, one of them empty."""
    masks = (cohort.images[:, 0] > 0.5).astype(np.uint8)
    masks[1] = 0
    return FeatureCohort(cohort.images, cohort.patients, masks)


def mask_loss(logits: Tensor, masks: NDArray[np.uint8]) -> Tensor:
    """Cross entropy of each pixel and soft Dice, written out, of one patient."""
    total = torch.zeros((), dtype=torch.float64)
    for row, mask in zip(logits[:, 0], torch.from_numpy(masks.astype(np.float64)), strict=True):
        chance = 1 / (1 + torch.exp(-row))
        crossed = -(mask * torch.log(chance) + (1 - mask) * torch.log(1 - chance)).mean()
        dice = (2 * (chance * mask).sum() + 1) / (chance.sum() + mask.sum() + 1)
        total = total + crossed + 1 - dice
    return total / len(masks)


def loop(module: nn.Module, cohort: FeatureCohort, bags: list[Bag]) -> Tensor:
    """Gradients by the definition, float64 (patients, parameters)."""
    precise = copy.deepcopy(module).double()
    weights = [weight for weight in precise.parameters() if weight.requires_grad]
    rows = []
    for bag in bags:
        images = torch.from_numpy(cohort.images[bag.images]).double()
        if cohort.targets.ndim > 1:
            loss = mask_loss(precise(images), cohort.targets[bag.images])
        else:
            loss = F.cross_entropy(precise(images), torch.from_numpy(cohort.targets[bag.images]))
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def by_books(module: nn.Module, cohort: FeatureCohort, clip: float) -> PatientGradSampleModule:
    return PatientGradSampleModule(
        module, task_of(cohort), engine="book-keeping", clipping_norm=clip
    )


def book_sum(module: nn.Module, cohort: FeatureCohort, bags: list[Bag], clip: float) -> Tensor:
    """The float sum of what the engine yields, which must come from book-keeping."""
    patients = PatientGradSampleModule(
        module, task_of(cohort), engine="book-keeping", clipping_norm=clip
    )
    blocks = list(patients.blocks(cohort, bags))
    patients.to_standard_module()
    assert blocks
    assert all(isinstance(block, Clipped) for block in blocks)
    return sum(per_patient_gradients._flat(block)[0].double() for block in blocks)  # type: ignore[return-value]


def close(one: Tensor, other: Tensor, limit: float = 1e-6) -> bool:
    return bool((one.double() - other).norm() <= limit * other.norm()) and bool(other.norm() > 0)


# Of a frozen backbone only a linear head is trained, on features in single precision.
TRAINED = [name for name in REGISTRY if name not in {"efficientnet-lite0", "frozen-backbone"}]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in {"resnet18", "densenet121"} else ())
        for name in TRAINED
    ],
)
def test_every_network_equals_the_float64_loop_in_each_mode(name: str) -> None:
    side = REGISTRY[name].smallest
    depth = (5,) if REGISTRY[name].dimensions == 3 else ()
    outputs = 1 if REGISTRY[name].answers == "pixel" else 2
    network = Network(name=name)
    module = build(network, outputs, 1, size=side, seed=1, depth=5 if depth else None).double()
    cohort, bags = cohort_of(SIZES, side, depth=depth)
    if REGISTRY[name].answers == "pixel":
        cohort = segmented(cohort)
    exact = loop(module, cohort, bags)
    modes: tuple[Engine, ...] = ("patients", "opacus")
    for engine in modes:
        patients = PatientGradSampleModule(module, task_of(cohort), engine=engine)
        patients.fill_grad_samples(cohort, bags)
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        rows = torch.cat([w.grad_sample.flatten(1) for w in weights], dim=1)  # type: ignore[attr-defined]
        patients.to_standard_module()
        for row, wanted in zip(rows, exact, strict=True):
            assert close(row, wanted), engine
    # Patient by patient, then clipped: each to the same norm, all of them, some of them.
    for index in range(len(bags)):
        assert close(book_sum(module, cohort, bags[index : index + 1], 1e20), exact[index])
    norms = exact.norm(dim=1)
    for clip in (1e20, float(norms.median()), float(norms.min()) / 3):
        factors = (clip / (1 + ghost_clipping.ETA) / norms).clamp_max(1.0)
        assert close(book_sum(module, cohort, bags, clip), factors @ exact)


def test_a_head_on_features_equals_the_float64_loop_in_each_mode() -> None:
    cohort, bags = cohort_of(SIZES, 16)
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).double()
    exact = loop(module, cohort, bags)
    for engine in ("patients", "opacus"):
        patients = PatientGradSampleModule(module, task_of(cohort), engine=engine)
        patients.fill_grad_samples(cohort, bags)
        weights = list(module.parameters())
        rows = torch.cat([w.grad_sample.flatten(1) for w in weights], dim=1)  # type: ignore[attr-defined]
        patients.to_standard_module()
        for row, wanted in zip(rows, exact, strict=True):
            assert close(row, wanted), engine
    assert close(book_sum(module, cohort, bags, 1e20), exact.sum(dim=0))


@pytest.mark.slow
def test_both_ways_of_a_layer_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(Network(name="resnet18"), 2, 1, size=64, seed=1).double()
    cohort, bags = cohort_of((2, 1), 64)
    seen = []
    honest = ghost_clipping._by_ghost
    monkeypatch.setattr(
        ghost_clipping, "_by_ghost", lambda *given: seen.append(honest(*given)) or seen[-1]
    )
    book_sum(module, cohort, bags, 1.0)
    assert set(seen) == {True, False}
    norms = loop(module, cohort, bags).norm(dim=1)
    clip = float(norms.min()) / 2
    wanted = (clip / (1 + ghost_clipping.ETA) / norms) @ loop(module, cohort, bags)
    # Where a layer has many places, its terms cancel more than the cap allows.
    monkeypatch.setattr(ghost_clipping, "_CANCELLING", math.inf)
    for always in (True, False):
        monkeypatch.setattr(
            ghost_clipping, "_by_ghost",
            lambda each, _: always and isinstance(each.layer, nn.Conv2d | nn.Linear),  # noqa: B023
        )  # fmt: skip
        assert close(book_sum(module, cohort, bags, clip), wanted)


def tiny() -> nn.Module:
    return build(Network(arguments={"width": 4}), 2, 1, size=16, seed=3)


@pytest.mark.parametrize("kind", ["many", "one", "extreme", "broken"])
def test_a_patient_moves_the_step_by_at_most_c(kind: str) -> None:
    """From pixels to the integer sum: add a patient anywhere among 40 others, float32."""
    sizes = tuple(1 + index % 3 for index in range(40))
    cohort, bags = cohort_of(sizes, 16, "float32")
    added = {
        "many": np.random.default_rng(5).normal(size=(30, 1, 16, 16)),
        "one": np.full((1, 1, 16, 16), -2.0),
        "extreme": 1e4 * (np.indices((1, 1, 16, 16)).sum(axis=0) % 2),
        "broken": np.full((2, 1, 16, 16), math.nan),
    }[kind].astype(np.float32)
    images = np.concatenate([cohort.images, added])
    bag = Bag(np.arange(len(cohort.images), len(images)))
    wide = FeatureCohort(
        images,
        cohort.patients,
        np.append(cohort.targets, [1] * len(added)),
    )
    module, clip = tiny(), 1e-3
    patients = PatientGradSampleModule(
        module, task_of(cohort), engine="book-keeping", clipping_norm=clip
    )
    size = sum(weight.numel() for weight in module.parameters())
    without = clipped_sum(patients.blocks(wide, bags), size, clip)
    for place in (0, 17, 40):
        others = [*bags[:place], bag, *bags[place:]]
        moved = clipped_sum(patients.blocks(wide, others), size, clip) - without
        square = sum(int(value) ** 2 for value in moved.tolist())
        if kind == "broken":
            # Zero for itself; it shifts who is grouped with whom, and rounding follows.
            assert square < (UNIT * 1e-4) ** 2
        else:
            assert (UNIT * 0.9) ** 2 < square <= UNIT**2


@pytest.mark.slow
def test_rounding_is_far_below_what_is_charged_for_it() -> None:
    """ResNet-18 in float32: what one of 40 patients adds to the sum, against what it is alone."""
    module = build(Network(name="resnet18"), 2, 1, size=32, seed=1)
    cohort, bags = cohort_of((1,) * 40, 32, "float32")
    clip = float(loop(module, cohort, bags[:3]).norm(dim=1).min()) / 4
    limit = clip / (1 + ghost_clipping.ETA)
    whole = book_sum(module, cohort, bags, clip)
    for index in (0, 20):
        moved = whole - book_sum(module, cohort, bags[:index] + bags[index + 1 :], clip)
        alone = book_sum(module, cohort, bags[index : index + 1], clip)
        assert float(alone.norm()) == pytest.approx(limit, rel=1e-5)
        assert 0 < float((moved - alone).norm()) < limit * ghost_clipping.ETA / 100


@pytest.mark.slow
def test_runs_side_by_side_keep_their_books_apart() -> None:
    """Threads go through one network at once: what a hook notes is its own thread's."""
    module = build(Network(name="resnet18"), 2, 1, size=32, seed=1)
    cohort, bags = cohort_of((1,) * 96, 32, "float32")
    clip = float(loop(module, cohort, bags[:3]).norm(dim=1).min()) / 4
    alone = book_sum(module, cohort, bags, clip)
    torch.set_num_threads(3)
    assert close(book_sum(module, cohort, bags, clip), alone, 1e-6)


@given(
    st.integers(1, 200),
    st.lists(st.sampled_from((1.0, 0.1, 3e-20, 7e18, 1e30, 0.0)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_squared_norms_are_bounds_and_close_ones(size: int, scales: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=size) * random.choice(scales, size)
    rows = torch.tensor(np.stack([values, values]), dtype=torch.float32)
    exact = sum(Fraction(value) ** 2 for value in rows[0].tolist())
    # What float32 loses to underflow is added for every 64 values.
    most = float(exact) * (1 + 2.0**-16) + size * 2.0**-125
    for square in squares_at_most(rows).tolist():
        assert float(exact) * (1 - 2.0**-40) <= square <= most
    assert torch.equal(squares_at_most(rows.double()), rows.double().norm(dim=1).square())


def test_the_sum_is_on_the_grid() -> None:
    cohort, bags = cohort_of(SIZES, 16, "float32")
    module, clip = tiny(), 0.25
    patients = PatientGradSampleModule(
        module, task_of(cohort), engine="book-keeping", clipping_norm=clip
    )
    size = sum(weight.numel() for weight in module.parameters())
    total = clipped_sum(patients.blocks(cohort, bags), size, clip)
    assert total.dtype == torch.int64
    # One group: truncated toward zero, once.
    wanted = book_sum(module, cohort, bags, clip) * (UNIT / clip)
    assert torch.equal(total.double(), wanted.trunc())


class Broken(nn.Module):
    """Not finite for an image whose first pixel is 9; else a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        # Wide enough for a ghost norm of the last layer; the first one is kept.
        self.layer = nn.Conv2d(1, 64, 3)
        self.last = nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        shift = torch.where(images[:, 0, 0, 0] == 9, math.inf, 0.0)
        result: Tensor = self.last(self.layer(images).mean(dim=(2, 3))) + shift[:, None]
        return result


def test_a_patient_without_finite_gradient_counts_as_zero_and_spoils_no_other() -> None:
    cohort, bags = cohort_of(SIZES, 8)
    images: NDArray[np.float64] = cohort.images.astype(np.float64)
    images[bags[2].images[1], 0, 0, 0] = 9
    images[bags[4].images] = math.nan
    module = Broken().double()
    spoilt = FeatureCohort(images, cohort.patients, cohort.targets)  # type: ignore[arg-type]
    sound = [bags[0], bags[1], bags[3]]
    wanted = loop(module, cohort, sound).sum(dim=0)
    assert close(book_sum(module, spoilt, bags, 1e20), wanted)
    assert not book_sum(module, spoilt, [bags[4]], 1e20).any()


class Twice(nn.Module):
    """Runs one layer two times: its gradient is the sum of both, which no rule here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.last = nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(self.layer(images)).flatten(1))
        return result


class Behind(nn.Module):
    """Uses a layer's weight behind its back, too: only the trial can notice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.last = nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(images) + F.conv2d(images, self.layer.weight, padding=1)
        result: Tensor = self.last(maps.flatten(1))
        return result


def unknown_layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(), nn.Flatten(), nn.Linear(72, 2))


@pytest.mark.parametrize("make", [Twice, Behind, unknown_layer])
def test_what_has_no_rule_goes_from_patient_to_patient(make: type[nn.Module]) -> None:
    cohort, bags = cohort_of(SIZES, 8)
    module = make().double()
    clip = 0.5
    size = sum(weight.numel() for weight in module.parameters())
    sums = [
        clipped_sum(
            PatientGradSampleModule(
                module, task_of(cohort), engine=engine, clipping_norm=clip
            ).blocks(cohort, bags),
            size,
            clip,
        )
        for engine in ("book-keeping", "patients")
    ]
    assert torch.equal(*sums)
    assert sums[0].any()


def test_patients_beyond_the_account_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, bags = cohort_of(SIZES, 16)
    module = tiny().double()
    exact = loop(module, cohort, bags)
    norms = exact.norm(dim=1)
    clip = float(norms.median())
    monkeypatch.setattr(ghost_clipping, "MOST", 2)
    factors = (clip / (1 + ghost_clipping.ETA) / norms).clamp_max(1.0)
    assert close(book_sum(module, cohort, bags, clip), factors @ exact)


def test_one_patient_can_move_the_sum_by_many_times_the_clipping_norm() -> None:
    """Why a study with privacy may not name this engine (``cloister_fl.study.gradient_engines``).

    24 patients of two images whose gradients nearly cancel are scaled down where the layer's norm
    is a ghost norm. One patient of 16 images, of gradient zero, has the layer kept for all of
    them, and each of the 24 then counts with the whole clipping norm.
    """
    clip, each = 1e-5, np.random.default_rng(0).normal(size=100)
    each /= np.linalg.norm(each)
    rows = [np.zeros((16, 100)), *[[each, -each * (1 - 2e-3)] for _ in range(24)]]
    features = np.concatenate(rows).astype(np.float32).reshape(-1, 100, 1, 1)
    ends = np.cumsum([0, *(len(row) for row in rows)])
    bags = [Bag(np.arange(start, end)) for start, end in pairwise(ends)]
    cohort = FeatureCohort(
        features,
        [OnePatient(0, tuple(bag.images)) for bag in bags],
        np.zeros(len(features), np.int64),
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(100, 2, bias=False)).train()
    nn.init.zeros_(network[1].weight)
    sums = []
    for engine in ("book-keeping", "patients"):
        patients = PatientGradSampleModule(network, TASK, engine=engine, clipping_norm=clip)
        whole, rest = (
            clipped_sum(patients.blocks(cohort, some), 200, clip) for some in (bags, bags[1:])
        )
        patients.to_standard_module()
        sums.append(float((whole - rest).double().norm()) / UNIT)
    assert sums[0] > 20
    assert sums[1] <= 1


def test_it_needs_the_clipping_norm() -> None:
    cohort, bags = cohort_of((1,), 16, "float32")
    with pytest.raises(InternalError, match="clipping norm"):
        list(PatientGradSampleModule(tiny(), TASK, engine="book-keeping").blocks(cohort, bags))
