"""Metrics against scikit-learn, against brute force, and against their own laws."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from cloister_fl.metrics.classification import (
    BINS,
    histogram,
    measure,
    measure_histogram,
)
from cloister_fl.metrics.figures import Metrics, MetricsInputInvalid, of_classes

FIGURES = ("auroc", "auprc", "balanced_accuracy")
"""Figures that are compared with another implementation here; there may be more."""


def two_columns(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([1 - scores, scores], axis=1)


def cohort(patients: int, seed: int, shift: float = 0.2) -> tuple[NDArray[np.int64], NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(patients) % 2
    return labels, np.clip(rng.normal(0.4 + shift * labels, 0.2), 0, 1)


def values(metrics: Metrics) -> dict[str, float]:
    return {name: getattr(metrics, name).value for name in FIGURES}


def brute_auroc(labels: NDArray, scores: NDArray) -> float:
    pairs = [
        1.0 if one > zero else 0.5 if one == zero else 0.0
        for one in scores[labels == 1]
        for zero in scores[labels == 0]
    ]
    return float(np.mean(pairs))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [1, 2, 15])
def test_binary_equals_scikit_learn(seed: int, digits: int) -> None:
    labels, scores = cohort(157, seed)
    scores = np.round(scores, digits)
    metrics = measure(labels, two_columns(scores))
    assert values(metrics) == pytest.approx(
        {
            "auroc": roc_auc_score(labels, scores),
            "auprc": average_precision_score(labels, scores),
            "balanced_accuracy": balanced_accuracy_score(labels, scores >= 0.5),
        },
        abs=1e-12,
    )
    assert metrics.patients == 157
    assert metrics.class_counts == (79, 78)


@pytest.mark.parametrize("classes", [3, 5])
def test_multi_class_equals_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    probs = rng.dirichlet(np.ones(classes), 200)
    probs[np.arange(200), labels] += 0.3
    probs /= probs.sum(axis=1, keepdims=True)
    expected = {
        "auroc": roc_auc_score(labels, probs, multi_class="ovr", average="macro"),
        "auprc": np.mean(
            [average_precision_score(labels == k, probs[:, k]) for k in range(classes)]
        ),
        "balanced_accuracy": balanced_accuracy_score(labels, probs.argmax(axis=1)),
    }
    assert values(measure(labels, probs)) == pytest.approx(expected, abs=1e-12)


_SCORES = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=40).filter(
    lambda rows: len({label for label, _ in rows}) == 2
)


@given(_SCORES)
@settings(max_examples=60, deadline=None)
def test_ties_count_half(rows: list[tuple[bool, int]]) -> None:
    labels = np.array([int(label) for label, _ in rows])
    scores = np.array([score / 8 for _, score in rows])
    area = measure(labels, two_columns(scores)).auroc
    assert area is not None
    assert area.value == pytest.approx(brute_auroc(labels, scores), abs=1e-12)


@given(_SCORES)
@settings(max_examples=40, deadline=None)
def test_a_rising_map_of_the_scores_changes_no_rank_figure(rows: list[tuple[bool, int]]) -> None:
    labels = np.array([int(label) for label, _ in rows])
    scores = np.array([score / 8 for _, score in rows])
    plain = measure(labels, two_columns(scores))
    mapped = measure(labels, two_columns(0.1 + 0.5 * scores**3))
    assert (plain.auroc, plain.auprc) == (mapped.auroc, mapped.auprc)


@given(_SCORES)
@settings(max_examples=40, deadline=None)
def test_intervals_hold_the_value_and_stay_in_range(rows: list[tuple[bool, int]]) -> None:
    labels = np.array([int(label) for label, _ in rows])
    scores = np.array([score / 8 for _, score in rows])
    for metrics in (
        measure(labels, two_columns(scores)),
        measure_histogram(histogram(labels, scores)),
    ):
        for name in FIGURES:
            found = getattr(metrics, name)
            assert 0 <= found.low <= found.value <= found.high <= 1


def test_reversed_scores_mirror_auroc() -> None:
    labels, scores = cohort(80, 1)
    there = measure(labels, two_columns(scores)).auroc
    back = measure(labels, two_columns(1 - scores)).auroc
    assert there is not None
    assert back is not None
    assert there.value + back.value == pytest.approx(1, abs=1e-12)


def test_order_of_patients_does_not_matter() -> None:
    labels, scores = cohort(101, 2)
    order = np.random.default_rng(0).permutation(101)
    plain = measure(labels, two_columns(scores))
    mixed = measure(labels[order], two_columns(scores[order]))
    assert values(plain) == pytest.approx(values(mixed), abs=1e-12)


def test_the_same_input_gives_the_same_interval() -> None:
    labels, scores = cohort(60, 3)
    assert measure(labels, two_columns(scores)) == measure(labels, two_columns(scores))


@pytest.mark.long
def test_bootstrap_agrees_with_resampling_by_hand() -> None:
    labels, scores = cohort(120, 4)
    rng = np.random.default_rng(9)
    groups = [np.flatnonzero(labels == k) for k in (0, 1)]
    drawn: list[list[float]] = []
    for _ in range(1200):
        zeros, ones = (scores[rng.choice(group, len(group))] for group in groups)
        one = np.repeat([0, 1], [len(zeros), len(ones)])
        both = np.concatenate([zeros, ones])
        area = np.mean((ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros))
        # Average precision, straight from its definition: precision at the score of each hit.
        precision = [np.mean(one[both >= hit]) for hit in ones]
        drawn.append([area, np.mean(precision), np.mean(one == (both >= 0.5))])
    expected = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    metrics = measure(labels, two_columns(scores))
    for column, name in enumerate(FIGURES):
        found = getattr(metrics, name)
        assert found.low == pytest.approx(expected[0, column], abs=0.015)
        assert found.high == pytest.approx(expected[1, column], abs=0.015)


@pytest.mark.long
def test_auroc_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Two normals one deviation apart: the true area is Phi(1 / sqrt 2) = 0.760.
    rng = np.random.default_rng(5)
    hits = {"bootstrap": 0, "counts": 0}
    labels = np.arange(120) % 2
    for _ in range(60):
        scores = 1 / (1 + np.exp(-rng.normal(labels.astype(float), 1.0)))
        by_patient = measure(labels, two_columns(scores)).auroc
        by_count = measure_histogram(histogram(labels, scores)).auroc
        assert by_patient is not None
        assert by_count is not None
        hits["bootstrap"] += by_patient.low <= 0.7602 <= by_patient.high
        hits["counts"] += by_count.low <= 0.7602 <= by_count.high
    # Binomial(60, .95) falls below 50 about twice in ten thousand; the seed is fixed.
    assert min(hits.values()) >= 50, hits


def test_more_patients_narrow_the_interval() -> None:
    widths = []
    for patients in (50, 200, 800):
        labels, scores = cohort(patients, 6)
        area = measure(labels, two_columns(scores)).auroc
        assert area is not None
        widths.append(area.high - area.low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = cohort(50, 7)
    whole = measure(labels, two_columns(scores)).auroc
    monkeypatch.setattr("cloister_fl.metrics.classification._CELLS", 50 * 7)
    parts = measure(labels, two_columns(scores)).auroc
    assert whole is not None
    assert parts is not None
    assert parts.value == whole.value
    assert parts.low == pytest.approx(whole.low, abs=0.02)


def test_fast_enough_for_every_round() -> None:
    labels, scores = cohort(600, 8)
    measure(labels, two_columns(scores))
    start = time.process_time()
    measure(labels, two_columns(scores))
    assert time.process_time() - start < 0.6  # about 0.06 s on an idle core


# Degenerate and malformed input


@pytest.mark.parametrize("labels", [[], [1, 1, 1], [0]])
def test_a_class_without_patients_leaves_figures_undefined(labels: list[int]) -> None:
    probs = np.full((len(labels), 2), 0.5)
    metrics = measure(np.array(labels, dtype=int), probs)
    assert (metrics.auroc, metrics.auprc, metrics.balanced_accuracy) == (None, None, None)
    assert metrics.patients == len(labels)
    by_count = measure_histogram(histogram(np.array(labels, dtype=int), probs[:, 1]))
    assert by_count == metrics


def test_a_missing_class_of_three_leaves_figures_undefined() -> None:
    assert measure([0, 1, 0, 1], np.full((4, 3), 1 / 3)).auroc is None


def test_one_patient_of_each_class() -> None:
    metrics = measure([0, 1], [[0.9, 0.1], [0.2, 0.8]])
    assert values(metrics) == {"auroc": 1.0, "auprc": 1.0, "balanced_accuracy": 1.0}


@pytest.mark.parametrize(
    ("labels", "probs"),
    [
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]]),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]]),
        ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]]),
        ([0], [[0.5, 0.5], [0.5, 0.5]]),
        ([0, 1], [0.5, 0.5]),
        ([0, 1], [[1.0], [1.0]]),
        ([0, 1], [[0.5, float("nan")], [0.5, 0.5]]),
        ([0, 1], [[0.5, float("inf")], [0.5, 0.5]]),
        ([0, 1], [[0.5, 1.1], [0.5, 0.5]]),
        ([[0, 1]], [[0.5, 0.5], [0.5, 0.5]]),
    ],
)
def test_malformed_input_is_refused(labels: object, probs: object) -> None:
    with pytest.raises(MetricsInputInvalid):
        measure(labels, probs)  # type: ignore[arg-type]


def test_float32_rounding_beyond_one_is_forgiven() -> None:
    probs = np.array([[0.0, 1.0000001], [1.0, -1e-7]], dtype=np.float32)
    assert measure([1, 0], probs).auroc is not None


def test_json_is_json() -> None:
    labels, scores = cohort(20, 10)
    told = json.loads(json.dumps(measure(labels, two_columns(scores)).to_json()))
    assert set(told) == {*of_classes(), "patients", "images", "class_counts"}
    assert {*FIGURES} <= {*of_classes()}
    assert set(told["auroc"]) == {"value", "low", "high"}
    assert json.loads(json.dumps(measure([1], [[0, 1]]).to_json()))["auroc"] is None


# Histograms


def test_histogram_counts_each_patient_once() -> None:
    counts = histogram([0, 0, 1, 1], [0.0, 0.49999, 0.5, 1.0], bins=4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert counts.dtype == np.int64


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_histogram_figures_equal_those_of_binned_scores(seed: int) -> None:
    labels, scores = cohort(90, seed)
    binned = np.minimum(np.floor(scores * BINS), BINS - 1) / BINS
    expected = {
        "auroc": roc_auc_score(labels, binned),
        "auprc": average_precision_score(labels, binned),
        "balanced_accuracy": balanced_accuracy_score(labels, scores >= 0.5),
    }
    found = measure_histogram(histogram(labels, scores))
    assert values(found) == pytest.approx(expected, abs=1e-12)
    assert found.class_counts == (45, 45)


def test_histogram_and_patient_bootstrap_give_like_intervals() -> None:
    labels, scores = cohort(300, 11)
    by_patient, by_count = (
        measure(labels, two_columns(scores)),
        measure_histogram(histogram(labels, scores)),
    )
    for name in FIGURES:
        one, other = getattr(by_patient, name), getattr(by_count, name)
        assert one.low == pytest.approx(other.low, abs=0.015)
        assert one.high == pytest.approx(other.high, abs=0.015)


def test_sums_of_histograms_measure_the_union() -> None:
    (ya, sa), (yb, sb) = cohort(60, 12), cohort(80, 13)
    together = histogram(np.concatenate([ya, yb]), np.concatenate([sa, sb]))
    assert measure_histogram(histogram(ya, sa) + histogram(yb, sb)) == measure_histogram(together)


def test_hanley_mcneil_standard_error_of_a_known_case() -> None:
    # A = 0.75 with 40 against 60: Q1 = .6, Q2 = 1.125 / 1.75, SE = 0.05082 by their formula.
    counts = np.zeros((2, 4), dtype=np.int64)
    counts[0] = [30, 0, 30, 0]
    counts[1] = [0, 20, 0, 20]
    area = measure_histogram(counts).auroc
    assert area is not None
    assert area.value == pytest.approx(0.75)
    q1, q2 = 0.6, 1.125 / 1.75
    error = ((0.1875 + 39 * (q1 - 0.5625) + 59 * (q2 - 0.5625)) / 2400) ** 0.5
    assert area.high - area.value == pytest.approx(1.959964 * error, rel=1e-6)


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((3, 4), int),
        np.zeros((2, 3), int),
        np.zeros(4, int),
        np.full((2, 4), 0.5),
        np.full((2, 4), -1),
    ],
)
def test_malformed_counts_are_refused(counts: NDArray) -> None:
    with pytest.raises(MetricsInputInvalid):
        measure_histogram(counts)


@pytest.mark.parametrize("bins", [0, 1, 7])
def test_an_odd_number_of_bins_is_refused(bins: int) -> None:
    with pytest.raises(MetricsInputInvalid):
        histogram([0, 1], [0.1, 0.9], bins=bins)


def test_histogram_refuses_labels_and_scores_out_of_range() -> None:
    with pytest.raises(MetricsInputInvalid):
        histogram([0, 2], [0.1, 0.9])
    with pytest.raises(MetricsInputInvalid):
        histogram([0, 1], [0.1, 1.9])
    with pytest.raises(MetricsInputInvalid):
        histogram([0, 1], [0.1])


# Several units of one patient


def _clustered(each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = np.arange(60) % 2
    scores = np.clip(0.5 + 0.15 * (2 * labels - 1) + rng.normal(0, 0.2, 60), 0, 1)
    probs = np.column_stack([1 - scores, scores])
    return np.repeat(labels, each), np.repeat(probs, each, axis=0), np.repeat(np.arange(60), each)


def test_one_unit_a_patient_is_measured_as_patients_are() -> None:
    labels, probs, patients = _clustered(1)
    assert measure(labels, probs, patients) == measure(labels, probs)


def test_examinations_that_repeat_a_patient_narrow_no_interval() -> None:
    """Five examinations that say the same of each patient are no five patients."""
    plain, five = (measure(*_clustered(each)) for each in (1, 5))
    assert plain.patients == five.patients == 60
    assert five.class_counts == (150, 150)
    for name, one in plain.figures.items():
        other = five.figures[name]
        assert one is not None
        assert other is not None
        assert (other.value, other.low, other.high) == pytest.approx(
            (one.value, one.low, one.high), abs=1e-12
        ), name
    labels, probs, _ = _clustered(5)
    as_patients = measure(labels, probs).auroc
    assert as_patients is not None
    assert five.auroc is not None
    assert as_patients.high - as_patients.low < 0.6 * (five.auroc.high - five.auroc.low)


def test_patients_with_both_classes_are_drawn_with_all_they_have() -> None:
    rng = np.random.default_rng(1)
    labels = np.tile([0, 1], 40)
    scores = np.clip(0.5 + 0.1 * (2 * labels - 1) + rng.normal(0, 0.2, 80), 0, 1)
    found = measure(labels, np.column_stack([1 - scores, scores]), np.repeat(np.arange(40), 2))
    assert found.patients == 40
    assert found.auroc is not None
    assert 0.02 < found.auroc.high - found.auroc.low < 0.4
    with pytest.raises(MetricsInputInvalid):
        measure([0, 1], [[1.0, 0.0], [0.0, 1.0]], [0])
    assert measure([1, 1], [[1.0, 0.0], [0.0, 1.0]], [3, 3]).patients == 1
