"""What any task must hold, whoever wrote it; a toy of ``tests/toys`` is held to the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_fl.metrics.figures import title_of
from cloister_fl.tasks import LabelsFile, Task

Floats = NDArray[np.float64]
SIDE = 16
BINS = (2, 16, 256)
EDGES = (0.0, 1.0, 0.5, -1.0, 2.0, 1e300, math.nan, math.inf, -math.inf, np.nextafter(1.0, 0.0))


def logits_of(task: Task, count: int, generator: torch.Generator) -> torch.Tensor:
    """What a network might say of ``count`` images."""
    places = (SIDE, SIDE) if task.answers == "pixel" else ()
    return 3 * torch.randn((count, task.outputs, *places), generator=generator)


def rows_to_try(task: Task, width: int) -> Iterator[Floats]:
    """Rows of a patient: ordinary ones, edges of bins, and what no score should be."""
    rng = np.random.default_rng(0)
    for edges in product(EDGES, repeat=min(width, 3)):
        yield np.resize(np.array(edges), width)
    for bins in BINS:
        for cell in range(bins + 1):
            yield np.full(width, cell / bins)
    for scale in (1.0, 1e3, 1e30):
        yield from (rng.uniform(-scale, scale, width) for _ in range(200))


def largest_norm(task: Task) -> float:
    """The largest L2 norm of ``count`` that a search finds, over labels, rows and bins.

    Raises:
        Exception: whatever ``count`` raises; it must not.
    """
    generator = torch.Generator().manual_seed(0)
    answers = task.answer(logits_of(task, 2, generator)).numpy()
    targets = task.stack([None, None])
    width = len(task.row(answers, targets))
    found = 0.0
    for label, bins in product(range(len(task.strata)), BINS):
        for row in rows_to_try(task, width):
            counted = task.count(label, row, bins)
            assert counted.shape == task.counts_shape(bins)
            assert counted.dtype == np.int64
            found = max(found, float(np.linalg.norm(counted.astype(np.float64))))
    return found


def check_task(task: Task) -> None:
    """Assert what the interface of a task promises."""
    assert {task: "a key of caches"}[task]
    assert task.headline == task.figures[0]
    assert all(title_of(name) for name in task.figures)
    assert len(task.strata) > max(task.needed)
    words = (task.described, task.question, task.figures_told, task.counts_told, task.told(0.75))
    assert all(words)
    assert bool(task.allowed) == isinstance(task.source, LabelsFile)
    _check_answer(task)
    _check_losses(task)
    _check_counts(task)


def _check_answer(task: Task) -> None:
    """The columns name the numbers that ``answer`` gives for an image; a mask has none."""
    answers = task.answer(logits_of(task, 3, torch.Generator().manual_seed(3)))
    assert len(answers) == 3
    if task.columns:
        assert answers.shape == (3, len(task.columns))
        assert len(set(task.columns)) == len(task.columns)
    else:
        assert answers.shape == (3, SIDE, SIDE)
        assert answers.dtype == torch.bool


def _check_losses(task: Task) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = logits_of(task, 6, generator)
    targets = task.example(torch.randn((6, 1, SIDE, SIDE), generator=generator))
    losses = task.losses(logits, targets)
    assert losses.shape == (6,)
    assert bool(torch.isfinite(losses).all())
    assert bool((losses > 0).all())
    # An image's loss is its own: neighbours, however wild, change nothing of it.
    for wild in (1e6, float("nan")):
        others = logits.clone()
        others[1:] = wild
        assert torch.equal(task.losses(others, targets)[0], losses[0])
    trained = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.losses(trained, targets)[0], trained)
    assert not gradient[1:].any()
    assert gradient[0].any()


def _check_counts(task: Task) -> None:
    for bins in BINS:
        total = sum(
            (
                task.count(label, row, bins)
                for label in range(len(task.strata))
                for row in _ordinary_rows(task)
            ),
            np.zeros(task.counts_shape(bins), np.int64),
        )
        metrics = task.measure_counts(total)
        assert set(metrics.figures) == set(task.figures)
        assert metrics.get(task.headline) is not None
    if task.sensitivity is None:
        return
    assert largest_norm(task) <= task.sensitivity * (1 + 1e-12)
    noised = task.measure_counts(total + np.zeros(total.shape), 0.5)
    assert set(noised.figures) == set(task.figures)


def _ordinary_rows(task: Task) -> list[Floats]:
    generator = torch.Generator().manual_seed(2)
    answers = task.answer(logits_of(task, 8, generator)).numpy()
    targets = task.stack([None] * 8)
    return [task.row(answers[[place]], targets[[place]]) for place in range(8)]
