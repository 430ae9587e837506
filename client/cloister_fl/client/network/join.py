"""Enrolment of a site in a federation, and what the site then knows of the coordinator.

::

    coordinator.json     addresses, the authority's fingerprint, the root, the invite's public id
    coordinator.pem      the coordinator's authority, as the invite pinned it
    keys/                the node's keys and certificate, see ``node_keys``
    roster.offered       the signed roster that the coordinator last sent

Keys are made here and stay here. The invite's one-time secret is never written to the site's
disk. Every step can be repeated: a site that was interrupted runs ``join`` again.
"""

from __future__ import annotations

import hmac
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from cloister_fl.client.network.http import Answer, Failure, dial
from cloister_fl.client.network.http_errors import error_of
from cloister_fl.client.network.node_keys import (
    AUTHORITY,
    CERTIFICATE,
    NODE_KEY,
    TLS_KEY,
    show_certificate,
)
from cloister_fl.client.network.proxy import proxy_of
from cloister_fl.client.site.folder import Site, init_site, open_site, require_as_written
from cloister_fl.client.site.policy import policy_for
from cloister_fl.client.site.settings import Network
from cloister_fl.errors import (
    CoordinatorUnproven,
    DeploymentError,
    EnrolmentRefused,
    FileUnreadable,
    InviteInvalid,
    RosterMismatch,
)
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import (
    PATH_AUTHORITY,
    PATH_ENROL,
    PATH_ROSTER,
    PATH_STATUS,
    Invite,
    Reply,
    Request,
    ask_status,
)
from cloister_fl.membership.roster import open_roster
from cloister_fl.system.files import create_secret, read_secret, write_atomic
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.toml import FileModel

MEMBERSHIP = "coordinator.json"
OFFERED = "roster.offered"

_Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_WHY = {
    "invite-unknown": "The invite is unknown to the coordinator.",
    "invite-used": "The invite was used already, with other keys than this site's.",
    "invite-expired": "The invite has expired.",
    "key-in-use": "A key of this site is enrolled under another name.",
    "proof-invalid": "The coordinator did not accept the proof of this site's keys.",
    "certificate-unknown": "This site's certificate is unknown to the coordinator.",
    "certificate-revoked": "The coordinator has revoked this site.",
    "certificate-expired": "This site's certificate has expired.",
    "renewed-lately": "A renewal was asked for within the last hour, with other keys.",
    "rate-limited": "Too many requests came from here; wait a minute.",
}


class Membership(FileModel):
    """The file ``coordinator.json``; written by ``join``, never by hand."""

    fleet: str
    enrolment: str
    authority: _Hex32
    root: _Hex32
    invite: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    site: str


@dataclass(frozen=True)
class Joined:
    """How the site stands: ``pending`` or ``approved``; with the roster offered, if approved."""

    state: str
    signed_roster: bytes = b""


def membership(site: Site) -> Membership:
    """What ``join`` wrote.

    Raises:
        InviteInvalid: the site has not joined.
        FileUnreadable: the file is damaged, or others could have changed it.
    """
    path = site.root / MEMBERSHIP
    if not path.exists():
        raise InviteInvalid(
            "This site has joined no federation.",
            remedy=f"Join with the coordinator's invite: {site.command('join INVITE-FILE')}",
        )
    try:
        return Membership.model_validate_json(read_secret(path))
    except ValidationError:
        raise FileUnreadable(
            f"{MEMBERSHIP} is damaged.", remedy="Restore it from the site's backup."
        ) from None


def prepare(
    root: Path,
    invite: Invite,
    network: Network | None = None,
    *,
    dicom: Path | None = None,
    labels: Path | None = None,
    patients_at_most: int | None = None,
) -> Site:
    """Make the site folder and its keys where they are missing. Nothing is replaced.

    Args:
        root: the site folder.
        invite: names the site.
        network: goes into a ``site.toml`` that is created now.
        dicom: folder of the images, for a ``site.toml`` that is created now.
        labels: the labels file, likewise.
        patients_at_most: the policy's, likewise.

    Raises:
        OptionInvalid: there is a ``site.toml`` already, and its network or a path is another one.
        InviteInvalid: the folder is another site's, or belongs to another federation.
    """
    fresh = not (root / "site.toml").exists()
    site = (
        init_site(
            root,
            name=invite.site,
            dicom=dicom,
            labels=labels,
            network=network,
            policy=policy_for(patients_at_most),
        )
        if fresh
        else open_site(root)
    )
    # A folder of an earlier version has none.
    keep_out_of_git(site.root)
    require_as_written(
        site, dicom=dicom, labels=labels, network=network, patients_at_most=patients_at_most
    )
    require_invited(site, invite)
    create_secret(site.keys / NODE_KEY, ec_keys.generate_pem(Purpose.NODE))
    create_secret(site.keys / TLS_KEY, ec_keys.generate_pem(Purpose.TLS))
    return site


