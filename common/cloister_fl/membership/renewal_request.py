"""Renewal of a site's certificate and node key: the request that proves the keys to come.

It goes over a connection on which the site shows the certificate in force, and is signed by the
site's identity, which a renewal never touches, and by both new keys. All three sign the same
transcript, which holds the coordinator's authority and root, the site's name and the certificate
that is shown. So whoever has the TLS key alone renews nothing, nobody gets a certificate for a key
that it does not hold, and a request is of no use at another coordinator, for another site, or a
second time once the certificate was replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame
from cloister_fl.errors import MessageInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.identity import SIGNATURE_BYTES, Identity, verify

PATH_RENEW = "/v1/fleet/cloister-renew"
"""On the fleet's port, for enrolled sites; answered with an ``enrolment.Reply``."""
MAX_RENEWAL_BYTES = 2048
"""Largest request; an honest one has about 900."""

_LABEL = b"cloister/renewal/v1"
_TRANSCRIPT = "cloister/renewal/v1"


@dataclass(frozen=True)
class Renewal:
    """A request for a certificate in place of another one; build one with ``make``.

    Attributes:
        site: the site id.
        node_key: P-384 public key, PEM.
        tls_key: P-256 public key, PEM.
        proofs: signatures of identity, node and TLS key over the same transcript.
    """

    site: str
    node_key: bytes
    tls_key: bytes
    proofs: tuple[bytes, bytes, bytes]

    @classmethod
    def make(
        cls,
        site: str,
        identity: Identity,
        keys: tuple[bytes, bytes],
        *,
        shown: bytes,
        authority: bytes,
        root: bytes,
    ) -> Renewal:
        """Sign with the identity and both new keys.

        Args:
            site: the site id.
            identity: the site's, which stays.
            keys: new private keys of node and TLS, PEM, see ``ec_keys.generate_pem``.
            shown: SHA-256 of the certificate in force, which the connection shows, 32 bytes.
            authority: SHA-256 of the coordinator's CA certificate, 32 bytes.
            root: public key of the federation's root, 32 bytes.
        """
        node = ec_keys.load_private(keys[0], Purpose.NODE)
        tls = ec_keys.load_private(keys[1], Purpose.TLS)
        unsigned = cls(site, ec_keys.public_pem(node), ec_keys.public_pem(tls), (b"", b"", b""))
        text = unsigned.transcript(shown, authority, root)
        proofs = (
            identity.sign(_TRANSCRIPT, b"identity", text),
            ec_keys.sign(node, _TRANSCRIPT, b"node", text),
            ec_keys.sign(tls, _TRANSCRIPT, b"tls", text),
        )
        return cls(site, unsigned.node_key, unsigned.tls_key, proofs)

    def transcript(self, shown: bytes, authority: bytes, root: bytes) -> bytes:
        """What all three keys sign."""
        return frame(authority, root, shown, self.site.encode(), self.node_key, self.tls_key)

    def proven(self, identity: bytes, shown: bytes, authority: bytes, root: bytes) -> bool:
        """True where both keys can be used, and all three signed for this connection.

        Args:
            identity: the site's public key, as it is enrolled, 32 bytes.
            shown: SHA-256 of the certificate that the connection shows.
            authority: SHA-256 of the verifier's own CA certificate.
            root: the verifier's own root.
        """
        node = ec_keys.load_public(self.node_key, Purpose.NODE)
        tls = ec_keys.load_public(self.tls_key, Purpose.TLS)
        if node is None or tls is None:
            return False
        text = self.transcript(shown, authority, root)
        by_identity, by_node, by_tls = self.proofs
        return (
            verify(identity, by_identity, _TRANSCRIPT, b"identity", text)
            and ec_keys.verify(node, by_node, _TRANSCRIPT, b"node", text)
            and ec_keys.verify(tls, by_tls, _TRANSCRIPT, b"tls", text)
        )

    def encode(self) -> bytes:
        """The request's bytes; nothing in them is secret."""
        return frame(_LABEL, self.site.encode(), self.node_key, self.tls_key, *self.proofs)

    @classmethod
    def decode(cls, data: Buffer) -> Renewal:
        """Read what ``encode`` wrote.

        Raises:
            MessageInvalid: it is something else, or longer than ``MAX_RENEWAL_BYTES``.
        """
        try:
            if len(data) > MAX_RENEWAL_BYTES:
                raise FrameError("too long")
            reader = Reader(data)
            if reader.field() != _LABEL:
                raise FrameError("another label")
            request = cls(
                site=reader.text(),
                node_key=reader.field(),
                tls_key=reader.field(),
                proofs=(reader.field(SIGNATURE_BYTES), reader.field(), reader.field()),
            )
            reader.end()
        except FrameError:
            raise MessageInvalid("The renewal request is malformed.") from None
        return request
