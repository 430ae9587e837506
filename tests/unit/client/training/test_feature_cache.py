"""Features of a frozen part: once an image, of that image alone, and the same scores as without."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.training import feature_cache
from cloister_fl.client.training.evaluation import answers_for
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.sampling import Bag, pixels_of
from cloister_fl.networks.flat_parameters import load
from cloister_fl.networks.frozen_backbone import FrozenBackbone
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network
from support.cohorts import TASK


@dataclass(frozen=True)
class Some:
    images: NDArray[np.uint16]
    features: Features = field(default_factory=Features)
    patients: tuple[()] = ()
    targets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def cohort(count: int, seed: int = 0) -> Some:
    pixels = np.random.default_rng(seed).integers(0, 65536, (count, 32, 32))
    return Some(pixels.astype(np.uint16))


def pretrained_network() -> FrozenBackbone:
    module = build(Network(name="efficientnet-lite0"), 2, 1, size=32, seed=0)
    assert isinstance(module, FrozenBackbone)
    load(module, np.random.default_rng(5).normal(0, 3, 1281).astype(np.float32))
    return module


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places that were computed."""
    places: list[int] = []
    honest = feature_cache._compute
    monkeypatch.setattr(
        feature_cache, "_compute", lambda m, c, place: places.append(place) or honest(m, c, place)
    )
    return places


def test_an_image_is_computed_once_however_the_cohort_is_divided(computed: list[int]) -> None:
    module, whole = pretrained_network(), cohort(5)
    first = features_of(module, whole).images
    assert first.shape == (5, 1280)
    assert features_of(pretrained_network(), whole).images is first
    part = features_of(module, Some(whole.images[[4, 1]], whole.features.part())).images
    np.testing.assert_array_equal(part, first[[4, 1]])
    assert computed == [0, 1, 2, 3, 4]


def test_features_do_not_depend_on_who_else_is_there(computed: list[int]) -> None:
    module, whole = pretrained_network(), cohort(4)
    together = features_of(module, whole).images
    alone = features_of(module, Some(whole.images[3:])).images
    assert alone.tobytes() == together[3:].tobytes()
    assert computed == [0, 1, 2, 3, 0]


def test_another_network_has_features_of_its_own(computed: list[int]) -> None:
    whole = cohort(1)
    first = features_of(pretrained_network(), whole).images
    bank = features_of(build(Network(name="filter-bank"), 2, 1, size=32, seed=0), whole).images
    assert bank.shape == (1, 12, 8, 8)
    assert features_of(pretrained_network(), whole).images is first
    assert computed == [0, 0]


def test_what_is_no_longer_used_goes(computed: list[int]) -> None:
    rows = Rows(2 * 1280 * 4)
    module, whole = pretrained_network(), Some(cohort(3).images, Features(rows))
    seen = weakref.ref(features_of(module, whole).images)
    assert len(rows) == 2
    assert seen() is not None
    features_of(module, Some(whole.images[1:], Features(rows)))
    assert computed == [0, 1, 2]
    features_of(module, Some(whole.images[:1], Features(rows)))
    assert computed == [0, 1, 2, 0]
    del whole
    gc.collect()
    assert seen() is None


def test_the_least_recently_used_row_goes() -> None:
    rows, row = Rows(8), np.zeros(1, np.float32)
    rows.keep(b"a", row)
    rows.keep(b"b", row)
    assert rows.get(b"a") is row
    rows.keep(b"c", row)
    assert [rows.get(key) is row for key in (b"a", b"b", b"c")] == [True, False, True]


def test_nothing_outlives_its_cohort_and_no_cohort_sees_anothers(computed: list[int]) -> None:
    module, whole = pretrained_network(), cohort(2)
    features_of(module, whole)
    features_of(module, Some(whole.images))
    assert computed == [0, 1, 0, 1]


def test_scores_are_those_of_the_whole_network(computed: list[int]) -> None:
    module, whole = pretrained_network(), cohort(3)
    with torch.no_grad():
        logits = module(pixels_of(whole, [Bag(np.arange(3))])).double()
    scores = answers_for(module, whole, TASK)
    np.testing.assert_allclose(scores, torch.softmax(logits, dim=1).numpy(), atol=1e-6)
    assert np.ptp(scores[:, 1]) > 1e-3
    answers_for(module, whole, TASK)
    assert computed == [0, 1, 2]


@pytest.mark.parametrize("place", [0, 2])
def test_what_fails_for_one_image_costs_its_patient_alone(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody was absent for the answer."""
    module, seen = pretrained_network(), cohort(4)
    expected = features_of(module, cohort(4)).images
    honest = feature_cache._compute

    def failing(m: FrozenBackbone, c: Some, at: int) -> NDArray[np.float32]:
        if at == place:
            raise MemoryError
        return honest(m, c, at)

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_compute", failing)
        with pytest.raises(MemoryError):
            features_of(module, seen)
        told: list[Exception] = []
        found = features_of(module, seen, told.append).images
        assert [type(error) for error in told] == [MemoryError]
    others = [at for at in range(4) if at != place]
    np.testing.assert_array_equal(found[others], expected[others])
    assert np.isnan(found[place]).all()
    # What failed once is not kept.
    np.testing.assert_array_equal(features_of(module, seen).images, expected)
