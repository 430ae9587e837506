"""Commands `cloister client join`, `renew`, `address`, `roster` and `proxy`.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.confirm import Yes, ask, ask_hidden, confirm
from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.client.cli.site_folder import PatientsAtMost, site_folder
from cloister_fl.errors import (
    InviteInvalid,
    OptionInvalid,
    RosterMismatch,
    SecureAggregationError,
    ServiceState,
)
from cloister_fl.system.optional import require
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.client.network.join import Joined
    from cloister_fl.client.site.folder import Site
    from cloister_fl.membership.enrolment import Invite

POLL_S = 5.0

Accept = Annotated[
    str | None,
    typer.Option(
        "--accept-roster",
        metavar="DIGEST",
        help="Digest of the roster, as `cloister client roster` shows it, once compared with the "
        "other hospitals.",
    ),
]


def join(
    invite: Annotated[
        str | None,
        typer.Argument(help="File with the invite, or - for standard input; else it is asked for."),
    ] = None,
    folder: Folder = Path(),
    dicom: Annotated[
        Path | None, typer.Option(help="Folder of the images, from here; for a new site folder.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="The labels file, CSV, from here; for a new site folder.")
    ] = None,
    patients_at_most: PatientsAtMost = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is approved.")] = False,
    accept_roster: Accept = None,
    new_keys: Annotated[
        bool,
        typer.Option(
            "--new-keys",
            help="Replace this site's identity and node keys, with an invite for a revoked site.",
        ),
    ] = False,
    yes: Yes = False,
    proxy: Annotated[
        str | None,
        typer.Option(help="http://HOST:PORT of the outbound proxy, for a site.toml made now."),
    ] = None,
    proxy_user: Annotated[str, typer.Option(help="The user, where the proxy asks for one.")] = "",
) -> None:
    """Join a federation with an invite, or fetch its approval.

    The site's keys are created, and its place is asked for. Repeat it, without the invite, to fetch
    the approval. A site whose keys are lost, and that the coordinator revoked and invited again,
    joins with --new-keys: its name and its privacy ledger stay.
    """
    require("client", "httpx")
    from cloister_fl.client.network.join import MEMBERSHIP, ask, look, prepare
    from cloister_fl.client.site.folder import open_site, require_as_written
    from cloister_fl.client.site.policy import bound_missing
    from cloister_fl.client.site.settings import network_of
    from cloister_fl.membership.enrolment import Invite
    from cloister_fl.membership.identity import fingerprint
    from cloister_fl.system.git_ignore import uncovered_by_git_ignore

    named = proxy is not None or bool(proxy_user)
    network = network_of(proxy or "", proxy_user) if named else None
    dicom, labels = (path and path.absolute() for path in (dicom, labels))
    if invite is None and not new_keys and (folder / MEMBERSHIP).exists():
        site = open_site(site_folder(folder))
        require_as_written(
            site, dicom=dicom, labels=labels, network=network, patients_at_most=patients_at_most
        )
        joined = look(site)
    else:
        read = Invite.decode(_read_invite(invite))
        if new_keys:
            _replace_keys(site_folder(folder), read, yes=yes)
        site = prepare(
            folder, read, network, dicom=dicom, labels=labels, patients_at_most=patients_at_most
        )
        if gap := uncovered_by_git_ignore(folder):
            typer.echo(gap, err=True)
        for path, what in ((site.dicom, "folder of images"), (site.labels, "labels file")):
            if not path.exists():
                typer.echo(f"There is no {what} yet: {path}. site.toml says where it is.")
        if missing := bound_missing(site.policy):
            typer.echo(missing)
        joined = ask(site, read)
    typer.echo(f"Site {site.name}; its key's fingerprint, for the telephone:")
    typer.echo(f"  {fingerprint(site.identity().public)}")
    while wait and joined.state == "pending":
        time.sleep(POLL_S)
        joined = look(site)
    if joined.state == "pending":
        where = dir_option(folder)
        typer.echo("The coordinator has not approved it yet. Call them and compare. Then either:")
        typer.echo(f"  wait for the approval     cloister client start{where}")
        typer.echo(f"  or ask for it again       cloister client join{where}")
        return
    typer.echo("The coordinator has approved this site; its certificate is stored.")
    offer(site, joined, accept_roster, folder)


def _replace_keys(folder: Path, invite: Invite, *, yes: bool) -> None:
    """Replace the site's keys, once for an invite, after asking."""
    from cloister_fl.client.network.new_keys import replace_keys, replaceable
    from cloister_fl.client.service import running

    site = replaceable(folder, invite)
    if site is None:
        return
    if running(site) is not None:
        raise ServiceState(
            "The service of this site is running.",
            remedy=f"Stop it first: {site.command('stop')}",
        )
    confirm(
        "Its identity, node and TLS keys are deleted, and new ones are made. Every other hospital "
        "must accept the roster with the new key. The privacy ledger and its spending stay.",
        owner=f"site {site.name}",
        folder=site.root,
        command=("cloister", "client", "join", "INVITE-FILE", "--new-keys"),
        yes=yes,
    )
    replace_keys(site, invite)


def renew(folder: Folder = Path()) -> None:
    """Renew this site's certificate and node key in place.

    The running service does so by itself, from 60 days before the end. The identity key stays.
    """
    require("client", "httpx")
    from cloister_fl.client.network.renewal import renew_certificate
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    made = renew_certificate(site)
    typer.echo(f"The certificate of site {site.name} is renewed, until {made.until}.")


