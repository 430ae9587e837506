"""Writes the published vectors.

From the repository's root: ``PYTHONPATH=tests python -m support.secagg_vectors``.

A file holds a whole round: seeds, drawn secrets, updates, every message in order, the sum. What
the fields mean, and how a site draws, is in docs/secure-aggregation.md, "The published rounds".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloister_fl.membership.roster import Roster
from cloister_fl.secagg.crypto import hashes
from cloister_fl.secagg.messages.codec import Complaint, Dealing, Message, Shares
from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.transcript import Direction, Transcript
from support.secagg import Federation, identity_of, identity_secret, over, roster_of, site_names

FOLDER = Path(__file__).parents[1] / "vectors" / "secagg"
SEED = b"secagg/v2 vectors "
DIMENSION = 16


@dataclass(frozen=True)
class Case:
    """One published round.

    Attributes:
        sites: ids of the invited sites.
        colluders: c.
        absent: sites that do not answer, by the stage from which on.
        unsound: a dealer, and the holder whose box it does not seal.
        silent: whether that dealer publishes nothing.
        before: the roster that was renewed, where one was.
        after: the roster in its place.
        rekeyed: sites that have another key since.
    """

    sites: tuple[str, ...]
    colluders: int = 1
    absent: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    unsound: tuple[str, str] | None = None
    silent: bool = False
    before: Roster | None = None
    after: Roster | None = None
    rekeyed: tuple[str, ...] = ()

    def gone(self, stage: int) -> set[str]:
        """Sites that do not answer at a stage."""
        return {site for since, sites in self.absent.items() if since <= stage for site in sites}


REKEYED = ("site-02",)
STAYED = ("site-01", "site-02", "site-03", "site-04", "site-05")

CASES = {
    "n3": Case(site_names(3), colluders=0),
    "n5": Case(site_names(5)),
    "n5-dropout": Case(site_names(5), absent={2: ("site-02",)}),
    "n5-late": Case(site_names(5), absent={4: ("site-04",)}),
    "n5-complaint": Case(site_names(5), unsound=("site-02", "site-01")),
    "n5-silent-dealer": Case(site_names(5), unsound=("site-02", "site-01"), silent=True),
    "n5-renewed": Case(
        ("site-01", "site-02", "site-03", "site-04", "site-07"),
        before=roster_of(site_names(6)),
        after=roster_of((*STAYED, "site-07"), serial=2, rekeyed=REKEYED),
        rekeyed=REKEYED,
    ),
    "n7": Case(site_names(7)),
    "n7-dropouts": Case(site_names(7), absent={2: ("site-03", "site-07")}),
    "n7-early": Case(site_names(7), absent={0: ("site-02",), 1: ("site-05",)}),
}


def play(name: str) -> str:
    """The transcript of one case, as JSON."""
    case = CASES[name]
    federation = Federation(
        len(case.sites),
        colluders=case.colluders,
        dimension=DIMENSION,
        seed=SEED + name.encode(),
        weights={"site-01": 2.0, "site-03": 0.75},
        names=case.sites,
        roster=case.after,
        rekeyed=case.rekeyed,
    )
    return _Play(name, case, federation).to_json()


class _Play:
    """A round under way, and what has been said in it."""

    def __init__(self, name: str, case: Case, federation: Federation) -> None:
        self.case, self.federation = case, federation
        self.session = federation.session(round_number=3, attempt=1)
        self.server = ServerEpoch(federation.terms(9), federation.roster)
        self.seed = SEED + name.encode()
        self.sites: dict[str, dict[str, object]] = {}
        notes: dict[str, object] = {
            "randomness": "SHA-256(seed || 8-byte counter), a new block for each draw",
            "study": federation.terms().study.hex(),
            "model": self.session.model.hex(),
            "clip": self.session.clip,
            "sites": self.sites,
        }
        if case.before is not None:
            notes["previous_roster"] = case.before.encode().hex()
        if case.unsound is not None:
            dealer, holder = case.unsound
            notes["unsound"] = {"dealer": dealer, "holder": holder, "box": bytes(82).hex()}
        self.transcript = Transcript(federation.roster, notes)

    def to_json(self) -> str:
        """Play the round to its end."""
        self.keys()
        self.shares()
        self.vectors()
        self.consents()
        self.unmasking()
        return self.transcript.to_json(self.server.finish()) + "\n"

    def note(self, direction: Direction, site: str, message: Message) -> Any:
        self.transcript.record(direction, site, message)
        return over(message)

    def keys(self) -> None:
        request = self.server.advertise_request()
        for site in self.federation.names:
            asked = self.note("to site", site, request)
            if site in self.case.gone(0):
                continue
            record = self.federation.sites[site].advertise(asked)
            self.server.receive_advertisement(self.note("to server", site, record))
            epoch = self.federation.sites[site]._epochs[self.server.terms.kid]
            self.sites[site] = {
                "identity": identity_secret(site, self.federation.rekeyed).hex(),
                "seed": (self.seed + site.encode()).hex(),
                "b": bytes(epoch._b).hex(),
                "enc_sk": bytes(epoch._enc_sk).hex(),
                "mask_sk": bytes(epoch._mask_sk).hex(),
                "weight": self.session.weight(site),
                "update": [float(value) for value in self.federation.updates[site]],
            }

    def shares(self) -> None:
        request = self.server.share_request()
        for record in request.records:
            site = record.site
            asked = self.note("to site", site, request)
            if site in self.case.gone(1):
                continue
            shares = self.federation.sites[site].share(asked)
            if self.case.unsound is not None and self.case.unsound[0] == site:
                shares = self.without_a_box(shares, self.case.unsound[1])
            self.server.receive_shares(self.note("to server", site, shares))

    def without_a_box(self, shares: Shares, holder: str) -> Shares:
        """Zeros in place of one box, which the dealer signs as they stand."""
        dealer, keys, box = shares.dealing.dealer, self.server._keys, bytes(82)
        hashed = hashes.box_hash(keys, dealer, holder, box)
        dealt = tuple(
            replace(entry, box_hash=hashed) if entry.holder == holder else entry
            for entry in shares.dealing.dealt
        )
        dealing = Dealing(dealer, dealt).signed_by(identity_of(dealer), keys)
        self.federation.sites[dealer]._epochs[shares.kid]._own_row = dealing.row(dealer)
        boxes = tuple((site, box if site == holder else was) for site, was in shares.boxes)
        return replace(shares, dealing=dealing, boxes=boxes)

    def vectors(self) -> None:
        for site in self.server.start(self.session):
            self.vector(site)
        for dealer, request in self.server.disclosure_requests().items():
            asked = self.note("to site", dealer, request)
            if not self.case.silent:
                answer = self.federation.sites[dealer].disclose(asked)
                self.server.receive_disclosure(self.note("to server", dealer, answer))
        for accuser in self.server.accusers:
            self.vector(accuser)

    def vector(self, site: str) -> None:
        request = self.note("to site", site, self.server.mask_request(site))
        if site in self.case.gone(2):
            return
        complaint = self.federation.sites[site].open(request, self.session)
        if isinstance(complaint, Complaint):
            self.server.receive_complaint(self.note("to server", site, complaint))
            return
        update = self.federation.updates[site]
        masked = self.federation.sites[site].mask(request.kid, update, saturate=False)
        self.server.receive_masked(self.note("to server", site, masked))

    def consents(self) -> None:
        request = self.server.close_vectors()
        for site in request.u3 if request is not None else ():
            asked = self.note("to site", site, request)
            if site not in self.case.gone(3):
                consent = self.federation.sites[site].consent(asked)
                self.server.receive_consistent(self.note("to server", site, consent))

    def unmasking(self) -> None:
        request = self.server.unmask_request()
        for site in request.u3:
            asked = self.note("to site", site, request)
            if site not in self.case.gone(4):
                reply = self.federation.sites[site].unmask(asked)
                self.server.receive_unmasked(self.note("to server", site, reply))


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(play(case), encoding="utf-8")