def require_invited(site: Site, invite: Invite) -> Membership | None:
    """Refuse another's invite; what the site joined before, if it did.

    Raises:
        InviteInvalid: the folder is another site's, or belongs to another federation.
        FileUnreadable: see ``membership``.
    """
    if site.name != invite.site:
        raise InviteInvalid(
            f"The invite is for {invite.site}, and this folder is {site.name}'s.",
            remedy="Use another folder, or ask for an invite with this site's name.",
        )
    if not (site.root / MEMBERSHIP).exists():
        return None
    held = membership(site)
    if held.authority != invite.authority.hex() or held.root != invite.root.hex():
        raise InviteInvalid(
            "The invite is for another federation than this folder.",
            remedy="Use a site folder for each federation.",
        )
    return held


def ask(site: Site, invite: Invite) -> Joined:
    """Pin the coordinator's authority, prove this site's keys to it, and ask for its place.

    Raises:
        CoordinatorUnreachable, CoordinatorUnproven, EnrolmentRefused, ClockOrDates, ProxyUnusable,
        ProxyLoginRefused, ProxyForbids: see their pages.
        MessageInvalid: the answer is malformed.
    """
    authority = _fetch_authority(site, invite)
    request = Request.make(
        invite,
        site.identity(),
        read_secret(site.keys / NODE_KEY),
        read_secret(site.keys / TLS_KEY),
    )
    context = _context(authority)
    reply = Reply.decode(
        _talk(site, context, "POST", invite.enrolment, PATH_ENROL, request.encode())
    )
    member = Membership(
        fleet=invite.fleet,
        enrolment=invite.enrolment,
        authority=invite.authority.hex(),
        root=invite.root.hex(),
        invite=invite.invite_id.hex(),
        site=invite.site,
    )
    write_atomic(site.root / AUTHORITY, authority)
    # Last: a site with this file can go on without the invite.
    write_atomic(site.root / MEMBERSHIP, member.model_dump_json(indent=2).encode())
    return _took(site, member, reply)


def look(site: Site) -> Joined:
    """Ask how the request stands, or, once there is a certificate, for the present roster.

    Raises:
        InviteInvalid: the site has not asked yet.
        CoordinatorUnreachable, CoordinatorUnproven, EnrolmentRefused, ClockOrDates, ProxyUnusable,
        ProxyLoginRefused, ProxyForbids: see their pages.
        MessageInvalid, RosterInvalid, RosterMismatch: the answer is malformed or not for us.
    """
    member = membership(site)
    if (site.keys / CERTIFICATE).exists():
        return _offer(site, member, fetch_roster(site))
    question = ask_status(
        bytes.fromhex(member.invite), site.identity(), bytes.fromhex(member.authority)
    )
    context = pinned_context(site)
    reply = _talk(site, context, "POST", member.enrolment, PATH_STATUS, question)
    return _took(site, member, Reply.decode(reply))


def client_context(site: Site) -> ssl.SSLContext:
    """TLS to the coordinator as this site: its pinned authority, this site's certificate.

    Raises:
        FileUnreadable: a key or certificate is missing or can be read by others.
        CoordinatorUnproven: the authority on disk is not the pinned one.
    """
    context = pinned_context(site)
    show_certificate(site, context)
    return context


def pinned_context(site: Site) -> ssl.SSLContext:
    """TLS to the coordinator as nobody: its pinned authority, no certificate of the site.

    Raises:
        FileUnreadable, CoordinatorUnproven: see ``client_context``.
    """
    return _context(_pinned(site, membership(site)))


def fetch_roster(site: Site) -> bytes:
    """The signed roster in force, over the enrolled sites' port; see ``look``."""
    return _talk(site, client_context(site), "GET", membership(site).fleet, PATH_ROSTER)


