"""What the server saw looks like noise: no correlation with an update, uniform bytes.

Seeds are fixed, so a run that passes passes again. Every p-value must be above 1e-6 divided by
the number of tests made (Bonferroni).
"""

from __future__ import annotations

import math

import numpy as np

from cloister_fl.secagg.messages.codec import Masked, decode
from support.secagg import Federation

DIMENSION = 200_000
ALPHA = 1e-6


def two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square_p(counts: np.ndarray) -> float:
    """Upper tail by Wilson and Hilferty's cube root, good to a few per cent for 255 degrees."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    k = counts.size - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return math.erfc(z / math.sqrt(2)) / 2


def test_what_the_server_saw() -> None:
    federation = Federation(5, seed=b"distinguisher", dimension=DIMENSION)
    # Updates with structure: few bits, all alike, far from uniform.
    base = np.sin(np.arange(DIMENSION) / 50).astype(np.float32)
    for number, name in enumerate(federation.names):
        federation.updates[name] = base * np.float32(0.2 * (number + 1))
    aggregate = federation.run(drop={2: ["site-05"]})
    assert np.array_equal(aggregate.total, federation.true_total(aggregate.survivors))
    seen = [m for data in federation.sent if isinstance(m := decode(data), Masked)]
    vectors = {m.site: np.frombuffer(m.vector, "<u4") for m in seen}
    assert len(vectors) == 4

    p_values = []
    for site, vector in vectors.items():
        signed = vector.view(np.int32).astype(np.float64)
        for update in federation.updates.values():
            r = float(np.corrcoef(signed, update)[0, 1])
            p_values.append(two_sided(r * math.sqrt(DIMENSION)))
        for place in range(4):
            octets = (vector >> np.uint32(8 * place)) & np.uint32(255)
            p_values.append(chi_square_p(np.bincount(octets, minlength=256)))
        for other, second in vectors.items():
            if other > site:
                # Neither do sums or differences of two of them.
                for pair in (vector + second, vector - second):
                    p_values.append(chi_square_p(np.bincount(pair >> 24, minlength=256)))
                    r = float(np.corrcoef(pair.view(np.int32).astype(np.float64), base)[0, 1])
                    p_values.append(two_sided(r * math.sqrt(DIMENSION)))
    assert min(p_values) > ALPHA / len(p_values), min(p_values)


def test_the_distinguisher_sees_an_unmasked_vector() -> None:
    """The same tests on the encodings themselves: the power is there."""
    federation = Federation(5, dimension=DIMENSION)
    vector = federation.encoding("site-01")
    r = float(
        np.corrcoef(vector.view(np.int32).astype(np.float64), federation.updates["site-01"])[0, 1]
    )
    assert two_sided(r * math.sqrt(DIMENSION)) < ALPHA
    assert chi_square_p(np.bincount(vector >> 24, minlength=256)) < ALPHA


def test_the_whole_sum_is_not_noise_until_all_are_in() -> None:
    """All but one vector, all pair masks with that one still in: uniform."""
    federation = Federation(5, seed=b"partial", dimension=DIMENSION)
    federation.run()
    seen = [m for data in federation.sent if isinstance(m := decode(data), Masked)]
    partial = sum((np.frombuffer(m.vector, "<u4") for m in seen[:-1]), np.zeros(1, np.uint32))
    assert chi_square_p(np.bincount(partial >> 24, minlength=256)) > ALPHA
