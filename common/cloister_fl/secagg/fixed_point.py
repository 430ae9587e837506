"""Fixed point in Z_2^32, two's complement: reals that sum without carrying a float's order.

The sum of integers modulo 2^32 is exact, so whatever the sites' masks and order of arrival, the
server reads the sum of the encodings and nothing is lost but one rounding a site.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl.errors import EncodingOverflow, NotFinite, ParameterRefused

CHUNK = 1 << 16
"""Coordinates that are encoded or decoded at a time; the scratch stays in a core's cache."""

_LIMIT = 1 << 31


def scale_for(n: int, largest_weight: float, clip: float) -> float:
    """The largest power of two that no sum of n encodings can overflow.

    ``n * w * (clip * scale + 1) < 2**31`` with w the largest weight, in exact arithmetic. One
    rounding moves an encoding by up to 1/2 whatever its weight, so for w < 1/2 the term
    ``n * w * 1`` would not cover it and ``n / 2`` takes its place.

    Args:
        n: sites that may be summed.
        largest_weight: largest public weight.
        clip: bound of the absolute value of a coordinate.

    Raises:
        ParameterRefused: no scale fits.
    """
    weight = Fraction(largest_weight)
    room = (Fraction(_LIMIT) / n - max(weight, Fraction(1, 2))) / (weight * Fraction(clip))
    if room <= 0:
        raise ParameterRefused(
            f"The sum of {n} sites with these weights does not fit into 32 bits.",
            remedy="Lower aggregation.clip or aggregation.weights in the study.",
        )
    exponent = room.numerator.bit_length() - room.denominator.bit_length() - 1
    while Fraction(2) ** (exponent + 1) < room:
        exponent += 1
    while Fraction(2) ** exponent >= room:
        exponent -= 1
    return math.ldexp(1.0, exponent)


def encode_into(
    out: NDArray[np.uint32],
    values: NDArray[Any],
    *,
    weight: float,
    clip: float,
    scale: float,
    saturate: bool,
) -> None:
    """Write ``round(weight * values * scale)`` modulo 2**32 to ``out``, ties to even.

    Args:
        out: D coordinates, overwritten.
        values: D floats, float32 or float64.
        weight: the site's public weight.
        clip: bound of a coordinate of ``values``.
        scale: units to one, a power of two.
        saturate: True where the values were noised and charged: those outside the clip are cut
            to it, for a refusal that depends on data is a release. False refuses them.

    Raises:
        NotFinite: a NaN or an infinity; no detail is given, for it would depend on data.
        EncodingOverflow: a value outside the clip, where ``saturate`` is False.
    """
    factor = weight * scale
    limit = float(np.rint(clip * factor))
    # Scaling by a power of two is exact in float32, so the short path gives the same integers.
    short = values.dtype == np.float32 and math.frexp(factor)[0] == 0.5
    scratch = np.empty(min(CHUNK, max(1, values.size)), np.float32 if short else np.float64)
    signed = out.view(np.int32)
    for start in range(0, values.size, CHUNK):
        piece = values[start : start + CHUNK]
        low, high = float(piece.min()), float(piece.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFinite(
                "The update is not finite.",
                why="Training probably diverged; nothing was sent.",
                remedy="Lower training.learning_rate in the study.",
            )
        target = signed[start : start + CHUNK]
        if float(np.rint(max(-low, high) * factor)) > limit:
            if not saturate:
                raise EncodingOverflow(
                    "A value of the update lies outside the agreed range.",
                    remedy="Raise aggregation.clip, or lower training.learning_rate in the study.",
                )
            wide = np.clip(piece.astype(np.float64) * factor, -limit, limit)
            np.copyto(target, np.rint(wide), casting="unsafe")
            continue
        work = scratch[: piece.size]
        np.multiply(piece, work.dtype.type(factor), out=work)
        np.rint(work, out=work)
        np.copyto(target, work, casting="unsafe")


def decode(total: NDArray[np.uint32], *, divisor: float) -> NDArray[np.float32]:
    """Read a sum of encodings as signed and divide it; float32, D coordinates.

    Args:
        total: the sum modulo 2**32.
        divisor: ``scale`` for the weighted sum, ``scale * (sum of weights)`` for the mean.
    """
    out = np.empty(total.size, np.float32)
    signed = total.view(np.int32)
    scratch = np.empty(min(CHUNK, max(1, total.size)), np.float64)
    for start in range(0, total.size, CHUNK):
        piece = signed[start : start + CHUNK]
        work = scratch[: piece.size]
        np.multiply(piece, 1.0 / divisor, out=work)
        np.copyto(out[start : start + CHUNK], work, casting="same_kind")
    return out
