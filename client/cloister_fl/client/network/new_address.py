"""Another address of the same coordinator: taken only from a server that proves to be the one.

The coordinator's authority and root stay as the invite pinned them, so an address that somebody
else gave leads to an error and to nothing else.
"""

from __future__ import annotations

from cloister_fl.client.network.http import Failure, dial
from cloister_fl.client.network.http_errors import error_of
from cloister_fl.client.network.join import (
    MEMBERSHIP,
    Membership,
    check_status,
    client_context,
    membership,
    pinned_context,
)
from cloister_fl.client.network.node_keys import CERTIFICATE
from cloister_fl.client.network.proxy import proxy_of
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import OptionInvalid
from cloister_fl.membership.enrolment import PATH_ROSTER, PATH_STATUS, ask_status, split_address
from cloister_fl.membership.roster import open_roster
from cloister_fl.system.files import write_atomic

ADDRESS = "address"
"""Kind of the audit log's entry."""


def take_address(site: Site, fleet: str, enrolment: str = "") -> Membership:
    """Look for the coordinator at another address, and go there from now on.

    A service that runs restarts its node. Can be repeated.

    Args:
        site: a site that has joined.
        fleet: HOST:PORT of the port that enrolled nodes talk to.
        enrolment: HOST:PORT of the port for joining; the port after ``fleet``'s where it is empty.

    Raises:
        OptionInvalid: an address is not HOST:PORT.
        InviteInvalid: the site has joined no federation.
        CoordinatorUnreachable, CoordinatorUnproven, EnrolmentRefused, ClockOrDates, ProxyUnusable,
        ProxyLoginRefused, ProxyForbids: see their pages; nothing was changed.
        RosterInvalid: the answer is not signed by the federation's root; nothing was changed.
        OutputInTheWay: it cannot be written.
        AuditLogDamaged: it cannot be logged; the address is the new one.
    """
    held = membership(site)
    made = held.model_copy(update={"fleet": fleet, "enrolment": enrolment or _next_port(fleet)})
    for address in (made.fleet, made.enrolment):
        if split_address(address) is None:
            raise OptionInvalid(
                f"{address} is not HOST:PORT.", remedy="Write it as fl.example.org:9443."
            )
    _require_coordinator(site, made)
    if made != held:
        write_atomic(site.root / MEMBERSHIP, made.model_dump_json(indent=2).encode())
        log_of(site).append(ADDRESS, fleet=made.fleet, enrolment=made.enrolment)
    return made


def _require_coordinator(site: Site, member: Membership) -> None:
    """Refuse a server that does not show a certificate of the pinned authority for this name."""
    if (site.keys / CERTIFICATE).exists():
        open_roster(_asked(site, "GET", member.fleet, PATH_ROSTER), bytes.fromhex(member.root))
        return
    # Before the approval the other port is shut.
    question = ask_status(
        bytes.fromhex(member.invite), site.identity(), bytes.fromhex(member.authority)
    )
    _asked(site, "POST", member.enrolment, PATH_STATUS, question)


def _asked(site: Site, method: str, address: str, path: str, body: bytes = b"") -> bytes:
    is_in = path == PATH_ROSTER
    context = client_context(site) if is_in else pinned_context(site)
    answer = dial(context, method, address, path, body, proxy=proxy_of(site))
    if isinstance(answer, Failure):
        raise error_of(answer, site)
    check_status(answer)
    return answer.body


def _next_port(address: str) -> str:
    """The port that ``cloister server init`` gives to enrolment, unless it is told another."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}" if port.isascii() and port.isdigit() else address
