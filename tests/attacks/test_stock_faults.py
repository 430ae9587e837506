"""The faults measured in stock secure aggregation, each tried here."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.errors import EncodingOverflow, NotFinite
from cloister_fl.secagg.messages.codec import Abort, Masked, decode
from cloister_fl.secagg.participant import Site
from support.secagg import Federation, over

FIRST = "site-01"


def wire_of(federation: Federation, factor: float) -> list[bytes]:
    federation.updates[FIRST] = federation.updates[FIRST] * np.float32(factor)
    federation.run()
    return federation.sent


def test_counts_and_metrics_in_clear() -> None:
    """Another update at one site changes that site's vector on the wire, and nothing else."""
    one = wire_of(Federation(5, seed=b"same"), 1.0)
    other = wire_of(Federation(5, seed=b"same"), 0.5)
    assert [len(data) for data in one] == [len(data) for data in other]
    changed = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    assert len(changed) == 1
    before, after = decode(changed[0][0]), decode(changed[0][1])
    assert isinstance(before, Masked)
    assert isinstance(after, Masked)
    assert (before.site, before.sid, before.u2_hash) == (FIRST, after.sid, after.u2_hash)
    assert set(vars(before)) == {"sid", "site", "u2_hash", "vector", "signature", "consent"}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_dropout_before_the_vectors(stage: int) -> None:
    federation = Federation(5)
    aggregate = federation.run(drop={stage: ["site-03"]})
    assert "site-03" not in aggregate.survivors
    assert (aggregate.total == federation.true_total(aggregate.survivors)).all()


def opened(federation: Federation) -> tuple[Site, bytes]:
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request = over(server.mask_request(FIRST))
    federation.sites[FIRST].open(request, session)
    return federation.sites[FIRST], request.kid


def test_overflow_that_only_warns() -> None:
    federation = Federation(5)
    site, kid = opened(federation)
    federation.updates[FIRST][5] = 1.01
    with pytest.raises(EncodingOverflow) as caught:
        site.mask(kid, federation.updates[FIRST], saturate=False)
    federation.assert_no_secret()
    assert site.abort(kid, caught.value).code == "CLO-724"


def test_refusal_that_depends_on_data() -> None:
    """With noise in the update, a large value is cut, and NaN leaves no trace but a fault."""
    federation = Federation(5)
    site, kid = opened(federation)
    federation.updates[FIRST][5] = 1e30
    assert isinstance(site.mask(kid, federation.updates[FIRST], saturate=True), Masked)
    for value in (np.nan, np.inf, -np.inf):
        federation = Federation(5)
        site, kid = opened(federation)
        federation.updates[FIRST][5] = value
        with pytest.raises(NotFinite) as caught:
            site.mask(kid, federation.updates[FIRST], saturate=True)
        abort = over(site.abort(kid, caught.value))
        assert isinstance(abort, Abort)
        assert abort.code == "CLO-724"


def test_eight_bytes_a_parameter() -> None:
    federation = Federation(5, dimension=100_000)
    federation.run()
    vectors = [data for data in federation.sent if len(data) > 100_000]
    assert len(vectors) == 5
    assert all(len(data) < 4 * 100_000 + 500 for data in vectors)
