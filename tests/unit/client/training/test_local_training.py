"""The privatised step: sensitivity, engines, noise, sampling, and what a round returns."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.training import csprng, local_training, per_patient_gradients
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.dp_optimizer import PatientDPOptimizer
from cloister_fl.client.training.exact_sum import GRID_BITS, Block, clipped_sum
from cloister_fl.client.training.local_training import train_round
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.client.training.sampling import (
    Bag,
    Cohort,
    FeatureCohort,
    SeededRandom,
    chunks,
    draw_bags,
    pixels_of,
)
from cloister_fl.errors import InternalError, UpdateInvalid
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network, Study
from support import studies
from support.cohorts import TASK, OnePatient, Patients, cohort_of, every_bag, targets_by
from support.federations import with_engine

ENGINES: tuple[Engine, ...] = ("patients", "opacus")
pytestmark = pytest.mark.usefixtures("one_thread")
UNIT = 2**GRID_BITS


def small(seed: int = 0, width: int = 4) -> nn.Module:
    return build(Network(arguments={"width": width}), 2, 1, size=16, seed=seed)


def study_of(training: str = "", privacy: str = "", aggregation: str = "") -> Study:
    return studies.study(training=training, privacy=privacy, aggregation=aggregation)


def exact_norm(total: Tensor) -> int:
    """Square of the norm, in whole numbers: no rounding can hide an excess."""
    return sum(int(value) ** 2 for value in total.tolist())


# Sensitivity of the clipped sum.


def nasty_rows(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(6, size, generator=generator)
    rows[1] *= 1e-20
    rows[2] *= 1e30
    rows[3] /= rows[3].norm()
    rows[4] = 3.4e38
    rows[5] = torch.finfo(torch.float32).tiny / 8
    broken = [rows[0].clone() for _ in range(3)]
    for row, value in zip(broken, (math.nan, math.inf, -math.inf), strict=True):
        row[size // 2] = value
    return [*rows, torch.zeros(size), *broken]


@pytest.mark.parametrize("clip", [1.0, 0.1, 3.7e-5, 812.5])
def test_one_gradient_moves_the_sum_by_at_most_c(clip: float) -> None:
    size = 1_003
    for row in nasty_rows(size):
        alone = clipped_sum([row[None]], size, clip)
        assert exact_norm(alone) <= UNIT**2
        if not torch.isfinite(row).all():
            assert not alone.any()
        elif float(row.double().norm()) > clip:
            assert exact_norm(alone) > (UNIT * (1 - 5e-6)) ** 2


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=9
    ),
    clip=st.floats(1e-6, 1e6),
)
def test_any_gradient_moves_the_sum_by_at_most_c(values: list[float], clip: float) -> None:
    row = torch.tensor(values, dtype=torch.float32)
    assert exact_norm(clipped_sum([row[None]], len(values), clip)) <= UNIT**2


def test_sum_is_exact_and_does_not_know_order_or_blocks() -> None:
    size = 70_001
    rows = torch.randn(40, size, generator=torch.Generator().manual_seed(1))
    whole = clipped_sum([rows], size, 0.5)
    assert torch.equal(clipped_sum(rows.flip(0).split(7), size, 0.5), whole)
    for left_out in (0, 17, 39):
        rest = torch.cat([rows[:left_out], rows[left_out + 1 :]])
        moved = whole - clipped_sum([rest], size, 0.5)
        assert torch.equal(moved, clipped_sum([rows[left_out : left_out + 1]], size, 0.5))


def test_one_gradient_in_parts_counts_as_a_row() -> None:
    rows = torch.randn(9, 70_001, generator=torch.Generator().manual_seed(2))
    rows[3, 5] = 1e3
    parts = [list(torch.split(row, [7, 69_990, 4])) for row in rows[:6]]
    whole = clipped_sum([rows], 70_001, 0.5)
    mixed = clipped_sum([*parts, rows[6:]], 70_001, 0.5)
    # The norm is added up in another order, so the factor may differ in its last bit.
    assert int((mixed - whole).abs().max()) < UNIT * 1e-6
    assert torch.equal(
        clipped_sum([*parts[:3], rows[6:]], 70_001, 0.5),
        clipped_sum([rows[6:], *parts[:3]], 70_001, 0.5),
    )


@pytest.mark.parametrize(("size", "place"), [(5, 2), (2**18 + 70, 2**18 + 69), (3 * 2**18, 2**18)])
def test_a_sum_beyond_32_bits_is_exact(size: int, place: int) -> None:
    row = torch.zeros(1, size)
    row[0, place] = -4.0
    alone = clipped_sum([row], size, 4.0)
    assert UNIT * (1 - 5e-6) < -int(alone[place]) <= UNIT
    assert torch.equal(clipped_sum([row] * 50, size, 4.0), 50 * alone)


def test_small_gradients_are_not_scaled() -> None:
    row = torch.tensor([[0.25, -0.5, 0.0]])
    assert clipped_sum([row], 3, 1.0).tolist() == [UNIT // 4, -UNIT // 2, 0]
    assert clipped_sum([torch.tensor([[-1e-10, 1e-10]])], 2, 1.0).tolist() == [0, 0]


def test_a_block_of_another_shape_is_refused() -> None:
    with pytest.raises(InternalError):
        clipped_sum([torch.zeros(2, 3)], 4, 1.0)


@pytest.mark.parametrize("kind", ["many", "one", "extreme", "spread"])
def test_a_patient_moves_the_whole_step_by_at_most_c(kind: str) -> None:
    """From pixels to the integer sum: add a patient anywhere among 20 others."""
    counts = [1 + index % 3 for index in range(20)]
    others = cohort_of(counts)
    count = 30 if kind == "many" else 1
    pixels = {
        "many": np.random.default_rng(5).integers(0, 65536, (30, 16, 16)),
        "one": np.zeros((1, 16, 16)),
        "extreme": np.indices((16, 16)).sum(axis=0)[None] % 2 * 65535,
        "spread": np.where(np.arange(256) == 7, 65535, 0).reshape(1, 16, 16),
    }[kind].astype(np.uint16)
    network = small(seed=3)
    engine = PatientGradSampleModule(network, TASK, engine="patients")
    size = len(flatten(network))
    images = np.concatenate([others.images, pixels])
    added = OnePatient(1, tuple(range(len(others.images), len(others.images) + count)))
    without = clipped_sum(engine.blocks(others, every_bag(others)), size, 1e-3)
    for place in (0, 9, 20):
        patients = [*others.patients]
        patients.insert(place, added)
        cohort = Patients(images, tuple(patients))
        with_it = clipped_sum(engine.blocks(cohort, every_bag(cohort)), size, 1e-3)
        assert 0 < exact_norm(with_it - without) <= UNIT**2


@pytest.mark.parametrize("removed", range(6))
def test_any_patient_may_go_and_the_step_moves_by_at_most_c(removed: int) -> None:
    """Patients of 1 to 30 images, among them one of black and one of white and black squares."""
    cohort = cohort_of([1, 2, 3, 5, 12, 30])
    cohort.images[1:3] = 0
    cohort.images[6:11] = np.indices((16, 16)).sum(axis=0) % 2 * 65535
    network = small(seed=3)
    engine = PatientGradSampleModule(network, TASK, engine="patients")
    size = len(flatten(network))
    bags = every_bag(cohort)
    rest = [bag for index, bag in enumerate(bags) if index != removed]
    for clip in (1e-3, 1e3):
        whole = clipped_sum(engine.blocks(cohort, bags), size, clip)
        less = clipped_sum(engine.blocks(cohort, rest), size, clip)
        assert 0 < exact_norm(whole - less) <= UNIT**2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_a_value_that_is_none_in_one_patients_features_moves_nothing_else(
    engine: Engine, value: float
) -> None:
    features = np.random.default_rng(3).normal(size=(9, 4, 2, 2)).astype(np.float32)
    features[4, 1, 0, 1] = value
    patients = tuple(OnePatient(place % 2, (2 * place, 2 * place + 1)) for place in range(4))
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).train()
    module = PatientGradSampleModule(network, TASK, engine=engine)
    whole = FeatureCohort(features, patients, targets_by(patients))
    rest = FeatureCohort(features, patients[:2] + patients[3:], whole.targets)
    sums = []
    for cohort in (whole, rest):
        bags = [Bag(np.array(one.images)) for one in cohort.patients]
        sums.append(clipped_sum(module.blocks(cohort, bags), 34, 1.0))
    module.to_standard_module()
    assert sums[1].any()
    assert exact_norm(sums[0] - sums[1]) <= UNIT**2


class Explosive(nn.Module):
    """Its output, and so its gradient, is not finite for black images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        shift = torch.where(images.mean(dim=(1, 2, 3)) == -2, math.nan, 0.0)
        result: Tensor = self.layer(images).mean(dim=(2, 3)) + shift[:, None]
        return result


