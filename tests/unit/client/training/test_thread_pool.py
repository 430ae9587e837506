"""Patients side by side, one a core: the order, the bound, and whose cores they are afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cloister_fl.client.training.per_patient_gradients import PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag
from cloister_fl.client.training.thread_pool import side_by_side
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network
from support.cohorts import TASK


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_results_keep_their_order_and_each_is_made_by_one_core(threads: int) -> None:
    together = threading.Barrier(threads)

    def work(item: int) -> tuple[int, int]:
        together.wait(timeout=30)
        return item * item, torch.get_num_threads()

    squares = side_by_side(work, range(6 * threads))
    for item, (square, cores) in enumerate(squares):
        assert (square, cores, torch.get_num_threads()) == (item * item, 1, 1)
    assert item == 6 * threads - 1


def test_few_results_are_held(threads: int) -> None:
    begun = []
    results = side_by_side(begun.append, range(50))
    for taken, _ in enumerate(results, start=1):
        assert len(begun) <= taken + threads + 1


def test_a_fault_is_the_callers_and_leaves_no_thread(threads: int) -> None:
    alive = threading.active_count()

    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    results = side_by_side(work, range(50))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert torch.get_num_threads() == threads
    assert threading.active_count() == alive


def test_a_caller_who_stops_early_gets_the_cores_back(threads: int) -> None:
    alive = threading.active_count()
    results = side_by_side(lambda item: item, range(50))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == threads
    assert threading.active_count() == alive


def test_a_second_user_leaves_all_cores_to_those_to_come(threads: int) -> None:
    inside, over = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        inside.set()
        over.wait(30)

    first = threading.Thread(target=lambda: list(side_by_side(hold, range(1))))
    first.start()
    inside.wait(30)
    seen: list[int] = []

    def second() -> None:
        list(side_by_side(lambda item: item, range(4)))
        seen.append(torch.get_num_threads())

    other = threading.Thread(target=second)
    other.start()
    other.join()
    over.set()
    first.join()
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert seen == [threads, threads]


@pytest.mark.slow
def test_a_patients_gradient_does_not_depend_on_the_number_of_cores() -> None:
    module = build(Network(name="resnet18"), 2, 1, size=32, seed=0)

    class Images:
        images = np.random.default_rng(0).integers(0, 65536, (24, 32, 32), dtype=np.uint16)
        targets = np.repeat(np.arange(8) % 2, 3)

    bags = [Bag(np.arange(3 * unit, 3 * unit + 3)) for unit in range(8)]
    patients = PatientGradSampleModule(module, TASK)
    before = torch.get_num_threads()
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        blocks = [
            torch.cat([part.flatten() for part in block])
            for block in patients.blocks(Images(), bags)
        ]  # type: ignore[arg-type,union-attr]
        sums.append(torch.stack(blocks))
    torch.set_num_threads(before)
    assert sums[0].shape[0] == 8
    assert float(sums[0].norm()) > 0
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
