"""`cloister server`: the commands of the coordinating site.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.confirm import Yes, confirm
from cloister_fl.cli.folder_option import CoordinatorFolder as Folder
from cloister_fl.cli.folder_option import FolderTyper, dir_option, folder_option, one_folder
from cloister_fl.errors import OptionInvalid, ServerState, SiteStateInvalid
from cloister_fl.server.cli.audit_commands import audit
from cloister_fl.server.cli.run_commands import report, resume, run
from cloister_fl.system import utc
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.server.coordinator.folder import Coordinator
    from cloister_fl.server.coordinator.run_queue import Status
    from cloister_fl.server.coordinator.site_database import SiteRow

_ORDER = (
    *("init", "start", "stop", "status"),
    *("invite", "sites", "approve", "revoke"),
    *("run", "resume", "report", "audit"),
)
"""Commands as a coordinator needs them: the service, the sites, the runs."""


app = FolderTyper(order=_ORDER, no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

INVITE_DAYS = 7.0


app.command()(run)
app.command()(resume)
app.command()(report)
app.command()(audit)


@app.callback()
def server(folder: Folder = Path()) -> None:
    """Run a federation's coordinating server."""
    del folder  # of the commands; see FolderTyper


@app.command()
def init(
    positional: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The coordinator's folder.")
    ] = None,
    address: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT that hospitals connect to; can be repeated.")
    ] = None,
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
    listen: Annotated[
        str, typer.Option(help="Address of this machine that the public ports are bound to.")
    ] = "0.0.0.0",  # noqa: S104  # hospitals connect to it; TLS is always on
    enrolment_port: Annotated[
        int | None, typer.Option(help="Port for enrolment; default: the first port + 1.")
    ] = None,
    private_port: Annotated[
        int | None, typer.Option(help="First of two loopback ports; default: the first port + 2.")
    ] = None,
    invite: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A site to invite at once; can be repeated."),
    ] = None,
    option: Annotated[Path | None, folder_option("The coordinator's folder, as DIR.")] = None,
) -> None:
    """Create a coordinator's folder and its keys.

    In a folder that exists already, what is missing is created; no key is replaced.
    """
    _require()
    from cloister_fl.membership.identity import fingerprint
    from cloister_fl.server.coordinator.folder import SERVER_FILE, Layout, init_coordinator
    from cloister_fl.server.coordinator.site_approval import require_site_name
    from cloister_fl.system.git_ignore import uncovered_by_git_ignore

    folder = one_folder(positional, option)
    if folder is None:
        raise OptionInvalid(
            "No folder is named.",
            remedy="Name one: cloister server init DIR --address HOST:PORT",
        )
    invited = list(dict.fromkeys(invite or ()))
    for site in invited:  # before a folder is made that this command could not make again
        require_site_name(site)
    fresh = not (folder / SERVER_FILE).exists()
    if not fresh and address:
        raise OptionInvalid(
            f"{folder / SERVER_FILE} exists already, so --address is not used.",
            remedy=f"Edit that file, then run: cloister server init {shlex.quote(str(folder))}",
        )
    layout = Layout(tuple(address or ()), name, listen, enrolment_port, private_port)
    made = init_coordinator(folder, layout)
    if gap := uncovered_by_git_ignore(folder):
        typer.echo(gap, err=True)
    where = dir_option(folder)
    state = "ready" if fresh else "complete"
    typer.echo(f"The folder of {made.file.federation.name} is {state}: {made.root}")
    typer.echo(f"  root key's fingerprint   {fingerprint(made.federation_root())}")
    typer.echo(f"  public ports             {made.file.fleet.listen}, {made.file.enrolment.listen}")
    _invite(made, invited, INVITE_DAYS)
    typer.echo(f"Next: cloister server start{where}")
    if not invited:
        typer.echo(f"      cloister server invite HOSPITAL{where}")


@app.command()
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
    _invite(_open(folder), names, days, show=show)


def _invite(place: Coordinator, names: Iterable[str], days: float, *, show: bool = False) -> None:
    from cloister_fl.server.coordinator.site_approval import invite_site

    for name in names:
        line, path = invite_site(place, name, int(days * 86400), to_file=not show)
        if path is None:
            typer.echo(line)
        else:
            typer.echo(f"The invite of {name} is in {path}. Give it to that hospital only.")


@app.command()
def sites(folder: Folder = Path(), as_json: JsonOption = False) -> None:
    """Show the sites: invited, pending approval, approved or revoked."""
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