@pytest.mark.parametrize("engine", ENGINES)
def test_a_patient_without_finite_gradient_counts_as_zero(engine: Engine) -> None:
    cohort = cohort_of([2] * 5)
    cohort.images[4:6] = 0
    rest = Patients(cohort.images, cohort.patients[:2] + cohort.patients[3:])
    patients = PatientGradSampleModule(Explosive().train(), TASK, engine=engine)
    size = sum(weight.numel() for weight in patients.trained)
    broken = clipped_sum(patients.blocks(cohort, every_bag(cohort)), size, 1.0)
    sound = clipped_sum(patients.blocks(rest, every_bag(rest)), size, 1.0)
    difference = (broken - sound).abs().max()
    assert int(difference) == 0


class Breaking(nn.Module):
    """Fails for black images, as memory that runs out would, when a part of the pass is done."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layer(images).mean(dim=(2, 3))
        if bool((images == -2).all()):
            raise MemoryError
        result: Tensor = self.last(hidden)
        return result


def _sum_of(patients: PatientGradSampleModule, cohort: Patients) -> Tensor:
    size = sum(weight.numel() for weight in patients.trained)
    return clipped_sum(patients.blocks(cohort, every_bag(cohort)), size, 1e-2)


def _one_less(cohort: Patients, place: int) -> Patients:
    return Patients(cohort.images, cohort.patients[:place] + cohort.patients[place + 1 :])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_what_fails_for_one_patient_costs_that_patient_alone(engine: Engine, place: int) -> None:
    """It made everybody absent, so that one patient moved the sum by all the others' shares."""
    cohort = cohort_of([2] * 5)
    cohort.images[2 * place : 2 * place + 2] = 0
    told: list[Exception] = []
    patients = PatientGradSampleModule(Breaking().train(), TASK, engine=engine, told=told.append)
    broken = _sum_of(patients, cohort)
    assert [type(error) for error in told] == [MemoryError]
    assert torch.equal(broken, _sum_of(patients, _one_less(cohort, place)))
    assert broken.any()
    # Nothing of the broken pass is left.
    assert torch.equal(broken, _sum_of(patients, cohort))
    patients.to_standard_module()
    untold = PatientGradSampleModule(Breaking().train(), TASK, engine=engine)
    with pytest.raises(MemoryError):
        _sum_of(untold, cohort)


