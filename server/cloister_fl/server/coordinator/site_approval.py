"""Invite, approve and revoke sites in the coordinator's folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization

from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import OptionInvalid, SiteStateInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import Invite
from cloister_fl.membership.identity import fingerprint
from cloister_fl.membership.roster import SITE_ID
from cloister_fl.server.coordinator.folder import Coordinator, publish_roster
from cloister_fl.system.files import make_private_dir, write_atomic
from cloister_fl.system.git_ignore import keep_out_of_git


def require_site_name(name: str) -> None:
    """Refuse a name that no site can have.

    Raises:
        OptionInvalid: see above.
    """
    if not SITE_ID.fullmatch(name):
        raise OptionInvalid(
            f"The site name {name!r} cannot be used.",
            remedy="Use lower-case letters, digits and hyphens, at most 63.",
        )


@dataclass(frozen=True)
class IssuedInvite:
    """An invite, ready for its hospital.

    Attributes:
        site: the site's id.
        line: the invite itself, one line; a secret.
        path: the file that holds it, if there is one.
        replaced: whether an earlier one, which nobody had used, no longer works.
    """

    site: str
    line: str = field(repr=False)
    path: Path | None
    replaced: bool


def invite_sites(
    place: Coordinator, names: Iterable[str], lifetime_s: int, *, to_file: bool
) -> tuple[IssuedInvite, ...]:
    """Create an invite for each site, or for none; unused earlier ones of the same sites end.

    Args:
        place: the coordinator's folder.
        names: the sites' ids; one that stands twice gets one invite.
        lifetime_s: how long they can be used, in seconds.
        to_file: whether to write them to ``invites/NAME.invite``, mode 0600.

    Raises:
        OptionInvalid: a name cannot be a site's.
        SiteStateInvalid: a site has asked already.
        AuditLogDamaged: they cannot be logged; no invite is handed out.
    """
    asked = tuple(dict.fromkeys(names))
    for name in asked:
        require_site_name(name)
    authority, folder = place.authority(), place.root / "invites"
    issued = []
    with place.deciding():
        with place.registry() as registry:
            made = registry.invite(asked, lifetime_s)
        for one in made:
            # What this replaces must not be handed out any more, whatever comes next.
            (folder / f"{one.site}.invite").unlink(missing_ok=True)
            place.federation().note("invited", site=one.site, expires=one.expires)
        if to_file:
            make_private_dir(folder)
            keep_out_of_git(folder)
        for one in made:
            line = Invite(
                fleet=place.file.fleet.addresses[0],
                enrolment=place.file.enrolment.addresses[0],
                authority=authority.fingerprint,
                root=place.federation_root(),
                site=one.site,
                invite_id=one.invite_id,
                secret=one.secret,
                expires=one.expires,
            ).encode()
            path = folder / f"{one.site}.invite" if to_file else None
            if path is not None:
                write_atomic(path, line.encode() + b"\n")
            issued.append(IssuedInvite(one.site, line, path, one.replaced))
    return tuple(issued)


def approve_site(place: Coordinator, name: str) -> bool:
    """Certify a pending site's TLS key and put its identity on the roster.

    The database comes first, in one transaction; a roster that a kill left behind is signed when
    this is repeated, or by any later decision.

    Returns:
        Whether it was pending; where it was approved already, only the roster is seen to.

    Raises:
        SiteStateInvalid: it has not asked, or was revoked.
        AuditLogDamaged: it cannot be logged; the site is not approved.
    """
    authority = place.authority()
    with place.deciding(), place.registry() as registry:
        row = registry.site(name)
        fresh = row is not None and row.state == "pending"
        if row is None or row.state == "revoked":
            raise SiteStateInvalid(
                f"{name} {'was revoked' if row else 'has not asked to join'}.",
                remedy=f"List the sites: cloister server sites{dir_option(place.root)}",
            )
        if fresh:
            key = ec_keys.load_public(row.tls_key, Purpose.TLS)
            assert key is not None, "checked when the site asked"
            certificate = authority.site_certificate(key, name)
            # First: what the log does not know is not approved.
            place.federation().note(
                "approved",
                site=name,
                key_fingerprint=fingerprint(row.identity),
                certificate=certificate.fingerprint(hashes.SHA256()).hex(),
            )
            registry.approve(
                name,
                certificate.public_bytes(serialization.Encoding.DER),
                certificate.fingerprint(hashes.SHA256()),
                int(certificate.not_valid_after_utc.timestamp()),
            )
        publish_roster(place, registry)
    (place.root / "invites" / f"{name}.invite").unlink(missing_ok=True)
    return fresh


def revoke_site(place: Coordinator, name: str) -> None:
    """Revoke a site, end its invites, and take it off the roster. Can be repeated.

    Raises:
        SiteStateInvalid: nobody of that name was invited or has asked.
        AuditLogDamaged: the site is revoked, but that cannot be logged, and it is on the roster.
    """
    with place.deciding(), place.registry() as registry:
        # Before it is logged: a log that cannot be written keeps nobody in.
        registry.revoke(name)
        place.federation().note("revoked", site=name)
        publish_roster(place, registry)
    (place.root / "invites" / f"{name}.invite").unlink(missing_ok=True)