@app.command()
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
        if name not in known:
            raise SiteStateInvalid(
                f"{name} has not asked to join.",
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
    return typer.confirm(f"Did {row.name} read out the same, by telephone?")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    folder: Folder = Path(),
    yes: Yes = False,
) -> None:
    """Revoke a site permanently.

    Its open connections are closed at once.
    """
    _require()
    from cloister_fl.server.coordinator.site_approval import revoke_site

    place = _open(folder)
    with place.registry() as registry:
        states = {row.name: row.state for row in registry.sites()}
        invited = {one for one, _ in registry.invited()}
    # Of an unknown name, the registry says so.
    if name in states or name in invited:
        confirm(
            f"The site {name} ({states[name]}) is revoked permanently."
            if name in states
            else f"The open invite of {name} becomes invalid.",
            owner=f"federation {place.file.federation.name}",
            folder=place.root,
            command=("cloister", "server", "revoke", name),
            yes=yes,
        )
    revoke_site(place, name)
    typer.echo(f"{name} is revoked and off the roster. Its name cannot be used again.")


@app.command()
def start(folder: Folder = Path()) -> None:
    """Run the server in the foreground until it is stopped.

    To stop it, run `cloister server stop` or send SIGTERM.
    """
    _require()
    from cloister_fl.server.service.supervisor import serve

    place = _open(folder)

    def ready() -> None:
        typer.echo(f"Serving {place.file.federation.name} on {place.file.fleet.listen}.")

    serve(place, ready)


@app.command()
def stop(
    folder: Folder = Path(),
    only: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Stop this run, not the server.")
    ] = None,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait until the server has stopped.")
    ] = 30.0,
) -> None:
    """Stop the server, or one run.

    The runs of a stopped server resume when it starts again.
    """
    _require()
    place = _open(folder)
    if only is not None:
        from cloister_fl.server.coordinator.run_queue import find_run, stop_run

        stop_run(find_run(place.root, only))
        command = f"cloister server resume {only}{dir_option(folder)}"
        typer.echo(f"The run {only} is stopped. To resume it: {command}")
        return
    from cloister_fl.system.pid_lock import terminate

    ended = terminate(place.lock, wait)
    if ended is None:
        raise ServerState(
            f"The server of {place.root} is not running.",
            remedy=f"Start it: cloister server start{dir_option(folder)}",
        )
    if not ended:
        raise ServerState(
            f"The server has not stopped within {wait:g} s.",
            remedy=f"Wait longer: cloister server stop --wait 120{dir_option(folder)}",
        )
    typer.echo(f"The server of {place.file.federation.name} has stopped.")


@app.command()
def status(folder: Folder = Path(), as_json: JsonOption = False) -> None:
    """Show the server, its sites and its runs.

    For each run, it says why a site takes no part. Exit status 9 if the server is not serving.
    """
    _require()
    from cloister_fl.server.coordinator.run_queue import runs
    from cloister_fl.server.service.supervisor import is_serving, running

    place = _open(folder)
    process = running(place)
    serving = process is not None and is_serving(place)
    with place.registry() as registry:
        states = [row.state for row in registry.sites()]
        invited = len(registry.invited())
    counts = {state: states.count(state) for state in ("approved", "pending", "revoked")}
    standing = [(each.name, each.status()) for each in runs(place.root)]
    if as_json:
        told = {"running": process is not None, "serving": serving, "invited": invited, **counts}
        each_run = [{"name": name, **asdict(each)} for name, each in standing]
        typer.echo(json.dumps({**told, "runs": each_run}))
    else:
        how = "serving" if serving else "starting or stopping" if process else "not running"
        typer.echo(f"{place.file.federation.name}: {how} ({place.file.fleet.listen})")
        typer.echo(
            f"sites: {counts['approved']} approved, {counts['pending']} waiting for approval, "
            f"{counts['revoked']} revoked, {invited} invited"
        )
        for name, each in standing:
            _show_run(name, each)
    if not serving:
        raise typer.Exit(ServerState.exit_status)


def _show_run(name: str, status: Status) -> None:
    from cloister_fl.server.rounds.collector import REASONS

    rounds = f", round {status.round} of {status.rounds}" if status.rounds else ""
    typer.echo(f"run {name}: {status.state}{rounds}; {status.told}")
    for site, reason in sorted(status.refused.items()):
        typer.echo(f"  {site} does not take part: {REASONS.get(reason, reason)}")


def _require() -> None:
    require("server", "flwr", "grpc", "grpc_health", "uvicorn")


def _open(folder: Path) -> Coordinator:
    from cloister_fl.server.coordinator.folder import open_coordinator

    return open_coordinator(folder)


def _digits(fingerprint: str) -> str:
    return "".join(fingerprint.split()).lower()


def _when(moment: int) -> str:
    return f"{utc.to_minute(utc.from_unix(moment))} UTC"
