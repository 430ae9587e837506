"""Invite, approve and revoke sites in the coordinator's folder."""

from __future__ import annotations

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


def invite_site(
    place: Coordinator, name: str, lifetime_s: int, *, to_file: bool
) -> tuple[str, Path | None]:
    """Create an invite; an unused earlier one of the same site ends.

    Args:
        place: the coordinator's folder.
        name: the site's id.
        lifetime_s: how long it can be used, in seconds.
        to_file: whether to write it to ``invites/NAME.invite``, mode 0600.

    Returns:
        The line, and the file if there is one.

    Raises:
        OptionInvalid: the name cannot be a site's.
        SiteStateInvalid: the site has asked already.
        AuditLogDamaged: it cannot be logged; the invite is not handed out.
    """
    require_site_name(name)
    authority = place.authority()
    with place.deciding():
        with place.registry() as registry:
            invite_id, secret, expires = registry.invite(name, lifetime_s)
        place.federation().note("invited", site=name, expires=expires)
        line = Invite(
            fleet=place.file.fleet.addresses[0],
            enrolment=place.file.enrolment.addresses[0],
            authority=authority.fingerprint,
            root=place.federation_root(),
            site=name,
            invite_id=invite_id,
            secret=secret,
            expires=expires,
        ).encode()
        if not to_file:
            return line, None
        make_private_dir(place.root / "invites")
        keep_out_of_git(place.root / "invites")
        path = place.root / "invites" / f"{name}.invite"
        write_atomic(path, line.encode() + b"\n")
    return line, path


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
