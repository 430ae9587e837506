from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloister_fl.errors import (
    EncodingOverflow,
    NotFinite,
    ParameterRefused,
    SecureAggregationError,
    WeightAboveCap,
)
from cloister_fl.secagg.fixed_point import decode, encode_into, scale_for
from cloister_fl.secagg.session import MAX_CLIP, MAX_WEIGHT, MIN_CLIP, MIN_WEIGHT, Session
from support.errors import is_of, raises
from support.secagg import Federation


def encoded(
    values: list[float] | NDArray[np.floating],
    *,
    weight: float = 1.0,
    clip: float = 1.0,
    scale: float = 2.0**20,
    saturate: bool = False,
    dtype: type = np.float32,
) -> NDArray[np.int32]:
    array = np.asarray(values, dtype)
    out = np.empty(array.size, np.uint32)
    encode_into(out, array, weight=weight, clip=clip, scale=scale, saturate=saturate)
    return out.view(np.int32)


@given(
    st.integers(3, 1000),
    st.floats(1e-3, 1000, allow_nan=False),
    st.floats(1e-6, 1e6, allow_nan=False),
)
def test_scale_is_the_largest_that_cannot_overflow(n: int, weight: float, clip: float) -> None:
    try:
        scale = scale_for(n, weight, clip)
    except SecureAggregationError as error:
        if not is_of(error, ParameterRefused):
            raise
        return
    w, c = Fraction(weight), Fraction(clip)

    def sum_of(s: Fraction) -> Fraction:
        return n * (w * c * s + max(w, Fraction(1, 2)))

    assert sum_of(Fraction(scale)) < 2**31 <= sum_of(2 * Fraction(scale))
    if weight >= 0.5:
        assert n * w * (c * Fraction(scale) + 1) < 2**31
    # Every site at the bound: the true sum of what is sent still fits.
    top = encoded([clip], weight=weight, clip=clip, scale=scale, dtype=np.float64)[0]
    assert n * int(top) < 2**31


def test_small_weights_keep_room_for_rounding() -> None:
    """With w = 1/1000 the rounding alone of 1,000 sites is 500 units, not 1."""
    scale = scale_for(1000, 1e-3, 1.0)
    assert 1000 * (Fraction(1e-3) * Fraction(scale) + Fraction(1, 2)) < 2**31


def test_rounds_to_nearest_ties_to_even() -> None:
    assert list(encoded([0.5, 1.5, 2.5, -0.5, -1.5, 0.49], scale=1.0, clip=4.0)) == [
        0, 2, 2, 0, -2, 0,
    ]  # fmt: skip


def test_two_s_complement() -> None:
    out = np.empty(2, np.uint32)
    encode_into(out, np.array([-1.0, 1.0], np.float32), weight=1, clip=1, scale=1.0, saturate=False)
    assert list(out) == [2**32 - 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges_of_the_clip(dtype: type) -> None:
    assert list(encoded([1.0, -1.0], dtype=dtype)) == [2**20, -(2**20)]
    for value in (1.01, -1.01):
        with pytest.raises(EncodingOverflow):
            encoded([0.0, value], dtype=dtype)
    assert list(encoded([1.01, -1e30, 0.5], saturate=True, dtype=dtype)) == [
        2**20,
        -(2**20),
        2**19,
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_not_finite(value: float, saturate: bool, place: int) -> None:
    values = np.zeros(100_000, np.float32)
    values[place] = value
    with pytest.raises(NotFinite) as caught:
        encoded(values, saturate=saturate)
    # The same words wherever and whatever it was.
    assert str(caught.value) == (
        "CLO-720: The update is not finite. Training probably diverged; nothing was sent. "
        "Lower training.learning_rate in the study."
    )


def test_largest_floats_saturate() -> None:
    top = float(np.finfo(np.float32).max)
    assert list(encoded([top, -top], saturate=True)) == [2**20, -(2**20)]


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50),
    st.sampled_from([1.0, 2.0, 0.25]),
)
def test_short_path_gives_the_same_integers(values: list[float], weight: float) -> None:
    single = encoded(values, weight=weight, scale=2.0**24)
    double = encoded(values, weight=weight, scale=2.0**24, dtype=np.float64)
    assert np.array_equal(single, double)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_decoding_is_within_half_a_unit(values: list[float]) -> None:
    scale = scale_for(5, 1.0, 1.0)
    back = decode(encoded(values, scale=scale).view(np.uint32), divisor=scale)
    assert np.abs(back - np.asarray(values)).max() <= 0.5 / scale + 2**-24


def test_error_of_a_mean_over_ten_sites() -> None:
    federation = Federation(10, dimension=200_000)
    aggregate = federation.run()
    exact = np.mean([federation.updates[n].astype(np.float64) for n in federation.names], axis=0)
    assert np.sqrt(np.mean((aggregate.mean() - exact) ** 2)) <= 2e-8
    quantised = aggregate.total.view(np.int32) / (aggregate.scale * aggregate.weight)
    assert np.sqrt(np.mean((quantised - exact) ** 2)) <= 2e-9


def test_weighted_mean() -> None:
    weights = {"site-01": 0.3, "site-02": 2.5, "site-05": 7.0}
    federation = Federation(5, weights=weights, dimension=5000)
    for drop, gone in (({}, ()), ({2: ["site-02"]}, ("site-02",))):
        federation = Federation(5, weights=weights, dimension=5000)
        aggregate = federation.run(drop=drop)
        kept = [name for name in federation.names if name not in gone]
        w = np.array([weights.get(name, 1.0) for name in kept])
        x = np.array([federation.updates[name].astype(np.float64) for name in kept])
        assert np.abs(aggregate.mean() - w @ x / w.sum()).max() < 1e-7
        assert np.abs(aggregate.sum() - w @ x).max() < 1e-6


@pytest.mark.parametrize("weight", [0.0, -1.0, 9e-4, 1000.5, float("nan"), float("inf")])
def test_weight_above_the_cap(weight: float) -> None:
    federation = Federation(5)
    weights = (("site-01", weight), *federation.weights[1:])
    with raises(WeightAboveCap):
        federation.session(weights=weights)


@pytest.mark.parametrize("clip", [MIN_CLIP, 1.0, 2.0**19, MAX_CLIP])
@pytest.mark.parametrize("n", [3, 5, 100, 1000])
def test_the_least_weight_beside_the_largest_is_not_encoded_as_0(n: int, clip: float) -> None:
    """And neither bound gives a scale that floating point cannot hold."""
    names = [f"site-{number:04d}" for number in range(n)]
    weights = ((names[0], MIN_WEIGHT), *((name, MAX_WEIGHT) for name in names[1:]))
    session = Session(0, 0, bytes(32), 1, clip, weights)
    out = np.zeros(1, np.uint32)
    encode_into(
        out, np.array([clip]), weight=MIN_WEIGHT, clip=clip, scale=session.scale, saturate=False
    )
    assert 1 <= out[0] < 2**31 / n


def test_full_range_at_every_site() -> None:
    """All sites at the clip, at the largest weights: the sum does not wrap."""
    weights = {f"site-{number:02d}": 1000.0 for number in range(1, 8)}
    federation = Federation(7, weights=weights, clip=0.7, dimension=10)
    for name in federation.names:
        federation.updates[name][:] = 0.7
    aggregate = federation.run()
    assert np.allclose(aggregate.mean(), 0.7, atol=1e-5)
