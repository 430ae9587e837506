"""Commands `cloister server invite`, `sites`, `approve` and `revoke`: who takes part.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.confirm import Yes, ask, confirm
from cloister_fl.cli.folder_option import CoordinatorFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import OptionInvalid, SiteStateInvalid
from cloister_fl.system import utc
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.server.coordinator.folder import Coordinator
    from cloister_fl.server.coordinator.site_database import SiteRow

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

INVITE_DAYS = 7.0


def invite(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the sites.")],
    folder: Folder = Path(),
    days: Annotated[float, typer.Option(help="Days for which the invite is valid.")] = INVITE_DAYS,
    show: Annotated[
        bool, typer.Option("--print", help="Print the invite, and write no file.")
    ] = False,
) -> None:
    """Create a one-time invite for each site.

    It is one line of text, for that hospital only.
    """
    _require()
    if not 0 < days <= 90:
        raise OptionInvalid(
            "--days is out of range.", remedy="Give a number above 0 and at most 90."
        )
    issue_invites(_open(folder), names, days, show=show)


def issue_invites(
    place: Coordinator, names: Iterable[str], days: float = INVITE_DAYS, *, show: bool = False
) -> None:
    """Invite all these sites or none, and say where the invites are; ``show`` prints them."""
    from cloister_fl.server.coordinator.site_approval import invite_sites

    for one in invite_sites(place, names, int(days * 86400), to_file=not show):
        if one.path is None:
            typer.echo(one.line)
        else:
            typer.echo(f"The invite of {one.site} is in {one.path}. Give it to that hospital only.")
        if one.replaced:
            # Not among invites that are printed for another program.
            typer.echo(f"The earlier invite of {one.site} no longer works.", err=True)


def sites(folder: Folder = Path(), as_json: JsonOption = False) -> None:
    """Show the sites: invited, pending, approved or revoked."""
    _require()
    from cloister_fl.membership.identity import fingerprint

    place = _open(folder)
    with place.registry() as registry:
        rows, invited = registry.sites(), registry.invited()
    if as_json:
        told = [
            {
                "name": row.name,
                "state": row.state,
                "fingerprint": fingerprint(row.identity),
                "asked": row.asked,
                "decided": row.decided,
                "last_seen": row.seen,
                "valid_until": row.valid_until,
            }
            for row in rows
        ]
        open_invites = [{"name": name, "expires": expires} for name, expires in invited]
        typer.echo(json.dumps({"sites": told, "invited": open_invites}))
        return
    for row in rows:
        seen = f"seen {_when(row.seen)}" if row.seen else "not seen yet"
        typer.echo(f"{row.name:24} {row.state:9} {fingerprint(row.identity)}  {seen}")
    for name, expires in invited:
        typer.echo(f"{name:24} invited   until {_when(expires)}")
    if not rows and not invited:
        typer.echo(
            f"No site has been invited yet: cloister server invite HOSPITAL{dir_option(folder)}"
        )


def approve(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="The sites; default: all that are pending."),
    ] = None,
    folder: Folder = Path(),
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Fingerprint that the hospital read out by telephone; for one site."),
    ] = None,
) -> None:
    """Approve sites, after comparing fingerprints by telephone.

    These are sites that asked to join; each has the fingerprint of its own key.
    """
    _require()
    from cloister_fl.server.coordinator.site_approval import approve_site

    if fingerprint is not None and len(names or ()) != 1:
        raise OptionInvalid(
            "--fingerprint needs exactly one site.",
            remedy="Name the site: "
            f"cloister server approve NAME{dir_option(folder)} --fingerprint '...'",
        )
    place = _open(folder)
    with place.registry() as registry:
        known = {row.name: row for row in registry.sites()}
    waiting = [name for name, row in known.items() if row.state == "pending"]
    if not names and not waiting:
        raise SiteStateInvalid(
            "No site waits for approval.",
            remedy=f"List the sites: cloister server sites{dir_option(folder)}",
        )
    for name in names or ():
        if name not in known or known[name].state == "revoked":
            raise SiteStateInvalid(
                f"{name} {'was revoked' if name in known else 'has not asked to join'}.",
                remedy=f"List the sites: cloister server sites{dir_option(folder)}",
            )
    left_out = []
    for name in names or waiting:
        if not _compared(known[name], fingerprint, folder):
            left_out.append(name)
        elif approve_site(place, name):
            typer.echo(f"{name} is approved. Its 'start' or 'join' fetches its certificate.")
        else:
            typer.echo(f"{name} was approved already.")
    for name in left_out:
        typer.echo(f"{name} is not approved. If its key is not the hospital's, run:")
        typer.echo(f"  cloister server revoke {name}{dir_option(folder)}")
    if left_out:
        raise typer.Exit(SiteStateInvalid.exit_status)


def _compared(row: SiteRow, read_out: str | None, folder: Path) -> bool:
    """Return whether the fingerprint is the one that the hospital read out; ask on a terminal."""
    from cloister_fl.membership import identity

    shown = identity.fingerprint(row.identity)
    if read_out is not None:
        if _digits(read_out) != _digits(shown):
            raise SiteStateInvalid(
                f"The key of {row.name} does not have this fingerprint.",
                why="Another party may have used the invite.",
                remedy="Do not approve. Run: "
                f"cloister server revoke {row.name}{dir_option(folder)}",
            )
        return True
    if row.state != "pending":
        return True
    if not sys.stdin.isatty():
        raise OptionInvalid(
            "Not a terminal: the fingerprint was not compared.",
            remedy=f"Give what the hospital read out: cloister server approve {row.name}"
            f"{dir_option(folder)} --fingerprint '...'",
        )
    typer.echo(f"{row.name}'s key has the fingerprint\n  {shown}")
    return ask(f"Did {row.name} read out the same, by telephone?")


def revoke(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    folder: Folder = Path(),
    yes: Yes = False,
) -> None:
    """Revoke a site and its keys, permanently.

    Its open connections are closed at once. Its name can be invited again, for new keys.
    """
    _require()
    from cloister_fl.server.coordinator.site_approval import revoke_site

    place = _open(folder)
    with place.registry() as registry:
        states = {row.name: row.state for row in registry.sites()}
        invited = {one for one, _ in registry.invited()}
    if states.get(name) == "revoked" and name not in invited:
        typer.echo(f"{name} was revoked already.")
        return
    # Of an unknown name, the registry says so.
    if name in states or name in invited:
        confirm(
            f"The site {name} ({states[name]}) is revoked permanently."
            if name in states and name not in invited
            else f"The open invite of {name} becomes invalid.",
            owner=f"federation {place.file.federation.name}",
            folder=place.root,
            command=("cloister", "server", "revoke", name),
            yes=yes,
        )
    revoke_site(place, name)
    typer.echo(
        f"{name} is revoked and off the roster. Its keys cannot be used again. With new keys, it "
        f"can be invited: cloister server invite {name}{dir_option(folder)}"
        if name in states and name not in invited
        else f"The invite of {name} no longer works."
    )


def accept_ledger(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    folder: Folder = Path(),
    yes: Yes = False,
) -> None:
    """Let a site take part with another privacy ledger than before.

    Ask the hospital first why it has a new one: it may have forgotten what was spent.
    """
    _require()
    from cloister_fl.server.rounds.site_ledgers import LEDGER_ACCEPTED, known_ledgers

    place = _open(folder)
    known = known_ledgers(place.federation().log.entries()).get(name)
    if known is None or not known.offered:
        raise SiteStateInvalid(
            f"{name} was not refused for its privacy ledger.",
            remedy=f"See why a site does not take part: cloister server status{dir_option(folder)}",
        )
    offered = known.offered
    confirm(
        f"The site {name} may take part with the privacy ledger {offered[:16]}, and no longer with "
        "the one before. What its patients spent there counts only if the hospital linked it.",
        owner=f"federation {place.file.federation.name}",
        folder=place.root,
        command=("cloister", "server", "accept-ledger", name),
        yes=yes,
    )
    with place.deciding():
        place.federation().note(LEDGER_ACCEPTED, site=name, ledger=offered)
    typer.echo(f"Accepted: {name} with the ledger {offered[:16]}.")


def _require() -> None:
    require("server", "flwr", "grpc", "grpc_health", "uvicorn")


def _open(folder: Path) -> Coordinator:
    from cloister_fl.server.coordinator.folder import open_coordinator

    return open_coordinator(folder)


def _digits(fingerprint: str) -> str:
    return "".join(fingerprint.split()).lower()


def _when(moment: int) -> str:
    return f"{utc.to_minute(utc.from_unix(moment))} UTC"
