"""Figures from noised counts: right without noise, honest about their width with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from cloister_fl.metrics.classification import histogram, measure_histogram
from cloister_fl.metrics.figures import MetricsInputInvalid
from cloister_fl.metrics.noisy import measure_noised, nearest_counts

TRUE = 0.939


def drawn(rng: np.random.Generator, patients: int) -> np.ndarray:
    """Counts (2, 16) of a model whose AUROC is ``TRUE``."""
    apart = stats.norm.ppf(TRUE) * 2**0.5
    labels = (rng.random(patients) < 0.6).astype(np.int64)
    logits = rng.normal(0, 1, patients) + apart * (labels - 0.5)
    return histogram(labels, 1 / (1 + np.exp(-1.5 * logits)), bins=16)


def test_without_noise_it_is_the_exact_measure() -> None:
    table = drawn(np.random.default_rng(0), 400)
    exact, found = measure_histogram(table), measure_noised(table[None], 0.0)
    assert exact.auroc is not None
    assert found.auroc is not None
    assert found.auprc is not None
    assert found.balanced_accuracy is not None
    assert exact.auprc is not None
    assert exact.balanced_accuracy is not None
    assert found.auroc.value == pytest.approx(exact.auroc.value, abs=1e-6)
    assert found.auprc.value == pytest.approx(exact.auprc.value, abs=1e-6)
    assert found.balanced_accuracy.value == pytest.approx(exact.balanced_accuracy.value, abs=1e-6)
    assert (found.patients, found.class_counts) == (400, exact.class_counts)
    assert found.auroc.low == pytest.approx(exact.auroc.low, abs=0.01)
    assert found.auroc.high == pytest.approx(exact.auroc.high, abs=0.01)


def test_several_classes_are_averaged() -> None:
    rng = np.random.default_rng(1)
    tables = np.stack([drawn(rng, 300) for _ in range(3)])
    one = [measure_noised(table[None], 0.0).auroc for table in tables]
    whole = measure_noised(tables, 0.0)
    assert whole.auroc is not None
    values = [each.value for each in one if each is not None]
    assert whole.auroc.value == pytest.approx(np.mean(values), abs=1e-9)
    assert whole.class_counts == tuple(int(table[1].sum()) for table in tables)


@pytest.mark.parametrize(("patients", "noise"), [(427, 3.73), (2000, 8.34)])
def test_the_interval_holds_the_truth(patients: int, noise: float) -> None:
    rng = np.random.default_rng(2)
    values, held = [], 0
    for _ in range(60):
        table = drawn(rng, patients)
        auroc = measure_noised(table[None] + rng.normal(0, noise, table.shape), noise).auroc
        assert auroc is not None
        assert 0 <= auroc.low <= auroc.value <= auroc.high <= 1
        assert auroc.high - auroc.low < 0.25
        values.append(auroc.value)
        held += auroc.low <= TRUE <= auroc.high
    # One release of 427 patients at epsilon 1: cutting at zero alone gives 0.905 on the average.
    assert 0.91 < np.mean(values) < TRUE
    assert held >= 53


@settings(deadline=None)
@given(arrays(np.float64, 8, elements=st.floats(-50, 100)))
def test_nearest_counts_are_the_nearest(noised: np.ndarray) -> None:
    found = nearest_counts(noised)
    assert (found >= 0).all()
    total = max(noised.sum(), 0.0)
    assert found.sum() == pytest.approx(total, abs=1e-6)
    if total < 1:
        return
    # Among the tables of that total, the nearest takes the same from every cell that stays.
    taken = (noised - found)[found > 1e-9]
    np.testing.assert_allclose(taken, taken[0], atol=1e-6)
    assert (noised[found <= 1e-9] <= taken[0] + 1e-6).all()


def test_a_class_that_drowns_has_no_figure() -> None:
    table = drawn(np.random.default_rng(3), 100).astype(float)
    table[1] -= 20
    found = measure_noised(table[None], 5.0)
    assert found.auroc is found.auprc is found.balanced_accuracy is None
    assert found.class_counts[1] == 0


@pytest.mark.parametrize(
    ("shape", "noise"), [((2, 16), 1.0), ((1, 3, 16), 1.0), ((1, 2, 15), 1.0), ((1, 2, 16), -1.0)]
)
def test_what_is_no_histogram_is_refused(shape: tuple[int, ...], noise: float) -> None:
    with pytest.raises(MetricsInputInvalid):
        measure_noised(np.ones(shape), noise)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(MetricsInputInvalid):
        measure_noised(np.full((1, 2, 16), np.nan), 1.0)
