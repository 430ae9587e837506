"""New keys for a site whose own are lost, or were read by others: same folder, name and ledger.

The coordinator revokes the site and invites its name again; the invite is used with new keys of
identity, node and TLS, and every other site's steward accepts the roster that has the new identity.
What the site spent stays in its ledger, whose name at the coordinator does not depend on a key.

::

    keys/new-keys.invite     public id of the invite for which the keys were replaced

Keys are replaced once for an invite, so a join that was killed, or whose answer was lost, goes on
with the same keys when it is repeated.
"""

from __future__ import annotations

from pathlib import Path

from cloister_fl.client.network.join import require_invited
from cloister_fl.client.network.node_keys import CERTIFICATE, NODE_KEY, TLS_KEY
from cloister_fl.client.network.renewal import BEFORE, PENDING
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import IDENTITY, Site, create_identity, open_site
from cloister_fl.errors import InviteInvalid
from cloister_fl.membership.enrolment import Invite
from cloister_fl.membership.identity import fingerprint
from cloister_fl.system.files import write_atomic

DONE = "new-keys.invite"
NEW_KEYS = "new-keys"
"""Kind of the audit log's entry."""


def replaceable(root: Path, invite: Invite) -> Site | None:
    """The site whose keys an invite may replace; ``None`` where it has replaced them already.

    A missing identity is made, so that the site can be opened.

    Raises:
        InviteInvalid: the folder is another site's, or belongs to another federation, or was
            enrolled with this very invite.
        SiteFileInvalid, FileUnreadable: see ``open_site``.
    """
    # A kill may have come between the old identity and the new one.
    create_identity(root)
    site = open_site(root)
    held = require_invited(site, invite)
    if _done(site) == invite.invite_id.hex():
        return None
    if held is not None and held.invite == invite.invite_id.hex():
        raise InviteInvalid(
            "This site was enrolled with this invite, so its keys stay.",
            remedy="If they are lost, ask the coordinator to revoke the site and to invite it "
            "again.",
        )
    return site


def replace_keys(site: Site, invite: Invite) -> None:
    """Delete the keys of a site and make another identity; ``join.prepare`` makes the others.

    Only while the service does not run.

    Raises:
        OutputInTheWay: a file cannot be written.
        AuditLogDamaged: the new identity cannot be logged.
    """
    for name in (CERTIFICATE, BEFORE, PENDING, TLS_KEY, NODE_KEY, IDENTITY):
        (site.keys / name).unlink(missing_ok=True)
    # From here on, what is missing is made, and what is there stays.
    write_atomic(site.keys / DONE, invite.invite_id.hex().encode())
    create_identity(site.root)
    log_of(site).append(NEW_KEYS, key_fingerprint=fingerprint(site.identity().public))


def _done(site: Site) -> str:
    path = site.keys / DONE
    return path.read_text("ascii", "replace") if path.exists() else ""