def address(
    new: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The coordinator's new address.")],
    enrolment: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Its port for joining; else the next port.")
    ] = "",
    folder: Folder = Path(),
) -> None:
    """Take another address of the same coordinator.

    The server there must prove that it is this site's coordinator; else nothing is changed. A
    running service goes there at once.
    """
    require("client", "httpx")
    from cloister_fl.client.network.new_address import take_address
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    made = take_address(site, new, enrolment)
    typer.echo(f"Site {site.name} now finds its coordinator at {made.fleet}.")


def roster(folder: Folder = Path(), accept_roster: Accept = None) -> None:
    """Show the federation's roster; accept it if it has changed.

    The roster lists the sites and their keys. Compare its digest with the other hospitals.
    """
    require("client", "httpx")
    from cloister_fl.client.network.join import look
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    joined = look(site)
    if joined.state == "pending":
        typer.echo("The coordinator has not approved this site yet.")
        return
    offer(site, joined, accept_roster, folder)


def proxy(folder: Folder = Path()) -> None:
    """Set the outbound proxy's password.

    It is read from a prompt or from standard input.
    """
    require("client", "httpx")
    from cloister_fl.client.network.proxy import FILE, set_password, user_of
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    user = user_of(site)
    if sys.stdin.isatty():
        text = ask_hidden(f"Password of {user} at the proxy (it is not shown)")
    else:
        text = sys.stdin.read(1 << 16)
    set_password(site, text)
    typer.echo(f"The password is stored for site {site.name} in {site.keys / FILE}, mode 0600.")


def offer(site: Site, joined: Joined, accepted: str | None, folder: Path) -> None:
    """Show a roster and how it differs from the trusted one; trust it if the steward says so.

    Args:
        site: the site.
        joined: with the roster offered.
        accepted: the digest that the steward compared, in hexadecimal; else it is asked for.
        folder: the site's, as the command line named it, for the commands that are told.

    Raises:
        typer.Exit: the steward said no.
        OptionInvalid, RosterInvalid, RosterMismatch: see ``trusted_roster.accept``.
    """
    from cloister_fl.client.network.join import membership
    from cloister_fl.client.site.trusted_roster import accept, examine
    from cloister_fl.membership.identity import fingerprint

    root = bytes.fromhex(membership(site).root)
    offered = examine(site.roster, joined.signed_roster, root)
    digest, change = offered.roster.digest, offered.change
    if change is not None and not any((change.added, change.removed, change.rekeyed)):
        typer.echo(
            f"The roster is the trusted one, with {counted(len(offered.roster.entries), 'site')}."
        )
        return
    typer.echo(f"\nThe roster of {offered.roster.federation}, number {offered.roster.serial}:")
    for entry in offered.roster.entries:
        own = "  (this site)" if entry.site == site.name else ""
        typer.echo(f"  {entry.site:24} {fingerprint(entry.public_key)}{own}")
    if change is not None:
        for word, names in (
            ("new", change.added),
            ("removed", change.removed),
            ("with another key", change.rekeyed),
        ):
            if names:
                typer.echo(f"  {word}: {', '.join(names)}")
    typer.echo(f"  digest  {_groups(digest)}")
    typer.echo(_sums_among(site, len(offered.roster.entries)))
    if accepted is not None:
        confirmed = _digest(accepted, folder)
    elif sys.stdin.isatty():
        typer.echo("Compare the digest, and each fingerprint, with the other sites by telephone.")
        if not ask("Do all of them agree?"):
            typer.echo("Not accepted: this site keeps the roster that it trusted before, if any.")
            raise typer.Exit(RosterMismatch.exit_status)
        confirmed = digest
    else:
        typer.echo("Compare it with the other sites by telephone, then accept it:")
        typer.echo(f"  cloister client roster --accept-roster DIGEST{dir_option(folder)}")
        return
    accept(site.roster, joined.signed_roster, root, confirmed=confirmed)
    typer.echo("Accepted: this site takes part with these sites and no others.")


def _sums_among(site: Site, count: int) -> str:
    """What the sites of a roster make of a sum, under this site's policy."""
    from cloister_fl.secagg.parameters import Parameters

    policy = site.policy
    try:
        least = Parameters.derive(count, policy.colluders).m
    except SecureAggregationError:
        return (
            f"  sums    none yet: {counted(count, 'site')} are too few where "
            f"{counted(policy.colluders, 'site')} may work with the coordinator (policy.colluders)"
        )
    if policy.max_weight_ratio == 1:
        weights = "all weights alike"
    else:
        weights = f"no weight above {policy.max_weight_ratio:g} times another"
    return (
        f"  sums    if all are invited, {least} of {count} or more in each, of whom "
        f"{policy.colluders} may work with the coordinator; {weights}"
    )


def _read_invite(argument: str | None) -> str:
    """The invite's text, from a file, standard input or a prompt; never from the command line."""
    from cloister_fl.membership.enrolment import looks_like_invite
    from cloister_fl.system.toml import read_text

    if argument is None:
        if not sys.stdin.isatty():
            raise OptionInvalid(
                "No invite was given.",
                remedy="Name its file, or - for standard input: cloister client join INVITE-FILE",
            )
        return ask_hidden("Paste the invite (it is not shown)")
    if looks_like_invite(argument):
        raise InviteInvalid(
            "The invite was given on the command line.",
            why="Other users of this machine can read a command line while it runs.",
            remedy="Save it to a file, or run 'cloister client join' and paste it at the prompt.",
        )
    return sys.stdin.read(1 << 16) if argument == "-" else read_text(Path(argument))


def _digest(text: str, folder: Path) -> bytes:
    try:
        return bytes.fromhex("".join(text.split()))
    except ValueError:
        raise OptionInvalid(
            "The digest is not hexadecimal.",
            remedy=f"Copy it from what this shows: cloister client roster{dir_option(folder)}",
        ) from None


def _groups(digest: bytes) -> str:
    text = digest.hex()
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))