def _took(site: Site, member: Membership, reply: Reply) -> Joined:
    """Act on how the request stands: store the certificate and prove that it works."""
    if reply.state == "revoked":
        raise EnrolmentRefused(
            "The coordinator has revoked this site.", remedy="Ask the coordinator why."
        )
    if reply.state != "approved":
        return Joined("pending")
    _keep_certificate(site, member, reply.certificate)
    return _offer(site, member, fetch_roster(site))


def _keep_certificate(site: Site, member: Membership, der: bytes) -> None:
    own = read_secret(site.keys / TLS_KEY)
    write_atomic(site.keys / CERTIFICATE, checked_certificate(site, member, der, own))


def checked_certificate(site: Site, member: Membership, der: bytes, tls_pem: bytes) -> bytes:
    """A certificate that the coordinator sent, in PEM, if it is for this site and a key of it.

    Args:
        site: the site.
        member: its membership.
        der: what was sent.
        tls_pem: the private key that it must be for, PEM.

    Raises:
        CoordinatorUnproven: it is for another key or site, or not issued by the pinned authority.
        FileUnreadable: see ``client_context``.
        IdentityInvalid: the key is damaged.
    """
    authority = x509.load_pem_x509_certificate(_pinned(site, member))
    own = ec_keys.load_private(tls_pem, Purpose.TLS).public_key()
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(authority)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        fits = certificate.public_key() == own and [name.value for name in names] == [site.name]
    except Exception:
        fits = False
    if not fits:
        raise CoordinatorUnproven(
            "The certificate received is not for this site's key, or not issued by the authority.",
            remedy="Tell the coordinator; do not go on.",
        )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _offer(site: Site, member: Membership, signed: bytes) -> Joined:
    """Check that the roster is the root's and names this site with its own key; keep it."""
    roster = open_roster(signed, bytes.fromhex(member.root))
    key = roster.public_key(site.name)
    if key is None or not hmac.compare_digest(key, site.identity().public):
        raise RosterMismatch(
            "The roster offered does not list this site with its own key.",
            remedy="Tell the coordinator; do not accept this roster.",
        )
    write_atomic(site.root / OFFERED, signed)
    return Joined("approved", signed)


def _pinned(site: Site, member: Membership) -> bytes:
    """The authority's certificate, if it is the one that the invite named."""
    pem = read_secret(site.root / AUTHORITY)
    _check_authority(pem, bytes.fromhex(member.authority), member.enrolment)
    return pem


def _check_authority(pem: bytes, expected: bytes, address: str) -> None:
    try:
        found = x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())
    except ValueError:
        found = b""
    if not hmac.compare_digest(found, expected):
        raise _unproven(address)


def _fetch_authority(site: Site, invite: Invite) -> bytes:
    """Get the authority's certificate from whoever answers; believe it by its hash alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Nothing secret is sent on this connection, and what comes is compared with the invite.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    pem = _talk(site, context, "GET", invite.enrolment, PATH_AUTHORITY)
    _check_authority(pem, invite.authority, invite.enrolment)
    return pem


def _context(authority: bytes) -> ssl.SSLContext:
    """TLS 1.3 to a server of this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode())
    return context


def _talk(
    site: Site,
    context: ssl.SSLContext,
    method: str,
    address: str,
    path: str,
    body: bytes = b"",
) -> bytes:
    """One request over TLS, through the site's proxy if it has one; the answer's body."""
    answer = dial(context, method, address, path, body, proxy=proxy_of(site))
    if isinstance(answer, Failure):
        raise error_of(answer, site)
    check_status(answer)
    return answer.body


def check_status(answer: Answer) -> None:
    """Pass an answer of status 200.

    Raises:
        EnrolmentRefused: the coordinator answered otherwise, with why in the closed list.
    """
    if answer.status == 200:
        return
    code = answer.body[:64].decode("ascii", "replace")
    raise EnrolmentRefused(
        "The coordinator refused the request.",
        why=_WHY.get(code, f"It answered with status {answer.status}."),
        remedy="Ask the coordinator, by telephone.",
    )


def _unproven(address: str) -> DeploymentError:
    return CoordinatorUnproven(
        f"{address} is not the coordinator that the invite names.",
        why="Nothing secret was sent.",
        remedy="Ask your network team whether TLS is inspected on the way.",
    )
