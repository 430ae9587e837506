"""Writes the published vectors.

From the repository's root: ``PYTHONPATH=tests python -m support.secagg_vectors``.

A file holds a whole round: seeds, drawn secrets, updates, every message in order, the sum.
Randomness is SHA-256(seed || counter) with an eight-byte big-endian counter from 0, each draw
starting a new block; a site draws b (32 bytes), enc_sk (32), mask_sk (32), then 65 bytes for each
of the t - 1 coefficients of b's polynomial, then of mask_sk's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.transcript import Transcript
from support.secagg import Federation, over

FOLDER = Path(__file__).parents[1] / "vectors" / "secagg"
SEED = b"secagg/v2 vectors "
DIMENSION = 16

CASES = {
    "n3": (3, 0, ()),
    "n5": (5, 1, ()),
    "n5-dropout": (5, 1, ("site-02",)),
    "n7": (7, 1, ()),
    "n7-dropouts": (7, 1, ("site-03", "site-07")),
}


def play(name: str) -> str:
    """The transcript of one case, as JSON."""
    n, colluders, absent = CASES[name]
    weights = {"site-01": 2.0, "site-03": 0.75}
    federation = Federation(
        n, colluders=colluders, dimension=DIMENSION, seed=SEED + name.encode(), weights=weights
    )
    session = federation.session(round_number=3, attempt=1)
    server = ServerEpoch(federation.terms(9), federation.roster)
    sites: dict[str, dict[str, object]] = {}
    transcript = Transcript(
        federation.roster,
        {
            "randomness": "SHA-256(seed || 8-byte counter), a new block for each draw",
            "study": federation.terms().study.hex(),
            "model": session.model.hex(),
            "clip": session.clip,
            "sites": sites,
        },
    )
    request = server.advertise_request()
    for site in federation.names:
        transcript.record("to site", site, request)
        record = federation.sites[site].advertise(over(request))
        transcript.record("to server", site, record)
        server.receive_advertisement(record)
        epoch = federation.sites[site]._epochs[server.terms.kid]
        sites[site] = {
            "identity": hashlib.sha256(b"identity" + site.encode()).hexdigest(),
            "seed": (SEED + name.encode() + site.encode()).hex(),
            "b": bytes(epoch._b).hex(),
            "enc_sk": bytes(epoch._enc_sk).hex(),
            "mask_sk": bytes(epoch._mask_sk).hex(),
            "weight": session.weight(site),
            "update": [float(value) for value in federation.updates[site]],
        }
    share = server.share_request()
    for site in federation.names:
        transcript.record("to site", site, share)
        shares = federation.sites[site].share(over(share))
        transcript.record("to server", site, shares)
        server.receive_shares(shares)
    for site in server.start(session):
        mask = server.mask_request(site)
        transcript.record("to site", site, mask)
        if site not in absent:
            federation.sites[site].open(over(mask), session)
            update = federation.updates[site]
            masked = federation.sites[site].mask(mask.kid, update, saturate=False)
            transcript.record("to server", site, masked)
            server.receive_masked(masked)
    consistency = server.close_vectors()
    if consistency is not None:
        for site in consistency.u3:
            transcript.record("to site", site, consistency)
            consent = federation.sites[site].consent(over(consistency))
            transcript.record("to server", site, consent)
            server.receive_consistent(consent)
    unmask = server.unmask_request()
    for site in unmask.u3:
        transcript.record("to site", site, unmask)
        reply = federation.sites[site].unmask(over(unmask))
        transcript.record("to server", site, reply)
        server.receive_unmasked(reply)
    return transcript.to_json(server.finish()) + "\n"


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(play(case), encoding="utf-8")
