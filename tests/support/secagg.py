"""A federation in memory for the tests of secure aggregation: sites, server, a wire of bytes.

Seeded randomness exists here only. The wheel's classes draw from the operating system and take
no seed; these subclasses replace their one drawing method.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.secagg.crypto.hashes import model_hash
from cloister_fl.secagg.fixed_point import encode_into
from cloister_fl.secagg.messages.codec import Message, Unmasked, decode
from cloister_fl.secagg.participant import Site, SitePolicy
from cloister_fl.secagg.participant_epoch import SiteEpoch
from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.session import EpochTerms, Session
from cloister_fl.secagg.unmasking import Aggregate

STUDY = hashlib.sha256(b"the approved study").digest()
MODEL = model_hash(b"the global model")


class Entropy:
    """A repeatable stream of bytes: SHA-256 over a seed and a counter."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.count = 0

    def draw(self, count: int) -> bytes:
        out = b""
        while len(out) < count:
            out += hashlib.sha256(self.seed + self.count.to_bytes(8, "big")).digest()
            self.count += 1
        return out[:count]


class SeededEpoch(SiteEpoch):
    entropy: Entropy

    def _draw(self, count: int) -> bytes:
        return self.entropy.draw(count)


class SeededSite(Site):
    """A site whose epochs draw from a seed; for published vectors."""

    def __init__(self, *, entropy: Entropy, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.entropy = entropy

    def _make_epoch(self, terms: EpochTerms) -> SiteEpoch:
        epoch = SeededEpoch(self._identity, self._name, self._roster, terms, self._store)
        epoch.entropy = self.entropy
        return epoch


@dataclass
class MemoryStore:
    """A ``RoundStore`` in memory; ``snapshot`` is the copy of a disk."""

    epochs: set[bytes] = field(default_factory=set)
    opened: dict[int, bytes] = field(default_factory=dict)
    commits: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def claim_epoch(self, kid: bytes) -> bool:
        new = kid not in self.epochs
        self.epochs.add(kid)
        return new

    def open_round(self, session: Session, constants: bytes) -> bytes:
        return self.opened.setdefault(session.round, constants)

    def committed(self, session: Session) -> tuple[str, ...] | None:
        return self.commits.get(session.round)

    def commit(self, session: Session, u3: tuple[str, ...]) -> tuple[str, ...]:
        return self.commits.setdefault(session.round, u3)

    def snapshot(self) -> MemoryStore:
        return copy.deepcopy(self)


def identity_secret(name: str, rekeyed: Collection[str] = ()) -> bytes:
    """The private key of a site; those of ``rekeyed`` have another than before."""
    seed = b"renewed identity" if name in rekeyed else b"identity"
    return hashlib.sha256(seed + name.encode()).digest()


def identity_of(name: str, rekeyed: Collection[str] = ()) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(identity_secret(name, rekeyed)))


def site_names(n: int) -> tuple[str, ...]:
    return tuple(f"site-{number:02d}" for number in range(1, n + 1))


def roster_of(names: Collection[str], serial: int = 1, rekeyed: Collection[str] = ()) -> Roster:
    entries = [RosterEntry(name, identity_of(name, rekeyed).public) for name in names]
    return Roster.of("federation", serial, entries)


def over(message: Message) -> Any:
    """The message after a trip over the wire; what travels is bytes."""
    data = message.encode()
    back = decode(data)
    assert back.encode() == data
    return back


