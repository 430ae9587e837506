"""Another reader of secagg/v2: written from docs/secure-aggregation.md, without the package.

``read(text)`` takes a published round, checks every signature and every hash in it, makes each
request itself and rebuilds the sum; ``read_with_secrets`` makes every reply of every site again,
byte for byte, from the seeds in its notes. It is short rather than quick, and believes no message.

    python tests/vectors/reader.py tests/vectors/secagg/*.json
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

VERSION = b"secagg/v2"
FORMAT = "cloister/secagg/v2/transcript"
ROSTER = b"cloister/roster/v2"
MODULUS = 1 << 32
PRIME = 2**256 + 297
ID = re.compile(rb"[a-z0-9][a-z0-9-]{0,62}")


class Refused(ValueError):
    """The round is not one of secagg/v2, or not the one that it states."""


def need(holds: object, why: str) -> None:
    if not holds:
        raise Refused(why)


# Frames


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def f64(value: float) -> bytes:
    return struct.pack(">d", value)


def frame(*fields: bytes) -> bytes:
    return b"".join(u64(len(field)) + field for field in fields)


def listed(items: Sequence[bytes]) -> bytes:
    return u32(len(items)) + frame(*items)


def per_site(values: dict[bytes, bytes]) -> bytes:
    return listed([frame(site, values[site]) for site in sorted(values)])


def fields_of(data: bytes, count: int | None = None) -> list[bytes]:
    """Take a frame apart; of exactly ``count`` fields where that is given."""
    found, at = [], 0
    while at < len(data):
        need(len(data) - at >= 8, "the bytes end early")
        size = int.from_bytes(data[at : at + 8], "big")
        need(size <= len(data) - at - 8, "the bytes end early")
        found.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    need(count is None or len(found) == count, "a frame has another number of fields")
    return found


def items_of(data: bytes) -> list[bytes]:
    need(len(data) >= 4, "the bytes end early")
    count = int.from_bytes(data[:4], "big")
    need(count <= 1000, "a list is too long")
    return fields_of(data[4:], count)


def rising(ids: Iterable[bytes]) -> list[bytes]:
    known = list(ids)
    need(all(low < high for low, high in pairwise(known)), "ids do not rise")
    return known


def pairs_of(data: bytes, size: int) -> dict[bytes, bytes]:
    pairs = [fields_of(item, 2) for item in items_of(data)]
    rising(site for site, _ in pairs)
    need(all(len(value) == size for _, value in pairs), "a value has another length")
    return dict(pairs)


# Hashes, signatures and keys


def sha(label: str, *fields: bytes) -> bytes:
    return hashlib.sha256(frame(label.encode(), *fields)).digest()


def set_hash(sites: Sequence[bytes]) -> bytes:
    return sha("secagg/v2/set", listed(sites))


def check(public: bytes, signature: bytes, label: str, *fields: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(
            signature, frame(b"secagg/v2/sign/" + label.encode(), *fields)
        )
    except (InvalidSignature, ValueError):
        raise Refused(f"a signature ({label}) is wrong") from None


def hkdf(secret: bytes, salt: bytes, *info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=salt, info=frame(*info)).derive(secret)


def agree(secret: bytes, public: bytes) -> bytes:
    need(int.from_bytes(public, "little") < 2**255 - 19, "a key is not canonical")
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise Refused("a key is of low order") from None


def public_of(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def keystream(key: bytes, count: int) -> tuple[int, ...]:
    made = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return struct.unpack(f"<{count}I", made)


def tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of hashes over the entries of a dealing, from the leaves to the root."""
    levels = [[hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]]
    while len(levels[-1]) > 1:
        last = levels[-1]
        pairs = [last[at : at + 2] for at in range(0, len(last), 2)]
        levels.append(
            [
                hashlib.sha256(b"\1" + pair[0] + pair[1]).digest() if len(pair) == 2 else pair[0]
                for pair in pairs
            ]
        )
    return levels


def path(levels: list[list[bytes]], index: int) -> bytes:
    siblings = b""
    for level in levels[:-1]:
        siblings += b"".join(level[index ^ 1 : (index ^ 1) + 1])
        index //= 2
    return siblings


