"""Enrolment of a site: the invite, the request that proves its keys, and the answer.

An invite is one line of text. It names the coordinator (addresses, the SHA-256 of its
certificate authority, the root's public key) and carries a one-time secret. The site answers
with its three public keys and one signature of each over the same transcript, which holds
everything that was agreed: the coordinator's authority and root, the invite, the site's name, all
three keys, and a MAC under the one-time secret. So nobody can enrol a key that it does not hold,
nor take a request to another coordinator.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame, u64
from cloister_fl.errors import InviteInvalid, MessageInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    usable_public_key,
    verify,
)
from cloister_fl.membership.roster import SITE_ID

SECRET_BYTES = 32
INVITE_ID_BYTES = 8
DIGEST_BYTES = 32
CHECK_BYTES = 4
MAX_REQUEST_BYTES = 8192
MAX_REPLY_BYTES = 1 << 20

PATH_AUTHORITY = "/v1/authority"
PATH_ENROL = "/v1/enrol"
PATH_STATUS = "/v1/enrol/status"
PATH_ROSTER = "/v1/fleet/cloister-roster"
"""On the fleet's port, for enrolled sites: the signed roster in force."""
HEADER_VERSION = "x-cloister-version"
HEADER_PROTOCOL = "x-cloister-protocol"
"""Beside the roster: the coordinator's wheel, and ``PROTOCOL`` of it."""

_PREFIX = "cloister-invite-1."
_INVITE = b"cloister/invite/v1"
_REQUEST = b"cloister/enrol-request/v1"
_REPLY = b"cloister/enrol-reply/v1"
_STATUS = b"cloister/enrol-status/v1"
_TRANSCRIPT = "cloister/enrol/v1"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port (1 to 65535) of ``host:port`` or ``[IPv6]:port``; ``None`` for all else."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match.group(2)) < 65536:
        return None
    return match.group(1).strip("[]"), int(match.group(2))


@dataclass(frozen=True)
class Invite:
    """What a coordinator gives to one hospital, once.

    Attributes:
        fleet: host:port of the port that an enrolled node talks to.
        enrolment: host:port of the port for joining.
        authority: SHA-256 of the coordinator's CA certificate (DER), 32 bytes.
        root: Ed25519 public key of the federation's root, 32 bytes.
        site: the site id that it is for.
        invite_id: 8 public bytes that name it.
        secret: 32 bytes; whoever has them can ask for this site's place.
        expires: Unix time in seconds.
    """

    fleet: str
    enrolment: str
    authority: bytes
    root: bytes
    site: str
    invite_id: bytes
    secret: bytes = field(repr=False)
    expires: int

    def encode(self) -> str:
        """One line of text, safe to paste."""
        body = frame(
            _INVITE,
            self.fleet.encode(),
            self.enrolment.encode(),
            self.authority,
            self.root,
            self.site.encode(),
            self.invite_id,
            self.secret,
            u64(self.expires),
        )
        check = hashlib.sha256(body).digest()[:CHECK_BYTES]
        return _PREFIX + base64.urlsafe_b64encode(body + check).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Read what ``encode`` wrote; blanks and line breaks of a mail program do no harm.

        Raises:
            InviteInvalid: it is not an invite, or was cut or altered on its way.
        """
        packed = "".join(text.split())
        fault = InviteInvalid(
            "The text is not a complete invite.",
            why="It was truncated or changed, or is another text.",
            remedy="Copy the whole line again.",
        )
        if not packed.startswith(_PREFIX):
            raise fault
        raw = packed.removeprefix(_PREFIX)
        try:
            data = base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4))
            body, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
            if not hmac.compare_digest(hashlib.sha256(body).digest()[:CHECK_BYTES], check):
                raise fault
            reader = Reader(body)
            if reader.field() != _INVITE:
                raise FrameError("another label")
            invite = cls(
                fleet=reader.text(),
                enrolment=reader.text(),
                authority=reader.field(DIGEST_BYTES),
                root=reader.field(KEY_BYTES),
                site=reader.text(),
                invite_id=reader.field(INVITE_ID_BYTES),
                secret=reader.field(SECRET_BYTES),
                expires=reader.u64(),
            )
            reader.end()
        except (FrameError, binascii.Error, ValueError):
            raise fault from None
        addresses = (split_address(invite.fleet), split_address(invite.enrolment))
        if None in addresses or not SITE_ID.fullmatch(invite.site):
            raise fault
        return invite


def looks_like_invite(text: str) -> bool:
    """True for text that carries an invite's secret, so must not stand on a command line."""
    return text.strip().startswith(_PREFIX)


def secret_hash(secret: bytes) -> bytes:
    """What the coordinator keeps of a secret of 256 random bits: SHA-256, 32 bytes."""
    return hashlib.sha256(b"cloister/invite-secret/v1\0" + secret).digest()


