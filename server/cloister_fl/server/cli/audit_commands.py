"""`cloister server audit`: a report of the coordinator's logs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.cli.folder_option import folder_option
from cloister_fl.errors import OptionInvalid
from cloister_fl.system.optional import require


def audit(
    folder: Annotated[
        Path, folder_option("The coordinator's folder, or that of a simulated run.")
    ] = Path(),
    log: Annotated[
        Path | None, typer.Option(help="An audit log to read instead of the folder's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report decisions, messages and rejected requests.

    Messages are counted for each site and run, from the signed log.
    """
    require("server", "flwr", "numpy")
    from cloister_fl.server.coordinator.federation import AUDIT
    from cloister_fl.server.coordinator.folder import SERVER_FILE, open_coordinator
    from cloister_fl.server.results.audit_report import account, render

    simulated = folder / "federation" / AUDIT
    if log is not None:
        if not log.is_file():
            raise OptionInvalid(f"{log} is not a file.", remedy="Name an audit log with --log.")
        told = account(log)
    elif (folder / SERVER_FILE).is_file():
        place = open_coordinator(folder)
        told = account(place.keys / AUDIT, key=place.federation_root(), refused=place.refusals)
    elif simulated.is_file():
        told = account(simulated)
    else:
        raise OptionInvalid(
            f"{folder} is neither a coordinator's folder nor that of a simulated run.",
            remedy="Name such a folder with --dir, or an audit log with --log.",
        )
    typer.echo(json.dumps(asdict(told)) if as_json else render(told))