def rebuild(shares: dict[int, bytes]) -> bytes:
    total = 0
    for x, share in shares.items():
        need(int.from_bytes(share, "big") < PRIME, "a share is out of range")
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        total += int.from_bytes(share, "big") * above * pow(below, -1, PRIME)
    need(total % PRIME < 2**256, "a secret is out of range")
    return (total % PRIME).to_bytes(32, "big")


# A round, as the server and everybody else sees it


def scale_of(n: int, weight: Fraction, clip: Fraction) -> float:
    exponent = 1023
    while n * (weight * clip * Fraction(2) ** exponent + max(weight, Fraction(1, 2))) >= 2**31:
        exponent -= 1
        need(exponent > -1000, "no scale fits")
    return float(Fraction(2) ** exponent)


class Round:
    """What has been shown by the messages so far. ``sites`` are the roster's keys by id."""

    def __init__(self, roster: bytes) -> None:
        label, self.federation, serial, entries = fields_of(roster, 4)
        need(label == ROSTER and len(serial) == 8 and self.federation, "the roster is another")
        self.serial = int.from_bytes(serial, "big")
        self.sites = pairs_of(entries, 32)
        need(len(set(self.sites.values())) == len(self.sites), "two sites have one key")
        need(all(ID.fullmatch(site) for site in self.sites), "a site's id is impossible")
        self.digest = hashlib.sha256(frame(ROSTER, roster)).digest()
        self.kid = self.T = self.sid = b""
        self.terms: list[bytes] = []
        self.session: list[bytes] = []
        self.invited: list[bytes] = []
        self.records: dict[bytes, list[bytes]] = {}
        self.dealt: dict[bytes, dict[bytes, bytes]] = {}
        self.signed: dict[bytes, bytes] = {}
        self.boxes: dict[bytes, dict[bytes, bytes]] = {}
        self.complaints: dict[bytes, list[bytes]] = {}
        self.disclosed: dict[bytes, dict[bytes, bytes]] = {}
        self.u1: list[bytes] = []
        self.u2: list[bytes] = []
        self.u3: list[bytes] = []
        self.vectors: dict[bytes, tuple[int, ...]] = {}
        self.consents: dict[bytes, bytes] = {}
        self.replies: dict[bytes, tuple[dict[bytes, bytes], dict[bytes, bytes]]] = {}

    def take(self, direction: str, site: bytes, name: str, data: bytes) -> None:
        """One message of the round, in its turn."""
        head, fields = fields_of(data)[:2], fields_of(data)[2:]
        need(head == [VERSION, name.encode()], "a message is of another kind")
        way = "to site" if name.endswith("?") else "to server"
        need(direction == way, "a message goes the other way")
        table: dict[str, tuple[int, Callable[..., None]]] = {
            "advertise?": (9, self.asked_to_advertise),
            "advertise": (6, self.advertised),
            "share?": (2, self.asked_to_share),
            "share": (3, self.shared),
            "mask?": (8, self.asked_to_mask),
            "complaint": (5, self.complained),
            "disclosure?": (2, self.asked_to_disclose),
            "disclosure": (4, self.disclosed_by),
            "mask": (6, self.masked),
            "consistent?": (2, self.asked_to_consent),
            "consistent": (4, self.consented),
            "unmask?": (3, self.asked_to_unmask),
            "unmask": (6, self.unmasked),
        }
        need(name in table and len(fields) == table[name][0], "a message has other fields")
        need(site in self.sites, "a message is of a stranger")
        need(name == "advertise?" or self.kid, "the round does not begin with stage 0")
        table[name][1](site, *fields)

    # Stage 0

    def asked_to_advertise(self, site: bytes, *terms: bytes) -> None:
        federation, study, roster, _run, epoch, invited, c, t, m = terms
        need(not self.terms or list(terms) == self.terms, "an epoch has two beginnings")
        need(federation == self.federation and roster == self.digest, "the roster is another")
        need([len(study), len(epoch), len(c)] == [32, 8, 4], "a field has another length")
        self.terms, self.invited = list(terms), rising(items_of(invited))
        need(set(self.invited) <= set(self.sites) and site in self.invited, "a site is a stranger")
        n, self.c = len(self.invited), int.from_bytes(c, "big")
        self.t = max(2 * n // 3 + 1, -(-(n + self.c + 1) // 2))
        self.m = max(self.t, self.c + 3)
        need(n > 2 and self.m <= n, "too few sites")
        need((t, m) == (u32(self.t), u32(self.m)), "t or m is not what follows from n and c")
        self.kid = sha("secagg/v2/kid", VERSION, *terms)

    def advertised(self, site: bytes, *fields: bytes) -> None:
        kid, named, enc_pk, mask_pk, commitment, signature = fields
        need(not self.T and kid == self.kid and named == site and site in self.invited, "a record")
        need({len(enc_pk), len(mask_pk), len(commitment)} == {32}, "a key has another length")
        check(self.sites[site], signature, "advertise", *fields[:-1])
        agree(bytes(range(32)), enc_pk)
        agree(bytes(range(32)), mask_pk)
        need(self.records.get(site, list(fields)) == list(fields), "a site has two records")
        self.records[site] = list(fields)
        keys = [key for record in self.records.values() for key in record[2:4]]
        need(len(set(keys)) == len(keys), "one key stands in two places")

    # Stage 1

    def asked_to_share(self, site: bytes, kid: bytes, records: bytes) -> None:
        self.u1 = sorted(self.records)
        need(len(self.u1) >= self.m and site in self.u1, "too few sites sent keys")
        need(kid == self.kid, "another epoch")
        need(records == listed([frame(*self.records[one]) for one in self.u1]), "U1 is another")
        self.T = sha("secagg/v2/T", kid, records)

    def shared(self, site: bytes, kid: bytes, dealing: bytes, boxes: bytes) -> None:
        need(self.T and not self.sid and kid == self.kid, "shares out of turn")
        dealer, dealt, signature = fields_of(dealing, 3)
        need(dealer == site and site in self.u1, "a stranger's shares")
        entries = items_of(dealt)
        holders = rising(fields_of(entry, 4)[0] for entry in entries)
        need(holders == self.u1, "a dealing does not cover U1")
        root = tree(entries)[-1][0]
        check(self.sites[site], signature, "share", self.T, site, u32(len(entries)), root)
        sealed = pairs_of(boxes, 82)
        need(list(sealed) == [one for one in self.u1 if one != site], "a box is missing")
        for holder, entry in zip(holders, entries, strict=True):
            box = sealed.get(holder, b"")
            hashed = sha("secagg/v2/box", self.T, site, holder, box)
            need(fields_of(entry, 4)[1] == hashed, "a box is not the one that was signed")
        self.dealt[site] = dict(zip(holders, entries, strict=True))
        self.signed[site], self.boxes[site] = signature, sealed

    def is_signed(self, kind: str, dealer: bytes, holder: bytes, share: bytes) -> bool:
        hashed = sha("secagg/v2/share", self.T, kind.encode(), dealer, holder, share)
        entry = fields_of(self.dealt[dealer][holder], 4)
        return len(share) == 33 and entry[2 if kind == "b" else 3] == hashed

    # Stage 2

    def asked_to_mask(self, site: bytes, kid: bytes, *session: bytes) -> None:
        *constants, parcels = session
        number, attempt, model, dimension, clip, weights = constants
        need(self.T and not self.u3 and kid == self.kid, "a sum out of turn")
        need(not self.session or constants == self.session, "an epoch has two sums")
        sizes = [len(one) for one in constants[:-1]]
        need(sizes == [8, 4, 32, 8, 8], "a constant has another length")
        if not self.session:
            self.session, self.u2 = constants, sorted(self.dealt)
            need(len(self.u2) >= self.m, "too few sites sent shares")
            self.weights = {
                one: struct.unpack(">d", value)[0] for one, value in pairs_of(weights, 8).items()
            }
            need(list(self.weights) == self.invited, "the weights are of other sites")
            bound = struct.unpack(">d", clip)[0]
            need(1e-6 <= bound <= 1e6, "the clip is out of range")
            need(all(1e-3 <= one <= 1e3 for one in self.weights.values()), "a weight")
            heaviest = Fraction(max(self.weights.values()))
            self.scale = scale_of(len(self.invited), heaviest, Fraction(bound))
            self.dimension = int.from_bytes(dimension, "big")
            self.sid = sha(
                "secagg/v2/sid", self.T, number, attempt, model, dimension, f64(self.scale),
                clip, weights,
            )  # fmt: skip
        need(site in self.u2, "a stranger is asked for a vector")
        need(parcels == listed([self.parcel(one, site) for one in self.u2]), "a parcel is another")

    def parcel(self, dealer: bytes, holder: bytes) -> bytes:
        entries, index = list(self.dealt[dealer].values()), self.u1.index(holder)
        row = frame(
            dealer, entries[index], u32(index), u32(len(entries)), path(tree(entries), index),
            self.signed[dealer],
        )  # fmt: skip
        box = self.boxes[dealer].get(holder, b"")
        return frame(row, box, self.disclosed.get(dealer, {}).get(holder, b""))

    def complained(self, site: bytes, *fields: bytes) -> None:
        kid, keys, named, dealers, signature = fields
        need(self.sid and (kid, keys, named) == (self.kid, self.T, site), "another complaint")
        need(site in self.u2 and site not in self.vectors, "a complaint out of turn")
        check(self.sites[site], signature, "complaint", *fields[:-1])
        accused = rising(items_of(dealers))
        need(accused and set(accused) <= set(self.u2) - {site}, "a complaint about a stranger")
        self.complaints[site] = list(fields)

    def accusers(self, dealer: bytes) -> list[bytes]:
        of = self.complaints
        return [site for site in sorted(of) if dealer in items_of(of[site][3])]

    def asked_to_disclose(self, site: bytes, kid: bytes, complaints: bytes) -> None:
        due = [frame(*self.complaints[one]) for one in self.accusers(site)]
        need(0 < len(due) <= max(self.c, 1), "nobody complains of the site, or too many do")
        need(site not in self.disclosed, "the site has answered")
        need(kid == self.kid and complaints == listed(due), "the complaints are others")

    def disclosed_by(self, site: bytes, *fields: bytes) -> None:
        kid, named, shares, signature = fields
        need(kid == self.kid and named == site, "another disclosure")
        check(self.sites[site], signature, "disclosure", *fields[:-1])
        given = pairs_of(shares, 66)
        need(given and list(given) == self.accusers(site), "shares of others are disclosed")
        for holder, both in given.items():
            need(self.is_signed("b", site, holder, both[:33]), "another share than signed")
            need(self.is_signed("mask_sk", site, holder, both[33:]), "another share than signed")
        self.disclosed[site] = given

    def masked(self, site: bytes, *fields: bytes) -> None:
        sid, named, u2, vector, signature, consent = fields
        need(self.sid and not self.u3 and sid == self.sid and named == site, "another vector")
        need(site in self.u2 and u2 == set_hash(self.u2), "a vector over another U2")
        need(len(vector) == 4 * self.dimension, "a vector has another length")
        hashed = blake3(frame(b"secagg/v2/vector", vector)).digest()
        check(self.sites[site], signature, "y", sid, site, u2, hashed)
        need(site not in self.vectors, "two vectors of one site")
        self.vectors[site] = struct.unpack(f"<{self.dimension}I", vector)
        if consent:
            self.consent(site, consent, self.u2)

    # Stages 3 and 4

    def consent(self, site: bytes, signature: bytes, u3: list[bytes]) -> None:
        both = (listed(self.u2), listed(u3))
        check(self.sites[site], signature, "u3", self.sid, site, *both)
        self.consents[site] = signature

    def close(self) -> None:
        if not self.u3:
            self.u3 = sorted(self.vectors)
            need(len(self.u3) >= self.m, "too few sites sent a vector")
            if self.u3 != self.u2:
                self.consents = {}

    def asked_to_consent(self, site: bytes, sid: bytes, u3: bytes) -> None:
        self.close()
        # Also without a dropout, where a vector came without its consent.
        lacks = self.u3 != self.u2 or set(self.consents) != set(self.u3)
        need(lacks and site in self.u3, "a consent out of turn")
        need(sid == self.sid and u3 == listed(self.u3), "a consent to another sum")

    def consented(self, site: bytes, sid: bytes, named: bytes, u3: bytes, given: bytes) -> None:
        need(self.u3 and site in self.u3 and named == site and sid == self.sid, "another consent")
        need(u3 == listed(self.u3), "a consent to another sum")
        self.consent(site, given, self.u3)

    def asked_to_unmask(self, site: bytes, sid: bytes, u3: bytes, consents: bytes) -> None:
        self.close()
        need(len(self.consents) >= self.t and site in self.u3, "too few consents")
        need(sid == self.sid and u3 == listed(self.u3), "another sum is unmasked")
        need(consents == per_site(self.consents), "other consents than were given")

    def unmasked(self, site: bytes, *fields: bytes) -> None:
        sid, named, u3, own, dropped, signature = fields
        need(self.u3 and site in self.u3 and named == site and sid == self.sid, "another reply")
        need(u3 == listed(self.u3), "another sum is unmasked")
        check(self.sites[site], signature, "unmask", *fields[:-1])
        given = pairs_of(own, 33), pairs_of(dropped, 33)
        gone = [one for one in self.u2 if one not in self.u3]
        for kind, shares, dealers in zip(("b", "mask_sk"), given, (self.u3, gone), strict=True):
            need(list(shares) == dealers, "shares of other dealers")
            need(all(self.is_signed(kind, one, site, shares[one]) for one in dealers), "a share")
        self.replies[site] = given

    def total(self) -> list[int]:
        """The sum, without its masks."""
        need(self.u3 and len(self.replies) >= self.t, "too few sites sent shares")
        holders = sorted(self.replies)[: self.t]
        place = {site: x for x, site in enumerate(self.u1, 1)}
        sums = [sum(column) for column in zip(*(self.vectors[s] for s in self.u3), strict=True)]
        bound = (self.sid, set_hash(self.u2))
        for dealer in self.u2:
            kept = dealer in self.u3
            secret = rebuild({place[h]: self.replies[h][not kept][dealer] for h in holders})
            record = self.records[dealer]
            if kept:
                need(sha("secagg/v2/b", self.kid, dealer, secret) == record[4], "another b")
                stream = keystream(hkdf(secret, self.T, b"self", *bound), self.dimension)
                sums = [value - word for value, word in zip(sums, stream, strict=True)]
                continue
            need(public_of(secret) == record[3], "another mask_sk")
            for peer in self.u3:
                stream = self.pair(secret, dealer, peer)
                sign = -1 if peer < dealer else 1
                sums = [value + sign * word for value, word in zip(sums, stream, strict=True)]
        return [value % MODULUS for value in sums]

    def pair(self, secret: bytes, one: bytes, peer: bytes) -> tuple[int, ...]:
        """The keystream that two sites share, of whom ``one`` has ``secret``."""
        shared = agree(secret, self.records[peer][3])
        both = listed(sorted((one, peer)))
        key = hkdf(shared, self.T, b"pair", both, self.sid, set_hash(self.u2))
        return keystream(key, self.dimension)


def read(text: str) -> Round:
    """Read one published round; raises ``Refused`` unless all of it is as it should be."""
    try:
        data = json.loads(text)
        need(data["format"] == FORMAT, "another format")
        seen = Round(bytes.fromhex(data["roster"]))
        for entry in data["messages"]:
            raw = bytes.fromhex(entry["bytes"])
            seen.take(entry["direction"], entry["site"].encode(), entry["message"], raw)
        total, outcome = seen.total(), data["outcome"]
        need(outcome["survivors"] == [site.decode() for site in seen.u3], "other survivors")
        need(outcome["scale"] == seen.scale, "another scale")
        stated = struct.pack(f"<{len(total)}I", *total).hex()
        need(outcome["total"] == stated, "another sum")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise error if isinstance(error, Refused) else Refused("malformed") from None
    return seen


# The same round from its seeds


def draws(seed: bytes) -> Callable[[int], bytes]:
    """What a site of the published rounds draws, one call after another."""
    count = 0

    def draw(size: int) -> bytes:
        nonlocal count
        out = b""
        while len(out) < size:
            out += hashlib.sha256(seed + u64(count)).digest()
            count += 1
        return out[:size]

    return draw


def split(secret: bytes, t: int, count: int, draw: Callable[[int], bytes]) -> list[bytes]:
    factors = [int.from_bytes(secret, "big")]
    factors += [int.from_bytes(draw(65), "big") % PRIME for _ in range(t - 1)]
    values = [sum(f * x**power for power, f in enumerate(factors)) for x in range(1, count + 1)]
    return [(value % PRIME).to_bytes(33, "big") for value in values]


class Hospital:
    """A site of the notes, which makes its replies from what it drew."""

    def __init__(self, seen: Round, site: str, note: dict[str, Any]) -> None:
        self.seen, self.site, self.note = seen, site.encode(), note
        self.identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(note["identity"]))
        public = self.identity.public_key().public_bytes_raw()
        need(public == seen.sites.get(self.site), "the roster has another key")
        self.draw = draws(bytes.fromhex(note["seed"]))
        self.b, self.enc_sk, self.mask_sk = (self.draw(32) for _ in range(3))
        noted = [bytes.fromhex(note[name]) for name in ("b", "enc_sk", "mask_sk")]
        need(noted == [self.b, self.enc_sk, self.mask_sk], "other secrets than drawn")
        self.dealt: dict[bytes, tuple[bytes, bytes]] = {}

    def sign(self, label: str, *fields: bytes) -> bytes:
        return self.identity.sign(frame(b"secagg/v2/sign/" + label.encode(), *fields))

    def whole(self, name: str, *fields: bytes, label: str = "") -> bytes:
        end = (self.sign(label, *fields),) if label else ()
        return frame(VERSION, name.encode(), *fields, *end)

    def advertise(self) -> bytes:
        commitment = sha("secagg/v2/b", self.seen.kid, self.site, self.b)
        keys = (public_of(self.enc_sk), public_of(self.mask_sk))
        fields = (self.seen.kid, self.site, *keys, commitment)
        return self.whole("advertise", *fields, label="advertise")

    def share(self, unsound: dict[str, str]) -> bytes:
        seen, entries, boxes = self.seen, [], {}
        of_b, of_key = (
            split(secret, seen.t, len(seen.u1), self.draw) for secret in (self.b, self.mask_sk)
        )
        for holder, one, two in zip(seen.u1, of_b, of_key, strict=True):
            box, self.dealt[holder] = b"", (one, two)
            if holder != self.site:
                shared = agree(self.enc_sk, seen.records[holder][2])
                key = hkdf(shared, seen.T, b"share", self.site, holder)
                aad = frame(seen.T, self.site, holder)
                box = ChaCha20Poly1305(key).encrypt(bytes(12), one + two, aad)
                if (unsound.get("dealer"), unsound.get("holder")) == (
                    self.site.decode(),
                    holder.decode(),
                ):
                    box = bytes.fromhex(unsound["box"])
                boxes[holder] = box
            hashed = [
                sha("secagg/v2/share", seen.T, kind, self.site, holder, share)
                for kind, share in ((b"b", one), (b"mask_sk", two))
            ]
            entries.append(
                frame(holder, sha("secagg/v2/box", seen.T, self.site, holder, box), *hashed)
            )
        body = (seen.T, self.site, u32(len(entries)), tree(entries)[-1][0])
        dealing = frame(self.site, listed(entries), self.sign("share", *body))
        return self.whole("share", seen.kid, dealing, per_site(boxes))

    def held(self, dealer: bytes) -> tuple[bytes, bytes] | None:
        """Both shares that a dealer gave this site; None where its box does not open."""
        seen = self.seen
        if dealer == self.site:
            return self.dealt[dealer]
        both = seen.disclosed.get(dealer, {}).get(self.site)
        if both is None:
            shared = agree(self.enc_sk, seen.records[dealer][2])
            key, aad = hkdf(shared, seen.T, b"share", dealer, self.site), (dealer, self.site)
            box = seen.boxes[dealer][self.site]
            try:
                both = ChaCha20Poly1305(key).decrypt(bytes(12), box, frame(seen.T, *aad))
            except InvalidTag:
                return None
        return both[:33], both[33:]

    def mask(self) -> bytes:
        seen = self.seen
        unsound = [dealer for dealer in seen.u2 if self.held(dealer) is None]
        if unsound:
            fields = (seen.kid, seen.T, self.site, listed(unsound))
            return self.whole("complaint", *fields, label="complaint")
        factor, u2 = self.note["weight"] * seen.scale, set_hash(seen.u2)
        y = [round(value * factor) for value in self.note["update"]]
        own = keystream(hkdf(self.b, seen.T, b"self", seen.sid, u2), seen.dimension)
        y = [value + word for value, word in zip(y, own, strict=True)]
        for peer in seen.u2:
            if peer != self.site:
                sign = 1 if self.site < peer else -1
                stream = seen.pair(self.mask_sk, self.site, peer)
                y = [value + sign * word for value, word in zip(y, stream, strict=True)]
        vector = struct.pack(f"<{len(y)}I", *(value % MODULUS for value in y))
        hashed = blake3(frame(b"secagg/v2/vector", vector)).digest()
        consent = self.sign("u3", seen.sid, self.site, *[listed(seen.u2)] * 2)
        signature = self.sign("y", seen.sid, self.site, u2, hashed)
        return self.whole("mask", seen.sid, self.site, u2, vector, signature, consent)

    def disclose(self) -> bytes:
        shares = {one: b"".join(self.dealt[one]) for one in self.seen.accusers(self.site)}
        fields = (self.seen.kid, self.site, per_site(shares))
        return self.whole("disclosure", *fields, label="disclosure")

    def consent(self) -> bytes:
        u2, u3 = listed(self.seen.u2), listed(self.seen.u3)
        signature = self.sign("u3", self.seen.sid, self.site, u2, u3)
        return self.whole("consistent", self.seen.sid, self.site, u3, signature)

    def unmask(self) -> bytes:
        seen = self.seen
        held = {dealer: self.held(dealer) or (b"", b"") for dealer in seen.u2}
        own = {dealer: held[dealer][0] for dealer in seen.u3}
        gone = {dealer: held[dealer][1] for dealer in seen.u2 if dealer not in seen.u3}
        fields = (seen.sid, self.site, listed(seen.u3), per_site(own), per_site(gone))
        return self.whole("unmask", *fields, label="unmask")


