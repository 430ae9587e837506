"""`cloister server`: the commands of the coordinating site.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click.core import ParameterSource

from cloister_fl.cli.folder_option import CoordinatorFolder as Folder
from cloister_fl.cli.folder_option import FolderTyper, dir_option, folder_option, one_folder
from cloister_fl.errors import OptionInvalid, ServerState
from cloister_fl.server.cli.audit_commands import audit
from cloister_fl.server.cli.run_commands import report, resume, run
from cloister_fl.server.cli.site_commands import (
    accept_ledger,
    approve,
    invite,
    issue_invites,
    revoke,
    sites,
)
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.server.coordinator.folder import Coordinator
    from cloister_fl.server.coordinator.run_queue import Status

_ORDER = (
    *("init", "start", "stop", "status", "renew"),
    *("invite", "sites", "approve", "revoke", "accept-ledger"),
    *("run", "resume", "report", "audit"),
)
"""Commands as a coordinator needs them: the service, the sites, the runs."""


app = FolderTyper(order=_ORDER, no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

app.command()(invite)
app.command()(sites)
app.command()(approve)
app.command()(revoke)
app.command(name="accept-ledger")(accept_ledger)
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
    context: typer.Context,
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
        int | None,
        typer.Option(help="Loopback port of the health service; default: the first port + 2."),
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
    unused = (
        []
        if fresh
        else [
            f"--{name.replace('_', '-')}"
            for name in ("address", "name", "listen", "enrolment_port", "private_port")
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        ]
    )
    if unused:
        raise OptionInvalid(
            f"{folder / SERVER_FILE} exists already, so {' and '.join(unused)} "
            f"{'is' if len(unused) == 1 else 'are'} not used.",
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
    issue_invites(made, invited)
    typer.echo(f"Next: cloister server start{where}")
    if not invited:
        typer.echo(f"      cloister server invite HOSPITAL{where}")


@app.command()
def start(folder: Folder = Path()) -> None:
    """Run the server in the foreground until it is stopped.

    To stop it, run `cloister server stop` or send SIGTERM.
    """
    _require()
    from cloister_fl.server.coordinator.certificate_dates import warnings_of
    from cloister_fl.server.service.supervisor import serve

    place = _open(folder)
    for line in warnings_of(place):
        typer.echo(line, err=True)

    def ready() -> None:
        typer.echo(f"Serving {place.file.federation.name} on {place.file.fleet.listen}.")

    serve(place, ready)


@app.command()
def stop(
    folder: Folder = Path(),
    only: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Stop this run, not the server.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="End the run for good, with the model and report of the rounds it has. The round "
            "under way is lost, its privacy cost is not.",
        ),
    ] = False,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait until the server has stopped.")
    ] = 30.0,
) -> None:
    """Stop the server, or one run.

    The runs of a stopped server resume when it starts again.
    """
    _require()
    place = _open(folder)
    if keep and only is None:
        raise OptionInvalid(
            "--keep says how a run is ended, and no run was named.",
            remedy=f"cloister server stop --run RUN --keep{dir_option(folder)}",
        )
    if only is not None:
        from cloister_fl.server.coordinator.run_queue import find_run, keep_run, stop_run

        if keep:
            keep_run(find_run(place.root, only))
            command = f"cloister server report {only}{dir_option(folder)}"
            typer.echo(f"The run {only} ends with what it has. Soon there: {command}")
            return
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
def renew(folder: Folder = Path()) -> None:
    """Renew the server's certificate in place.

    No hospital does anything, and a server that runs uses it at once.
    """
    _require()
    from cloister_fl.server.coordinator.certificate_dates import warnings_of
    from cloister_fl.server.coordinator.server_renewal import renew_server

    place = _open(folder)
    made = renew_server(place)
    typer.echo(f"The server's certificate is renewed, until {made.until}.")
    for line in warnings_of(place):
        typer.echo(line)


@app.command()
def status(folder: Folder = Path(), as_json: JsonOption = False) -> None:
    """Show the server, its sites and its runs.

    For each run, it says why a site takes no part. Exit status 9 if the server is not serving.
    """
    _require()
    from cloister_fl.server.coordinator.certificate_dates import warnings_of
    from cloister_fl.server.coordinator.run_queue import damaged_runs, runs
    from cloister_fl.server.service.supervisor import is_serving, running

    place = _open(folder)
    process = running(place)
    serving = process is not None and is_serving(place)
    with place.registry() as registry:
        states = [row.state for row in registry.sites()]
        invited = len(registry.invited())
    counts = {state: states.count(state) for state in ("approved", "pending", "revoked")}
    standing = [(each.name, each.status()) for each in runs(place.root)]
    warnings = (*warnings_of(place), *damaged_runs(place.root))
    if as_json:
        told = {"running": process is not None, "serving": serving, "invited": invited, **counts}
        each_run = [{"name": name, **asdict(each)} for name, each in standing]
        typer.echo(json.dumps({**told, "runs": each_run, "warnings": warnings}))
    else:
        how = "serving" if serving else "starting or stopping" if process else "not running"
        typer.echo(f"{place.file.federation.name}: {how} ({place.file.fleet.listen})")
        typer.echo(
            f"sites: {counts['approved']} approved, {counts['pending']} waiting for approval, "
            f"{counts['revoked']} revoked, {invited} invited"
        )
        for name, each in standing:
            _show_run(name, each)
        for line in warnings:
            typer.echo(line)
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