class Federation:
    """n sites and their server; ``run`` plays a round with the given dropouts."""

    def __init__(
        self,
        n: int,
        *,
        colluders: int = 1,
        dimension: int = 257,
        clip: float = 1.0,
        seed: bytes | None = None,
        weights: dict[str, float] | None = None,
        data_seed: int = 7,
        max_weight_ratio: float = 1000.0,
        names: tuple[str, ...] | None = None,
        roster: Roster | None = None,
        rekeyed: Collection[str] = (),
    ) -> None:
        self.names = names or site_names(n)
        self.rekeyed = rekeyed
        self.roster = roster or roster_of(self.names)
        self.colluders = colluders
        self.seed = seed
        self.dimension = dimension
        self.clip = clip
        self.weights = tuple((name, (weights or {}).get(name, 1.0)) for name in self.names)
        generator = np.random.default_rng(data_seed)
        self.updates = {
            name: generator.uniform(-clip, clip, dimension).astype(np.float32)
            for name in self.names
        }
        self.stores = {name: MemoryStore() for name in self.names}
        self.policy = SitePolicy(STUDY, colluders, min(5, n), max_weight_ratio)
        self.sites = {name: self.make_site(name) for name in self.names}
        self.sent: list[bytes] = []
        """Every message that a site sent to the server."""
        self.secrets: set[bytes] = set()
        """b, enc_sk and mask_sk of every site and epoch."""

    def make_site(self, name: str) -> Site:
        common = {
            "identity": identity_of(name, self.rekeyed),
            "name": name,
            "roster": self.roster,
            "policy": self.policy,
            "store": self.stores[name],
        }
        if self.seed is None:
            return Site(**common)
        return SeededSite(entropy=Entropy(self.seed + name.encode()), **common)

    def terms(self, epoch: int = 0, **changes: Any) -> EpochTerms:
        fields = {
            "federation": "federation",
            "study": STUDY,
            "roster": self.roster.digest,
            "run": "run-1",
            "epoch": epoch,
            "invited": self.names,
            "colluders": self.colluders,
        }
        return EpochTerms(**{**fields, **changes})

    def session(self, round_number: int = 0, attempt: int = 0, **changes: Any) -> Session:
        fields = {
            "round": round_number,
            "attempt": attempt,
            "model": MODEL,
            "dimension": self.dimension,
            "clip": self.clip,
            "weights": self.weights,
        }
        return Session(**{**fields, **changes})

    def note(self, message: Message) -> Any:
        data = message.encode()
        self.sent.append(data)
        return decode(data)

    def look(self, name: str) -> None:
        for epoch in self.sites[name]._epochs.values():
            held = (epoch._b, epoch._enc_sk, epoch._mask_sk)
            self.secrets |= {bytes(secret) for secret in held if secret}

    def released(self) -> list[Unmasked]:
        """Every stage-4 reply that a site has sent."""
        messages = [decode(data) for data in self.sent]
        return [message for message in messages if isinstance(message, Unmasked)]

    def assert_no_secret(self, *, stage_four: bool = False) -> None:
        """No secret in clear, and of no site enough shares of both its secrets.

        Where ``stage_four`` is False, no site has answered stage 4 at all.
        """
        assert self.secrets
        for data in self.sent:
            assert not any(secret in data for secret in self.secrets)
        replies = self.released()
        assert stage_four or not replies
        t = self.terms().parameters.t
        for name in self.names:
            b = {r.site for r in replies if name in dict(r.b_shares)}
            mask_key = {r.site for r in replies if name in dict(r.mask_key_shares)}
            assert min(len(b), len(mask_key)) < t

    # One stage each; ``absent`` sites do not answer.

    def advertise(self, server: ServerEpoch, absent: Collection[str] = ()) -> None:
        request = over(server.advertise_request())
        for name in self.names:
            if name not in absent:
                server.receive_advertisement(self.note(self.sites[name].advertise(request)))
                self.look(name)

    def share(self, server: ServerEpoch, absent: Collection[str] = ()) -> None:
        request = over(server.share_request())
        for record in request.records:
            if record.site not in absent:
                server.receive_shares(self.note(self.sites[record.site].share(request)))

    def mask(
        self,
        server: ServerEpoch,
        session: Session,
        absent: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> None:
        for name in server.start(session, only=only):
            if name not in absent:
                request = over(server.mask_request(name))
                self.sites[name].open(request, session)
                masked = self.sites[name].mask(request.kid, self.updates[name], saturate=False)
                server.receive_masked(self.note(masked))

    def consent(self, server: ServerEpoch, absent: Collection[str] = ()) -> None:
        request = server.close_vectors()
        if request is not None:
            for name in request.u3:
                if name not in absent:
                    reply = self.sites[name].consent(over(request))
                    server.receive_consistent(self.note(reply))

    def unmask(self, server: ServerEpoch, absent: Collection[str] = ()) -> None:
        request = over(server.unmask_request())
        for name in request.u3:
            if name not in absent:
                server.receive_unmasked(self.note(self.sites[name].unmask(request)))

    def prepared(self, terms: EpochTerms | None = None) -> ServerEpoch:
        """A server whose epoch has keys and boxes of every site."""
        server = ServerEpoch(terms or self.terms(), self.roster)
        self.advertise(server)
        self.share(server)
        return server

    def masked(self, session: Session | None = None, absent: Collection[str] = ()) -> ServerEpoch:
        """A server that holds the vectors of all but the absent sites."""
        server = self.prepared()
        self.mask(server, session or self.session(), absent)
        return server

    def run(
        self,
        *,
        epoch: int = 0,
        session: Session | None = None,
        drop: dict[int, Collection[str]] | None = None,
        threads: int = 1,
    ) -> Aggregate:
        """A whole round; ``drop`` maps a stage 0 to 4 to the sites that fail at it."""
        gone: set[str] = set()
        dropped = []
        for stage in range(5):
            gone |= set((drop or {}).get(stage, ()))
            dropped.append(set(gone))
        server = ServerEpoch(self.terms(epoch), self.roster, threads=threads)
        self.advertise(server, dropped[0])
        self.share(server, dropped[1])
        self.mask(server, session or self.session(), dropped[2])
        self.consent(server, dropped[3])
        self.unmask(server, dropped[4])
        return server.finish()

    def encoding(self, name: str, session: Session | None = None) -> NDArray[np.uint32]:
        session = session or self.session()
        out = np.empty(self.dimension, np.uint32)
        encode_into(
            out,
            self.updates[name],
            weight=session.weight(name),
            clip=session.clip,
            scale=session.scale,
            saturate=False,
        )
        return out

    def true_total(self, names: Collection[str]) -> NDArray[np.uint32]:
        return np.sum([self.encoding(name) for name in names], axis=0, dtype=np.uint32)