def read_with_secrets(text: str) -> Round:
    """Read a published round, and make every reply in it again from the seeds in its notes."""
    read(text)
    try:
        data = json.loads(text)
        notes, seen = data["notes"], Round(bytes.fromhex(data["roster"]))
        if "previous_roster" in notes:
            before = Round(bytes.fromhex(notes["previous_roster"]))
            need(before.federation == seen.federation, "a renewal of another federation")
            need(before.serial < seen.serial, "a renewal that rolls back")
        hospitals: dict[bytes, Hospital] = {}
        for entry in data["messages"]:
            site, name, raw = entry["site"].encode(), entry["message"], entry["bytes"]
            if site not in hospitals and entry["direction"] == "to server":
                hospitals[site] = Hospital(seen, entry["site"], notes["sites"][entry["site"]])
            made = {
                "advertise": lambda h: h.advertise(),
                "share": lambda h: h.share(notes.get("unsound", {})),
                "mask": lambda h: h.mask(),
                "complaint": lambda h: h.mask(),
                "disclosure": lambda h: h.disclose(),
                "consistent": lambda h: h.consent(),
                "unmask": lambda h: h.unmask(),
            }
            if name in made:
                again = made[name](hospitals[site])
                need(again.hex() == raw, f"{entry['site']} would have sent another {name}")
            seen.take(entry["direction"], site, name, bytes.fromhex(raw))
        need(seen.terms[1].hex() == notes["study"], "another study")
        need(seen.session[2].hex() == notes["model"], "another model")
        need(seen.session[4] == f64(notes["clip"]), "another clip")
        weights = {site.encode(): note["weight"] for site, note in notes["sites"].items()}
        need(all(seen.weights[site] == weight for site, weight in weights.items()), "weights")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise error if isinstance(error, Refused) else Refused("malformed notes") from None
    return seen


if __name__ == "__main__":
    for name in sys.argv[1:]:
        survivors = read_with_secrets(Path(name).read_text("utf-8")).u3
        sys.stdout.write(f"{name}: {len(survivors)} sites in the sum, every byte as it should be\n")
