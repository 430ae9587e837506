"""`cloister server run`, `resume` and `report`: the studies that a coordinator trains.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.folder_option import CoordinatorFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import CloisterError, OptionInvalid, RunUnknown, ServerState
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.server.coordinator.folder import Coordinator
    from cloister_fl.server.coordinator.run_queue import RunFolder, Status

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Follow = Annotated[
    bool, typer.Option("--follow/--no-follow", help="Show progress until the run ends.")
]

_LOOK_S = 0.5


def run(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    folder: Folder = Path(),
    holdout: Annotated[
        Path | None,
        typer.Option(
            help="Folder with dicom/ and labels.csv of patients of no site, for evaluation."
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(help="Minutes to wait for all sites once enough sites take part.")
    ] = 60.0,
    timeout: Annotated[
        float,
        typer.Option(
            help="Most minutes to wait for a site's answer to one message; then the round goes on "
            "without the site. Less once answers of the run were timed."
        ),
    ] = 60.0,
    follow: Follow = True,
    as_json: JsonOption = False,
) -> None:
    """Propose a study to the sites, and train it once approved.

    Training begins once enough sites have approved it. The server does the work: if this command
    is ended with Ctrl-C, the run goes on. A study that does not carry the hash of its initial
    model gets it here.
    """
    _require()
    from cloister_fl.server.coordinator.folder import open_coordinator
    from cloister_fl.server.coordinator.run_queue import new_run
    from cloister_fl.study import signatures
    from cloister_fl.study.file import load_study
    from cloister_fl.study.initial_model import bound

    if not (0 <= wait <= 100_000 and 0 < timeout <= 100_000):
        raise OptionInvalid(
            "--wait or --timeout is out of range.",
            remedy="Give minutes: --wait from 0 to 100000, --timeout above 0 and at most 100000.",
        )
    place = open_coordinator(folder)
    checked = load_study(study)
    vouched = signatures.load(study, checked)
    _require_serving(place, folder)
    _require_sites(place, folder, checked.aggregation.min_sites)
    if holdout is not None and not (holdout / "dicom").is_dir():
        raise OptionInvalid(
            f"The hold-out {holdout} has no folder dicom/.",
            remedy="Name a folder with dicom/ and labels.csv of patients of no site.",
        )
    if holdout is not None:
        from cloister_fl.server.results.holdout_reader import load_reader

        # Here already: the sites are asked for nothing where the hold-out could not be read.
        load_reader()
    # What is proposed carries the hash of its initial model, and is approved with it.
    proposed = bound(checked)
    made = new_run(
        place.root,
        proposed,
        wait=60 * wait,
        timeout=60 * timeout,
        holdout=holdout,
        signatures=vouched,
    )
    if not as_json:
        typer.echo(f"Run {made.name}: study {proposed.digest[:16]} is proposed to the sites.")
    _after(made, folder, follow=follow, as_json=as_json)


def resume(
    name: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    folder: Folder = Path(),
    follow: Follow = True,
    as_json: JsonOption = False,
) -> None:
    """Resume a stopped or failed run from its last checkpoint.

    A run that a crash interrupted resumes by itself.
    """
    _require()
    from cloister_fl.server.coordinator.folder import open_coordinator
    from cloister_fl.server.coordinator.run_queue import find_run, resume_run

    place = open_coordinator(folder)
    found = find_run(place.root, name)
    _require_serving(place, folder)
    resume_run(found)
    _after(found, folder, follow=follow, as_json=as_json)


def report(
    name: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    folder: Folder = Path(),
    as_json: JsonOption = False,
) -> None:
    """Show a finished run's results, privacy cost and files."""
    _require()
    from cloister_fl.server.coordinator.folder import open_coordinator
    from cloister_fl.server.coordinator.run_queue import find_run

    found = find_run(open_coordinator(folder).root, name)
    if not found.finished:
        status = found.status()
        raise RunUnknown(
            f"The run {name} is not finished.",
            why=f"Its state is {status.state}: {status.told}.",
            remedy=f"Follow it: cloister server status{dir_option(folder)}",
        )
    _report(found, as_json=as_json)


def _after(found: RunFolder, folder: Path, *, follow: bool, as_json: bool) -> None:
    if not follow:
        if as_json:
            typer.echo(json.dumps({"run": found.name, "state": found.status().state}))
        return
    status = _followed(found, quiet=as_json)
    if status.state != "done":
        raise _ended(found, folder, status)
    _report(found, as_json=as_json)


def _followed(found: RunFolder, *, quiet: bool) -> Status:
    """Show changes of the status until the run ends, and return the last status."""
    from cloister_fl.server.coordinator.run_queue import FINAL

    told = ""
    while True:
        status = found.status()
        if status.told != told and not quiet:
            told = status.told
            rounds = f" ({status.round} of {status.rounds})" if status.round else ""
            typer.echo(f"{status.state}: {told}{rounds}", err=True)
        if status.state in FINAL:
            return status
        time.sleep(_LOOK_S)


def _ended(found: RunFolder, folder: Path, status: Status) -> CloisterError:
    """Return the error that ended a run, as the run executor recorded it."""
    from cloister_fl.errors import RunStopped, all_errors

    kind = next((kind for kind in all_errors() if kind.code == status.code), None)
    return (kind or RunStopped)(
        f"The run {found.name} ended: {status.told}",
        remedy="Correct the cause, then run: "
        f"cloister server resume {found.name}{dir_option(folder)}",
    )


def _report(found: RunFolder, *, as_json: bool) -> None:
    from cloister_fl.server.results.summary_table import show

    summary = found.summary()
    if as_json:
        typer.echo(json.dumps({**summary, "folder": str(found.path)}))
    else:
        show(summary, found.path)


def _require_serving(place: Coordinator, folder: Path) -> None:
    from cloister_fl.server.service.supervisor import running

    if running(place) is None:
        raise ServerState(
            f"The server of {place.root} is not running.",
            remedy=f"Start it: cloister server start{dir_option(folder)}",
        )


def _require_sites(place: Coordinator, folder: Path, needed: int) -> None:
    with place.registry() as registry:
        approved = sum(row.state == "approved" for row in registry.sites())
    if approved < needed:
        raise OptionInvalid(
            f"The study asks for {needed} sites, and {approved} have been approved here.",
            remedy="Lower aggregation.min_sites in the study, or invite more: "
            f"cloister server invite NAME{dir_option(folder)}",
        )


def _require() -> None:
    require("server", "flwr", "torch", "grpc", "grpc_health", "uvicorn", "jinja2")