@dataclass(frozen=True)
class Request:
    """A site's request for its place, as sent; build one with ``make``.

    Attributes:
        invite_id: names the invite, 8 bytes.
        secret: the invite's one-time secret, 32 bytes.
        site: the site id.
        identity: Ed25519 public key, 32 bytes.
        node_key: P-384 public key, PEM.
        tls_key: P-256 public key, PEM.
        proofs: signatures of identity, node and TLS key over the same transcript.
    """

    invite_id: bytes
    secret: bytes = field(repr=False)
    site: str
    identity: bytes
    node_key: bytes
    tls_key: bytes
    proofs: tuple[bytes, bytes, bytes]

    @classmethod
    def make(cls, invite: Invite, identity: Identity, node_pem: bytes, tls_pem: bytes) -> Request:
        """Sign with all three keys; the PEMs are private keys, see ``ec_keys.generate_pem``."""
        node = ec_keys.load_private(node_pem, Purpose.NODE)
        tls = ec_keys.load_private(tls_pem, Purpose.TLS)
        unsigned = cls(
            invite_id=invite.invite_id,
            secret=invite.secret,
            site=invite.site,
            identity=identity.public,
            node_key=ec_keys.public_pem(node),
            tls_key=ec_keys.public_pem(tls),
            proofs=(b"", b"", b""),
        )
        text = unsigned.transcript(invite.authority, invite.root)
        proofs = (
            identity.sign(_TRANSCRIPT, b"identity", text),
            ec_keys.sign(node, _TRANSCRIPT, b"node", text),
            ec_keys.sign(tls, _TRANSCRIPT, b"tls", text),
        )
        return cls(**{**vars(unsigned), "proofs": proofs})

    def transcript(self, authority: bytes, root: bytes) -> bytes:
        """What all three keys sign; the secret is in it as a MAC only, so it may be kept."""
        agreed = frame(
            authority,
            root,
            self.invite_id,
            self.site.encode(),
            self.identity,
            self.node_key,
            self.tls_key,
        )
        return frame(agreed, hmac.digest(self.secret, frame(_REQUEST, agreed), "sha256"))

    def proven(self, authority: bytes, root: bytes) -> bool:
        """True where each key can be used, is of the right kind, and signed for this coordinator.

        Args:
            authority: SHA-256 of the verifier's own CA certificate.
            root: the verifier's own root.
        """
        node = ec_keys.load_public(self.node_key, Purpose.NODE)
        tls = ec_keys.load_public(self.tls_key, Purpose.TLS)
        if node is None or tls is None or not usable_public_key(self.identity):
            return False
        text = self.transcript(authority, root)
        by_identity, by_node, by_tls = self.proofs
        return (
            verify(self.identity, by_identity, _TRANSCRIPT, b"identity", text)
            and ec_keys.verify(node, by_node, _TRANSCRIPT, b"node", text)
            and ec_keys.verify(tls, by_tls, _TRANSCRIPT, b"tls", text)
        )

    def encode(self) -> bytes:
        """The request's bytes; they hold the secret, so only TLS may carry them."""
        return frame(
            _REQUEST,
            self.invite_id,
            self.secret,
            self.site.encode(),
            self.identity,
            self.node_key,
            self.tls_key,
            *self.proofs,
        )

    @classmethod
    def decode(cls, data: Buffer) -> Request:
        """Read what ``encode`` wrote.

        Raises:
            MessageInvalid: it is something else.
        """
        try:
            reader = Reader(data)
            if reader.field() != _REQUEST:
                raise FrameError("another label")
            request = cls(
                invite_id=reader.field(INVITE_ID_BYTES),
                secret=reader.field(SECRET_BYTES),
                site=reader.text(),
                identity=reader.field(KEY_BYTES),
                node_key=reader.field(),
                tls_key=reader.field(),
                proofs=(reader.field(SIGNATURE_BYTES), reader.field(), reader.field()),
            )
            reader.end()
        except FrameError:
            raise MessageInvalid("The enrolment request is malformed.") from None
        return request


def ask_status(invite_id: bytes, identity: Identity, authority: bytes) -> bytes:
    """A signed question how the request stands."""
    return frame(
        _STATUS,
        invite_id,
        identity.public,
        identity.sign(_STATUS.decode(), authority, invite_id),
    )


def read_status(data: Buffer, authority: bytes) -> tuple[bytes, bytes]:
    """Invite id and identity of whoever asked with ``ask_status``.

    Raises:
        MessageInvalid: malformed, or not signed by that identity for this coordinator.
    """
    try:
        reader = Reader(data)
        label = reader.field()
        invite_id, identity = reader.field(INVITE_ID_BYTES), reader.field(KEY_BYTES)
        signature = reader.field(SIGNATURE_BYTES)
        reader.end()
    except FrameError:
        label = b""
    if label != _STATUS or not verify(identity, signature, _STATUS.decode(), authority, invite_id):
        raise MessageInvalid("The status request is malformed or not signed.")
    return invite_id, identity


@dataclass(frozen=True)
class Reply:
    """How a request stands.

    Attributes:
        state: ``pending``, ``approved`` or ``revoked``.
        certificate: the site's certificate, DER; empty unless approved.
        roster: the signed roster in force; empty unless approved.
    """

    state: str
    certificate: bytes = b""
    roster: bytes = b""

    def encode(self) -> bytes:
        """The reply's bytes."""
        return frame(_REPLY, self.state.encode(), self.certificate, self.roster)

    @classmethod
    def decode(cls, data: Buffer) -> Reply:
        """Read what ``encode`` wrote.

        Raises:
            MessageInvalid: it is something else.
        """
        try:
            reader = Reader(data)
            if reader.field() != _REPLY:
                raise FrameError("another label")
            reply = cls(reader.text(), reader.field(), reader.field())
            reader.end()
        except FrameError:
            raise MessageInvalid("The coordinator's answer is malformed.") from None
        return reply
