"""Commands `cloister client start`, `stop` and `status`: the site's service.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.errors import ServiceState
from cloister_fl.system import utc
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.client.site.folder import Site
    from cloister_fl.client.site.service_status import ServiceStatus


def start(folder: Folder = Path()) -> None:
    """Serve this site in the foreground until it is stopped.

    To stop it, run `cloister client stop` or send SIGTERM. A site that the coordinator has not
    approved yet waits for that here.
    """
    require("client", "flwr", "torch", "grpc", "grpc_health", "httpx", "uvicorn")
    from cloister_fl.client.service import serve
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    serve(site, _say)


def stop(
    folder: Folder = Path(),
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has ended.")] = 30.0,
) -> None:
    """Stop this site's service.

    In a running round, the site counts as a dropout.
    """
    require("client", "grpc")
    from cloister_fl.client import service
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    service.stop(site, wait)
    typer.echo(f"The service of site {site.name} has stopped.")


def status(
    folder: Folder = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the service, the last refusal, notices and the budget.

    Studies that wait for a decision are listed. Exit status 9 if it is not serving.
    """
    require("client", "grpc", "grpc_health")
    from cloister_fl.client import service
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    now = service.status(site)
    serving = now is not None and service.is_serving(now)
    waiting = _waiting(site)
    if as_json:
        typer.echo(json.dumps(_as_dict(site, now, serving, waiting)))
    else:
        _show(site, folder, now, serving, waiting)
    if not serving:
        raise typer.Exit(ServiceState.exit_status)


def _say(line: str) -> None:
    typer.echo(f"{utc.to_second(utc.now())}  {line}")


def _waiting(site: Site) -> list[str]:
    from cloister_fl.client.admission.approvals import Decision, judgements

    return [d for d, one in judgements(site).items() if one.decision is Decision.PENDING]


def _as_dict(
    site: Site, now: ServiceStatus | None, serving: bool, waiting: list[str]
) -> dict[str, object]:
    from cloister_fl.client.admission import gate
    from cloister_fl.client.network.node_keys import date_warnings
    from cloister_fl.client.site.data_notice import data_notices
    from cloister_fl.client.site.last_refusal import read_last_refusal

    refusal = read_last_refusal(site.root)
    return {
        "site": site.name,
        "running": now is not None,
        "serving": serving,
        "online": now is not None and now.online,
        "why": now.why if now else "",
        "health": now.health if now else "",
        "asked": now.asked if now else {},
        "waiting_for_approval": waiting,
        "last_refusal": asdict(refusal) if refusal else None,
        "data_notices": {digest: asdict(one) for digest, one in data_notices(site.root).items()},
        "warnings": date_warnings(site),
        "epsilon_promised": gate.promised(site),
        "epsilon_lifetime": site.policy.max_epsilon_lifetime,
    }


def _show(
    site: Site, folder: Path, now: ServiceStatus | None, serving: bool, waiting: list[str]
) -> None:
    from cloister_fl.client.network.node_keys import date_warnings
    from cloister_fl.client.site.data_notice import data_notices
    from cloister_fl.client.site.last_refusal import read_last_refusal
    from cloister_fl.client.steward import budget

    if now is None:
        typer.echo(f"{site.name}: not running. Start it: cloister client start{dir_option(folder)}")
    elif serving:
        typer.echo(f"{site.name}: serving; the coordinator answers")
    else:
        parts = {"node": now.node, "executor": now.executor}
        dead = [name for name, alive in parts.items() if not alive]
        restarting = now.approved and dead
        why = f"{' and '.join(dead)} restarting" if restarting else now.why
        typer.echo(f"{site.name}: not serving; {why}")
    if now is not None and now.last_asked:
        when = utc.to_second(utc.from_unix(now.last_asked))
        typer.echo(f"last message {when} UTC, {sum(now.asked.values())} messages")
    typer.echo(f"budget: {budget.summary(site)}")
    for line in budget.left_reserved(site):
        typer.echo(f"  {line}")
    for line in date_warnings(site):
        typer.echo(line)
    refusal = read_last_refusal(site.root)
    if refusal is not None:
        typer.echo(f"last refusal {refusal.time}: {refusal.message}")
    for digest, notice in data_notices(site.root).items():
        typer.echo(f"data of the study {digest[:16]}, {notice.time}: {notice.message}")
    for digest in waiting:
        command = f"cloister client review {digest[:16]}{dir_option(folder)}"
        typer.echo(f"a study is waiting for a decision: {command}")