@pytest.mark.parametrize("place", [0, 15, 16, 18])
def test_what_fails_for_one_of_sixteen_costs_that_patient_alone(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = cohort_of([2] * 19)
    told: list[Exception] = []
    patients = PatientGradSampleModule(small(), TASK, told=told.append)
    whole, rest = _sum_of(patients, cohort), _sum_of(patients, _one_less(cohort, place))
    of_sixteen = patients._side_by_side
    asked: list[int] = []

    def breaking(pixels: Tensor, targets: Tensor, images: int) -> Tensor:
        asked.append(len(pixels) // images)
        own = pixels_of(cohort, every_bag(cohort)[place : place + 1])
        if any(torch.equal(part, own) for part in pixels.split(images)):
            raise RuntimeError("not enough memory")
        return of_sixteen(pixels, targets, images)

    monkeypatch.setattr(patients, "_side_by_side", breaking)
    assert torch.equal(_sum_of(patients, cohort), rest)
    assert not torch.equal(whole, rest)
    assert [str(error) for error in told] == ["not enough memory"]
    # Each of the pass that failed alone, when no other pass is left.
    assert asked == [16, 3, *[1] * (16 if place < 16 else 3)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_goes_on_without_the_patient_who_failed(engine: Engine) -> None:
    cohort = cohort_of([1] * 6)
    cohort.images[3] = 0
    study = with_engine(study_of("expected_batch = 3"), engine)
    told: list[Exception] = []
    module = Breaking()

    def update(seen: Patients, gets: Callable[[Exception], None] | None) -> NDArray[np.float32]:
        return train_round(
            module,
            seen,
            study,
            noise_multiplier=1e-9,
            random=SecureRandom(),
            round_number=1,
            steps=2,
            told=gets,
        )

    with pytest.raises(MemoryError):  # noqa: PT012
        for _ in range(20):
            update(cohort, None)
    for _ in range(20):
        assert np.isfinite(update(cohort, told.append)).all()
    assert {type(error) for error in told} == {MemoryError}


# Engines.


@pytest.mark.long
@pytest.mark.parametrize(
    ("network", "size"),
    [
        (Network(), 16),
        (Network(arguments={"width": 8}), 33),
        (Network(name="resnet18"), 32),
        (Network(name="densenet121"), 32),
    ],
)
def test_unit_gradients_equal_a_float64_loop(network: Network, size: int) -> None:
    cohort = cohort_of([2, 1, 3] if network.name == "small-cnn" else [2, 1], size)
    bags = every_bag(cohort)
    module = build(network, 2, 1, size=size, seed=1)
    precise = build(network, 2, 1, size=size, seed=1).double()
    expected = []
    for bag in bags:
        loss = F.cross_entropy(
            precise(pixels_of(cohort, [bag]).double()), torch.from_numpy(cohort.targets[bag.images])
        )
        gradients = torch.autograd.grad(loss, list(precise.parameters()))
        expected.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    exact = torch.stack(expected)
    for engine in ENGINES:
        patients = PatientGradSampleModule(module, TASK, engine=engine)
        patients.fill_grad_samples(cohort, bags)
        samples = [p.grad_sample.flatten(start_dim=1) for p in module.parameters()]  # type: ignore[attr-defined]
        patients.to_standard_module()
        error = (torch.cat(samples, dim=1) - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(error.max()) < (1e-5 if network.name == "small-cnn" else 1e-4)


def test_side_by_side_is_used_and_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = cohort_of([1, 2] * 11 + [5])
    module = small()
    tries: dict[tuple[object, ...], bool] = {}
    monkeypatch.setattr(per_patient_gradients, "_tried", tries)
    patients = PatientGradSampleModule(module, TASK)
    size = len(flatten(module))
    fast = clipped_sum(patients.blocks(cohort, every_bag(cohort)), size, 1.0)
    assert len(tries) == 3
    # Where a trial fails, the loop takes over.
    monkeypatch.setattr(per_patient_gradients, "_tried", dict.fromkeys(tries, False))
    monkeypatch.setattr(patients, "_side_by_side", None)
    slow = clipped_sum(patients.blocks(cohort, every_bag(cohort)), size, 1.0)
    assert int((fast - slow).abs().max()) < UNIT * 1e-5


def test_a_network_that_mixes_patients_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = PatientGradSampleModule(small(), TASK)
    honest = patients._with_weights
    assert patients._try_places(1, (1, 16, 16))
    monkeypatch.setattr(
        patients,
        "_with_weights",
        lambda w, p, c, i: honest(w, p, c, i) + 1e-7 * p[0].nan_to_num().mean(),
    )
    assert not patients._try_places(1, (1, 16, 16))


def test_a_network_whose_places_round_in_other_ways_fails_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patients = PatientGradSampleModule(small(), TASK)
    honest = patients._with_weights

    def at_five(weights: Mapping[str, Tensor], p: Tensor, c: Tensor, images: int) -> Tensor:
        found = honest(weights, p, c, images)
        found[5, 0] = torch.nextafter(found[5, 0], torch.tensor(math.inf))
        return found

    monkeypatch.setattr(patients, "_with_weights", at_five)
    assert not patients._try_places(1, (1, 16, 16))


def test_places_that_agree_for_one_patient_by_luck_fail_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A linear layer on 33 x 33 images rounds by where a row begins; of one patient it was tried,
    whose bits happened to be the same there."""
    patients = PatientGradSampleModule(small(), TASK)
    honest = patients._with_weights
    lucky: list[Tensor] = []

    def by_alignment(weights: Mapping[str, Tensor], p: Tensor, c: Tensor, images: int) -> Tensor:
        found = honest(weights, p, c, images)
        first = p.view(16, -1)[:, 0]
        lucky.append(first[0])
        for place in range(1, 16, 4):
            if first[place] != lucky[0]:
                found[place, 0] = torch.nextafter(found[place, 0], torch.tensor(math.inf))
        return found

    monkeypatch.setattr(patients, "_with_weights", by_alignment)
    assert not patients._try_places(1, (1, 16, 16))


def test_a_trial_that_memory_broke_off_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took the loop for as long as the process ran, and so by what lay in memory."""
    tries: dict[tuple[object, ...], bool] = {}
    monkeypatch.setattr(per_patient_gradients, "_tried", tries)
    cohort = cohort_of([1] * 3)
    patients = PatientGradSampleModule(small(), TASK, told=lambda _: None)

    def broken(*_: object) -> bool:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    with monkeypatch.context() as patch:
        patch.setattr(patients, "_try_places", broken)
        # Nobody is lost for it: this step goes from patient to patient.
        assert len(list(patients.blocks(cohort, every_bag(cohort)))) == 3
    assert tries == {}

    def unfit(*_: object) -> bool:
        raise RuntimeError("NYI: is_contiguous inside of vmap for another memory_format")

    with monkeypatch.context() as patch:
        patch.setattr(patients, "_try_places", unfit)
        # The loop takes over: this is of the network.
        assert len(list(patients.blocks(cohort, every_bag(cohort)))) == 3
    assert list(tries.values()) == [False]
    tries.clear()
    list(patients.blocks(cohort, every_bag(cohort)))
    assert list(tries.values()) == [True]


def test_a_large_bag_costs_nobody_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes beside one with 64 images failed, where each alone had room: 3.9 C were seen."""
    cohort = cohort_of([5, 5, 64, 5, 5, 5, 5])
    bags = every_bag(cohort)
    lock = threading.Lock()
    held = [0]

    class Bounded(PatientGradSampleModule):
        def _of_patient(self, images: Tensor, targets: Tensor) -> Sequence[Tensor]:
            with lock:
                held[0] += len(images)
                short = held[0] > 66
            try:
                time.sleep(0.02)
                if short:
                    raise MemoryError
                return super()._of_patient(images, targets)
            finally:
                with lock:
                    held[0] -= len(images)

    monkeypatch.setattr(per_patient_gradients, "_SMALL", 0)
    lost: list[Exception] = []
    patients = Bounded(small(), TASK, told=lost.append)
    size = sum(weight.numel() for weight in patients.trained)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        beside, rest, alone = (
            clipped_sum(patients.blocks(cohort, some), size, 1e-2)
            for some in (bags, [*bags[:2], *bags[3:]], [bags[2]])
        )
    finally:
        torch.set_num_threads(before)
    assert lost == []
    assert torch.equal(beside - rest, alone)


def test_a_bag_that_never_fits_costs_its_patient_alone() -> None:
    cohort = cohort_of([1, 2, 1])
    bags = every_bag(cohort)

    class Bounded(PatientGradSampleModule):
        def _read(
            self, cohort: Cohort | FeatureCohort, run: Sequence[Bag]
        ) -> tuple[Tensor, Tensor]:
            if any(bag.images[0] == 3 for bag in run):
                raise MemoryError
            return super()._read(cohort, run)

    lost: list[Exception] = []
    patients = Bounded(small(), TASK, told=lost.append)
    size = sum(weight.numel() for weight in patients.trained)
    whole = clipped_sum(patients.blocks(cohort, bags), size, 1e-2)
    assert [type(error) for error in lost] == [MemoryError]
    assert torch.equal(whole, clipped_sum(patients.blocks(cohort, bags[:2]), size, 1e-2))


def test_a_large_bag_needs_no_place_for_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 16 times the bag was tried, and everybody absent where it did not suffice."""
    tries: dict[tuple[object, ...], bool] = {}
    monkeypatch.setattr(per_patient_gradients, "_tried", tries)
    cohort = cohort_of([9, 1])
    patients = PatientGradSampleModule(small(), TASK)
    assert len(list(patients.blocks(cohort, every_bag(cohort)))) == 2
    assert [key[2] for key in tries] == [1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_patients_share_is_the_same_bits_beside_anybody(engine: Engine) -> None:
    """Opacus' hooks took whoever was drawn in one pass, and rounded one for the others."""
    cohort = cohort_of([1, 2, 3, 4] * 5, 33)
    bags = every_bag(cohort)
    for module in (small(width=8), nn.Sequential(nn.Flatten(), nn.Linear(33 * 33, 2))):
        patients = PatientGradSampleModule(module.train(), TASK, engine=engine)
        size = len(flatten(module))

        def summed(some: list[Bag]) -> Tensor:
            return clipped_sum(patients.blocks(cohort, some), size, 1e-2)  # noqa: B023

        whole = summed(bags)
        for place in range(len(bags)):
            rest = bags[:place] + bags[place + 1 :]
            assert torch.equal(whole - summed(rest), summed([bags[place]]))
        patients.to_standard_module()


def test_the_path_of_a_patient_does_not_follow_the_weights_that_came_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort = cohort_of([1] * 3)
    for weight in (0.0, 1e30):
        tries: dict[tuple[object, ...], bool] = {}
        monkeypatch.setattr(per_patient_gradients, "_tried", tries)
        module = small()
        for each in module.parameters():
            each.data.fill_(weight)
        list(PatientGradSampleModule(module, TASK).blocks(cohort, every_bag(cohort)))
        assert list(tries.values()) == [True]


def test_a_trial_says_nothing_of_a_network_with_another_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have the same type and text."""

    class Flagged(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 2)
            self.power = power

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.layer(images.flatten(1) ** self.power)
            return result

    cohort = cohort_of([1] * 3)
    tries: dict[tuple[object, ...], bool] = {}
    monkeypatch.setattr(per_patient_gradients, "_tried", tries)
    for power in (1, 2, 1):
        module = Flagged(power).train()
        list(PatientGradSampleModule(module, TASK).blocks(cohort, every_bag(cohort)))
    assert len(tries) == 2


def test_pixels_begin_where_torch_puts_its_own() -> None:
    """Where memory begins can change the rounding of a product of matrices."""
    cohort = cohort_of([1])
    kept = []
    for _ in range(50):
        kept.append(
            (
                np.empty(np.random.default_rng().integers(1, 200)),
                pixels_of(cohort, every_bag(cohort)),
            )
        )
        assert kept[-1][1].data_ptr() % 64 == 0


def step_of(engine: Engine, cohort: Patients, **training: object) -> NDArray[np.float32]:
    """One step without noise: the change of the weights."""
    module = small(seed=2)
    before = flatten(module)
    optimizer = PatientDPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=12.5,
        random=None,
    )
    patients = PatientGradSampleModule(module, TASK, engine=engine)
    optimizer.step_on(patients.blocks(cohort, every_bag(cohort)))
    patients.to_standard_module()
    return flatten(module) - before


def test_engines_agree() -> None:
    cohort = cohort_of([1, 2, 3, 4, 40, 2, 2, 30])
    one, other = (step_of(engine, cohort) for engine in ENGINES)
    assert np.abs(one).max() > 1e-3
    assert np.abs(one - other).max() < 1e-6


def test_opacus_leaves_no_trace() -> None:
    module = small()
    PatientGradSampleModule(module, TASK, engine="opacus").to_standard_module()
    assert not hasattr(module, "autograd_grad_sample_hooks")
    assert not any(hasattr(weight, "grad_sample") for weight in module.parameters())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())


# The optimiser.


def optimizer_of(
    module: nn.Module, noise: float = 1.0, *, divisor: float = 4.0, clip: float = 1.0
) -> PatientDPOptimizer:
    return PatientDPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=divisor,
        random=SecureRandom() if noise else None,
    )


def test_noise_has_the_promised_variance_and_the_divisor_is_constant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csprng, "_fresh_key", lambda: bytes(32))
    sigma, clip, divisor = 1.7, 0.4, 25.0
    module = nn.Linear(1_000, 100, bias=False)
    with torch.no_grad():
        module.weight.zero_()
    drawn = []
    for blocks in ([], [torch.zeros(3, 100_000)], [torch.zeros(50, 100_000)]):
        before = module.weight.detach().clone()
        optimizer_of(module, sigma, divisor=divisor, clip=clip).step_on(blocks)
        drawn.append((before - module.weight.detach()).double().numpy().ravel() * divisor)
    for noise in drawn:
        assert noise.var() == pytest.approx((sigma * clip) ** 2, rel=4.5 * math.sqrt(2 / 1e5))
        assert abs(noise.mean()) < 4.5 * sigma * clip / math.sqrt(1e5)


def test_noise_is_on_the_grid_and_fresh_in_each_step() -> None:
    module = nn.Linear(500, 2, bias=False)
    optimizer = optimizer_of(module, 1.0, divisor=1.0)
    seen: list[Tensor] = []
    optimizer.attach_step_hook(lambda o: seen.append(o.params[0].grad.clone()))
    for _ in range(2):
        optimizer.step_on([])
    grid = seen[0].double() * UNIT
    assert torch.equal(grid, grid.round())
    assert not (seen[0] == seen[1]).any()
    assert abs(float((seen[0] * seen[1]).mean())) < 4.5 / math.sqrt(1000)


@pytest.mark.parametrize("patients", [0, 1, 2, 9])
def test_divisor_is_the_constant(patients: int) -> None:
    module = nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    optimizer_of(module, 0.0, divisor=4.0).step_on(
        [torch.tensor([[0.5, 0.0]] * patients).view(-1, 2)]
    )
    assert (before - module.weight.detach())[0, 0] == pytest.approx(patients * 0.5 / 4.0, abs=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_carried_over_after_an_abort(engine: Engine) -> None:
    cohort = cohort_of([1, 2, 3])
    bags = every_bag(cohort)
    module = small()
    optimizer = optimizer_of(module, 0.0)
    patients = PatientGradSampleModule(module, TASK, engine=engine)
    start = flatten(module)

    def aborted() -> Iterator[Block]:
        yield from patients.blocks(cohort, bags)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step_on(aborted())
    assert np.array_equal(flatten(module), start)
    optimizer.step_on([])
    assert np.array_equal(flatten(module), start)
    optimizer.step_on(patients.blocks(cohort, bags))
    fresh = small()
    other = PatientGradSampleModule(fresh, TASK, engine=engine)
    optimizer_of(fresh, 0.0).step_on(other.blocks(cohort, bags))
    assert np.array_equal(flatten(module), flatten(fresh))


def test_step_works_as_in_opacus() -> None:
    cohort = cohort_of([1, 2, 3])
    module, other = small(), small()
    patients = PatientGradSampleModule(module, TASK)
    patients.fill_grad_samples(cohort, every_bag(cohort))
    optimizer = optimizer_of(module, 0.0)
    optimizer.step()
    optimizer_of(other, 0.0).step_on(
        PatientGradSampleModule(other, TASK).blocks(cohort, every_bag(cohort))
    )
    assert np.array_equal(flatten(module), flatten(other))
    with pytest.raises(ValueError, match="not initialized"):
        optimizer.step()
    for refused in (optimizer.signal_skip_step, optimizer.clip_and_accumulate, optimizer.pre_step):
        with pytest.raises(InternalError):
            refused()


@pytest.mark.parametrize(
    "terms",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"max_grad_norm": 0.0},
        {"expected_batch_size": 0.0},
        {"random": None},
        {"random": SeededRandom(0, "", 1)},
    ],
)
def test_optimizer_refuses_what_is_not_private(terms: dict[str, object]) -> None:
    sound: dict[str, object] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    sound |= {"expected_batch_size": 1.0, "random": SecureRandom()}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(InternalError):
        PatientDPOptimizer(optimizer, **(sound | terms))  # type: ignore[arg-type]


# Sampling.


def test_patients_are_sampled_whole_and_images_capped() -> None:
    cohort = cohort_of([1, 5, 30])
    source = SecureRandom()
    seen: list[set[int]] = [set(), set(), set()]
    drawn = 0
    for _ in range(600):
        for bag in draw_bags(cohort, source, rate=0.4, most=4, augment=False):
            drawn += 1
            owner = next(i for i, p in enumerate(cohort.patients) if bag.images[0] in p.images)
            assert set(bag.images) <= set(cohort.patients[owner].images)
            assert (
                len(set(bag.images))
                == len(bag.images)
                == min(4, len(cohort.patients[owner].images))
            )
            label = cohort.patients[owner].label
            assert (cohort.targets[bag.images] == label).all()
            seen[owner] |= set(bag.images.tolist())
    assert abs(drawn - 720) < 4.5 * math.sqrt(1_800 * 0.24)
    assert [len(images) for images in seen] == [1, 5, 30]


def test_pixels_are_normalised() -> None:
    cohort = Patients(np.array([[[0, 65535], [32768, 16384]]], np.uint16), (OnePatient(0, (0,)),))
    pixels = pixels_of(cohort, [Bag(np.array([0]))])
    assert pixels.shape == (1, 1, 2, 2)
    assert pixels.dtype == torch.float32
    expected = [-2.0, 2.0, 4 * 32768 / 65535 - 2, 4 * 16384 / 65535 - 2]
    assert pixels.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_augmentation_mirrors_and_shifts_each_image_by_itself() -> None:
    cohort = cohort_of([1], 32)
    image = cohort.images[0]
    bag = Bag(np.array([0, 0, 0]), np.array([[0, 0, 0], [1, 0, 0], [0, 2, -1]]))
    plain, mirrored, moved = ((pixels_of(cohort, [bag])[:, 0] * 0.25 + 0.5) * 65535).numpy()
    assert np.allclose(plain, image, atol=0.05)
    assert np.allclose(mirrored, image[:, ::-1], atol=0.05)
    assert np.allclose(moved[2:, :-1], image[:-2, 1:], atol=0.05)
    assert np.allclose(moved[:2, :-1], image[0, 1:], atol=0.05)
    drawn = [draw_bags(cohort, SecureRandom(), rate=1.0, most=1, augment=True) for _ in range(200)]
    moves = np.concatenate([bags[0].moves for bags in drawn if bags[0].moves is not None])
    assert len(moves) == 200
    assert set(moves[:, 0]) == {0, 1}
    assert set(moves[:, 1]) == set(moves[:, 2]) == {-2, -1, 0, 1, 2}


def test_chunks_keep_order_and_size() -> None:
    bags = every_bag(cohort_of([3, 3, 3, 9, 1, 1]))
    assert [[len(bag.images) for bag in run] for run in chunks(bags, 6)] == [
        [3, 3],
        [3],
        [9],
        [1, 1],
    ]
    assert list(chunks([], 6)) == []


# A round.


def round_of(
    module: nn.Module,
    cohort: Patients,
    study: Study,
    noise: float = 1.0,
    *,
    steps: int = 1,
    random: SecureRandom | None = None,
    number: int = 1,
    site: str = "",
) -> NDArray[np.float32]:
    return train_round(
        module,
        cohort,
        study,
        noise_multiplier=noise,
        random=random,
        round_number=number,
        steps=steps,
        site=site,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_private_round_changes_only_what_it_returns(engine: Engine, optimizer: str) -> None:
    cohort = cohort_of([1, 2, 3, 4])
    study = study_of(
        f'engine = "{engine}"\noptimizer = "{optimizer}"\nlearning_rate = 0.01\n'
        "augment = true\nsampling_rate = 0.5\nexpected_batch = 2"
    )
    module = small()
    before = flatten(module)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    rounds = [
        round_of(module, cohort, study, 1.0, random=SecureRandom(), steps=3) for _ in range(2)
    ]
    assert rounds[0].dtype == np.float32
    assert rounds[0].shape == before.shape
    assert np.isfinite(rounds[0]).all()
    # Same seeds everywhere, and yet nothing repeats.
    assert not (rounds[0] == rounds[1]).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(flatten(module), before)
    assert not any(hasattr(weight, "grad_sample") for weight in module.parameters())


def test_book_keeping_with_privacy_is_not_trained() -> None:
    study = with_engine(study_of(), "book-keeping")
    with pytest.raises(InternalError, match="can move its sum of clipped gradients"):
        round_of(small(), cohort_of([1, 2]), study, random=SecureRandom())


def test_without_privacy_the_engine_changes_nothing() -> None:
    off = study_of("", "enabled = false")
    rounds = [
        round_of(small(), cohort_of([1, 2]), with_engine(off, engine)).tobytes()
        for engine in (*ENGINES, "book-keeping")
    ]
    assert len(set(rounds)) == 1


def test_an_empty_sample_is_a_step_of_noise() -> None:
    cohort = Patients(np.zeros((0, 16, 16), np.uint16), ())
    study = study_of("learning_rate = 1.0\nexpected_batch = 10", "clipping_norm = 2.0")
    delta = round_of(small(width=12), cohort, study, 3.0, random=SecureRandom(), steps=1)
    assert delta.std() == pytest.approx(3.0 * 2.0 / 10, rel=4.5 / math.sqrt(2 * len(delta)))


def noise_of_rounds(counted: bool, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float64]:
    """What 3 sites add in 4 rounds of 2 steps each, sigma 1 and clip 1, one row a step."""
    if counted:
        keys = itertools.count()
        monkeypatch.setattr(csprng, "_fresh_key", lambda: next(keys).to_bytes(32, "big"))
    rows: list[NDArray[np.float64]] = []
    honest = PatientDPOptimizer.attach_step_hook

    def attach(self: PatientDPOptimizer, hook: Callable[[object], None]) -> None:
        def seen(optimizer: PatientDPOptimizer) -> None:
            flat = torch.cat([weight.grad.reshape(-1) for weight in optimizer.params])
            rows.append(flat.double().numpy())
            hook(optimizer)

        honest(self, seen)

    monkeypatch.setattr(PatientDPOptimizer, "attach_step_hook", attach)
    cohort = Patients(np.zeros((0, 16, 16), np.uint16), ())
    study = study_of("expected_batch = 1\nseed = 7", "clipping_norm = 1.0")
    for number in (1, 2, 3, 4):
        for site in ("north", "south", "west"):
            torch.manual_seed(0)
            np.random.seed(0)
            source = SecureRandom()
            round_of(small(width=12), cohort, study, 1.0, steps=2, random=source, number=number,
                     site=site)  # fmt: skip
    return np.stack(rows)


def test_noise_over_steps_rounds_and_sites_is_one_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise_of_rounds(True, monkeypatch)
    count, size = rows.shape
    assert count == 3 * 4 * 2
    pooled = np.sort(rows.ravel())
    exact = 0.5 * (1 + torch.erf(torch.from_numpy(pooled) / math.sqrt(2)).numpy())
    gap = np.abs(exact - (np.arange(pooled.size) + 0.5) / pooled.size).max()
    assert gap * math.sqrt(pooled.size) < 1.95  # Kolmogorov-Smirnov at 0.1 %
    # Each row by itself, and each coordinate over the rows.
    assert np.abs(rows.var(axis=1) - 1).max() < 4.5 * math.sqrt(2 / size)
    assert abs(rows.var(axis=0).mean() - (count - 1) / count) < 4.5 * math.sqrt(2 / rows.size)
    together = np.corrcoef(rows) - np.eye(count)
    assert np.abs(together).max() < 5 / math.sqrt(size)


def test_no_noise_is_drawn_twice_whatever_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise_of_rounds(False, monkeypatch)
    for place, row in enumerate(rows):
        for other in rows[place + 1 :]:
            assert (row == other).mean() < 0.01
            assert abs(np.corrcoef(row, other)[0, 1]) < 7 / math.sqrt(row.size)


def test_momentum_acts_on_the_noised_gradient() -> None:
    cohort = Patients(np.zeros((0, 16, 16), np.uint16), ())
    study = study_of("learning_rate = 1.0\nexpected_batch = 1\nmomentum = 0.9")
    delta = round_of(small(width=12), cohort, study, 1.0, random=SecureRandom(), steps=2)
    # v1 = g1, v2 = 0.9 g1 + g2; the change is 1.9 g1 + g2.
    assert delta.var() == pytest.approx(1.9**2 + 1, rel=0.06)


def test_without_privacy_rounds_repeat_by_seed_site_and_number() -> None:
    cohort = cohort_of([1, 2, 3, 4, 5, 6])
    study = study_of(
        "augment = true\nsampling_rate = 0.6\nimages_per_patient = 2", "enabled = false"
    )

    def run(site: str = "north", number: int = 1) -> NDArray[np.float32]:
        return round_of(small(), cohort, study, steps=3, number=number, site=site)

    assert np.array_equal(run(), run())
    assert not np.array_equal(run(), run(site="south"))
    assert not np.array_equal(run(), run(number=2))


def test_without_privacy_the_loss_is_the_mean_over_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_fl.client.training import local_training

    monkeypatch.setattr(local_training, "_IMAGES_AT_ONCE", 3)
    cohort = cohort_of([1, 2, 2, 1])
    study = study_of("learning_rate = 0.5", "enabled = false")
    module = small()
    delta = round_of(module, cohort, study, 0.0, steps=1)
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    loss = F.cross_entropy(module(pixels_of(cohort, every_bag(cohort))), labels)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    expected = -0.5 * torch.cat([gradient.reshape(-1) for gradient in gradients])
    assert np.abs(delta - expected.numpy()).max() < 1e-6


def test_training_learns() -> None:
    cohort = cohort_of([2] * 12)
    for patient in cohort.patients:
        cohort.images[list(patient.images)] = 15_000 + 30_000 * patient.label
    study = study_of("learning_rate = 0.5\nexpected_batch = 12", "clipping_norm = 1.0")
    module = small()
    delta = round_of(module, cohort, study, 1e-3, random=SecureRandom(), steps=15)
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            torch.from_numpy(flatten(module) + delta), module.parameters()
        )
        logits = module(pixels_of(cohort, every_bag(cohort)))
    assert (logits.argmax(dim=1) == torch.tensor([0, 0, 1, 1] * 6)).all()


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_fedprox_pulls_towards_the_global_model(enabled: str) -> None:
    cohort = cohort_of([2] * 6)
    mus = {}
    for mu in (0.0, 5.0):
        prox = f'strategy = "fedprox"\nproximal_mu = {mu}' if mu else ""
        study = study_of("learning_rate = 0.1\nexpected_batch = 6", f"enabled = {enabled}", prox)
        delta = round_of(small(), cohort, study, 1e-3, random=SecureRandom(), steps=6)
        mus[mu] = float(np.linalg.norm(delta))
    assert mus[5.0] < 0.6 * mus[0.0]


def test_privacy_needs_noise_and_its_source() -> None:
    cohort = cohort_of([1])
    for noise, source in ((0.0, SecureRandom()), (1.0, None), (math.nan, SecureRandom())):
        with pytest.raises(InternalError):
            round_of(small(), cohort, study_of(), noise, random=source, steps=1)


def test_weights_that_are_not_finite_are_refused() -> None:
    cohort = cohort_of([1])
    cohort.images[:] = 0
    with pytest.raises(UpdateInvalid, match="learning_rate"):
        round_of(Explosive(), cohort, study_of(privacy="enabled = false"))


@pytest.mark.long
@pytest.mark.parametrize("enabled", ["true", "false"])
@pytest.mark.parametrize("name", ["filter-bank", "efficientnet-lite0"])
def test_a_fixed_part_that_runs_once_gives_the_same_update(
    monkeypatch: pytest.MonkeyPatch, enabled: str, name: str
) -> None:
    study = study_of("steps = 3\nexpected_batch = 4", f"enabled = {enabled}")
    cohort = cohort_of([2, 1, 3, 1], 32)
    module = build(Network(name=name), 2, 1, size=32, seed=4)
    monkeypatch.setattr(
        SecureRandom, "normal", lambda self, n, std: torch.zeros(n, dtype=torch.float64)
    )
    seen = []

    def update() -> NDArray[np.float32]:
        return train_round(
            module, cohort, study, noise_multiplier=1.0, random=SecureRandom(), round_number=1,
            steps=3,
        )  # fmt: skip

    honest = local_training.trained_part
    monkeypatch.setattr(
        local_training, "trained_part", lambda *a: seen.append(type(honest(*a)[1])) or honest(*a)
    )
    once = update()
    assert seen == [FeatureCohort]
    monkeypatch.setattr(local_training, "trained_part", lambda local, cohort, *_: (local, cohort))
    np.testing.assert_allclose(once, update(), atol=2e-6)
    assert np.abs(once).max() > 1e-3


def test_the_learning_rate_follows_the_round() -> None:
    cohort = cohort_of([1, 2])

    def moved(schedule: str, number: int) -> NDArray[np.float32]:
        study = study_of(
            f'rounds = 4\nlearning_rate = 0.1\nschedule = "{schedule}"', "enabled = false"
        )
        return train_round(
            small(), cohort, study, noise_multiplier=0.0, random=None, round_number=number, steps=1
        )

    # Half of the way down the cosine in the third of four rounds.
    np.testing.assert_allclose(moved("cosine", 3), moved("constant", 3) / 2, atol=1e-7)
    np.testing.assert_allclose(moved("cosine", 1), moved("constant", 1), atol=1e-7)
    assert np.abs(moved("constant", 3)).max() > 1e-4
