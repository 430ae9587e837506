from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from cloister_fl.simulation.phantom import (
    DOTS,
    ONE_STRAND,
    TWO_STRANDS,
    CaseMix,
    Mark,
    Scanner,
    draw_patient,
    expose,
    shatter,
)
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS

SCANNER = Scanner(96, 80, 12, gain=0.7, offset=0.1, gamma=1.0, noise=0.02)
SCANNERS = (
    SCANNER,
    Scanner(128, 112, 14, gain=0.6, offset=0.10, gamma=0.8, noise=0.03),
    Scanner(96, 98, 10, gain=0.95, offset=0.0, gamma=1.2, noise=0.035),
)


def _density(marks: tuple[Mark, ...], side: int = 400) -> np.ndarray:
    axis = (np.arange(side) + 0.5) * (2.0 / side) - 1.0
    x, y = np.meshgrid(axis, axis)
    total = np.zeros((side, side))
    for mark in marks:
        cosine, sine = math.cos(mark.angle), math.sin(mark.angle)
        along = ((x - mark.x) * cosine + (y - mark.y) * sine) / mark.along
        aside = ((y - mark.y) * cosine - (x - mark.x) * sine) / mark.across
        total += mark.contrast * np.exp(-0.5 * (along**2 + aside**2))
    return total


def test_same_seed_same_pixels_and_another_seed_others() -> None:
    def take(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return expose(draw_patient(rng, positive=True), SCANNER, rng)

    assert np.array_equal(take(3), take(3))
    assert not np.array_equal(take(3), take(4))


@pytest.mark.parametrize("scanner", SCANNERS)
def test_stored_values_fit_the_scanner(scanner: Scanner) -> None:
    rng = np.random.default_rng(0)
    image = expose(draw_patient(rng, positive=False), scanner, rng)
    highest = (1 << scanner.bits_stored) - 1
    assert image.shape == (scanner.rows, scanner.columns)
    assert image.dtype == np.uint16
    assert image.min() >= math.floor(scanner.offset * highest)
    assert image.max() <= math.ceil((scanner.offset + scanner.gain) * highest)
    assert image.std() > 0.05 * scanner.gain * highest


def test_a_lesion_exactly_in_positive_patients() -> None:
    rng = np.random.default_rng(1)
    for positive in (True, False) * 20:
        patient = draw_patient(rng, positive=positive)
        assert bool(patient.lesion) is positive
        assert bool(patient.mimics) is not positive


def test_the_lesion_is_what_brightens_its_place() -> None:
    rng = np.random.default_rng(2)
    scanner = replace(SCANNER, noise=0.0, exposure_spread=0.0)
    patient = draw_patient(rng, positive=True)
    bare = replace(patient, lesion=())
    lit = expose(patient, scanner, np.random.default_rng(9)).astype(float)
    dark = expose(bare, scanner, np.random.default_rng(9)).astype(float)
    row, column = np.unravel_index(np.argmax(lit - dark), lit.shape)
    aspect = scanner.columns / scanner.rows
    x = ((column + 0.5) * 2.0 / scanner.columns - 1.0) * aspect
    y = (row + 0.5) * 2.0 / scanner.rows - 1.0
    core = patient.lesion[0]
    # A view may shift by 0.07 and zoom by 5 %; a lobe may move the peak by a fraction of a radius.
    assert math.hypot(x - core.x, y - core.y) < 0.20
    rise = (lit - dark).max() / (scanner.gain * ((1 << scanner.bits_stored) - 1))
    assert 0.8 * core.contrast < rise < 1.7 * core.contrast


def test_views_of_one_patient_differ() -> None:
    rng = np.random.default_rng(5)
    patient = draw_patient(rng, positive=True)
    assert not np.array_equal(expose(patient, SCANNER, rng), expose(patient, SCANNER, rng))


def _mass(mark: Mark) -> float:
    """Integrated density: what the mark adds to the image's sum, free of its shape."""
    return 2.0 * math.pi * mark.along * mark.across * mark.contrast


def test_a_mimic_keeps_mass_peak_and_histogram_and_loses_the_shape() -> None:
    rng = np.random.default_rng(6)
    nodule = Mark(0.0, 0.0, 0.08, 0.07, 0.4, 0.3)
    compact = _density((nodule,))
    kinds = set()
    for _ in range(40):
        parts = shatter(rng, nodule)
        kinds.add(len(parts))
        assert sum(map(_mass, parts)) == pytest.approx(_mass(nodule))
        assert all(part.contrast == nodule.contrast for part in parts)
        thin = min(part.across for part in parts)
        assert thin <= 0.51 * math.sqrt(nodule.along * nodule.across)
        assert _density(parts).sum() == pytest.approx(compact.sum(), rel=0.01)
        if len(parts) == 1:
            for level in (0.05, 0.1, 0.2, 0.27):
                area = (compact > level).sum()
                # Counting pixels along a thin outline is good to a few of them.
                assert (_density(parts) > level).sum() == pytest.approx(area, rel=0.03, abs=8)
    assert kinds == {1, 2, 4}


@pytest.mark.parametrize(("mix", "parts"), [(ONE_STRAND, 1), (TWO_STRANDS, 2), (DOTS, 4)])
def test_a_mix_of_one_kind_gives_that_kind(mix: CaseMix, parts: int) -> None:
    rng = np.random.default_rng(8)
    nodule = Mark(0.0, 0.0, 0.08, 0.07, 0.4, 0.3)
    assert {len(shatter(rng, nodule, mix)) for _ in range(20)} == {parts}


@pytest.mark.parametrize(
    "change",
    [{"rows": 8}, {"bits_stored": 17}, {"gain": 0.0}, {"offset": -0.1}, {"offset": 0.5}],
)
def test_an_impossible_scanner_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"scanner|bits_stored|gain"):
        replace(SCANNER, **change)


@pytest.mark.slow
def test_intensity_and_scanner_alone_tell_nothing() -> None:
    rng = np.random.default_rng(7)
    # The hospitals differ in prevalence in training and not in the hold-out, as in the demo.
    features, labels, held = [], [], []
    for place, hospital in enumerate(HOSPITALS):
        scanner = hospital.scanner
        for number in range(200):
            hold = number >= 100
            positive = bool(rng.random() < (0.5 if hold else hospital.prevalence))
            patient = draw_patient(rng, positive=positive, mix=hospital.mix)
            image = expose(patient, scanner, rng).astype(float)
            image /= (1 << scanner.bits_stored) - 1
            low, high = np.percentile(image, (1, 99))
            windowed = np.clip((image - low) / (high - low), 0.0, 1.0)
            row = [float(place == each) for each in range(len(HOSPITALS))]
            for values in (image, windowed):
                row += [values.mean(), values.std()]
                row += list(np.percentile(values, (1, 5, 10, 25, 50, 75, 90, 95, 99)))
            features.append(row)
            labels.append(positive)
            held.append(hold)
    table, truth, hold_out = np.array(features), np.array(labels), np.array(held)
    scale = StandardScaler().fit(table[~hold_out])
    model = LogisticRegression(max_iter=5000).fit(
        scale.transform(table[~hold_out]), truth[~hold_out]
    )
    scores = model.predict_proba(scale.transform(table[hold_out]))[:, 1]
    assert 0.4 < roc_auc_score(truth[hold_out], scores) < 0.6
