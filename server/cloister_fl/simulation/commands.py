"""`cloister simulate` and `cloister demo`."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloister_fl.simulation.result import Result


class Engine(enum.StrEnum):
    """Where a simulation runs."""

    IN_PROCESS = "in-process"
    RAY = "ray"


EngineOption = Annotated[
    Engine, typer.Option(help="in-process: no daemon; ray: Flower's simulation engine.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


def simulate(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    sites: Annotated[
        Path,
        typer.Option(help="Folder with one directory per site: dicom/ and labels.csv in each."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; new or empty.")],
    engine: EngineOption = Engine.IN_PROCESS,
    holdout: Annotated[
        Path | None, typer.Option(help="Folder with dicom/ and labels.csv of patients of no site.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a whole federation on this machine, on DICOM folders."""
    from cloister_fl.simulation.from_python import simulate as run
    from cloister_fl.study import signatures
    from cloister_fl.study.file import load_study

    checked = load_study(study)
    with _resumable(study, sites, out, holdout):
        result = run(
            checked,
            sites,
            out,
            holdout=holdout,
            engine=engine.value,
            resume=resume,
            progress=not as_json,
            signatures=signatures.load(study, checked),
        )
    _show(result, as_json=as_json)


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to work in; default: cloister-demo in the current folder."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn patients.")] = 0,
    engine: EngineOption = Engine.IN_PROCESS,
    as_json: JsonOption = False,
) -> None:
    """Draw five hospitals' radiographs and train on them.

    It is a whole federation, and takes about a minute.
    """
    from cloister_fl.simulation.demo import free_folder, run_demo

    folder = out if out is not None else free_folder(Path("cloister-demo"))
    run, data = folder / "run", folder / "data"
    with _resumable(folder / "study.toml", data / "sites", run, data / "holdout"):
        result = run_demo(folder, seed=seed, engine=engine.value, progress=not as_json)
    _show(result, as_json=as_json)


@contextmanager
def _resumable(study: Path, sites: Path, out: Path, holdout: Path | None) -> Iterator[None]:
    """Say how to resume a simulation that the person interrupts, once it has a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints
        from cloister_fl.simulation.run_folder import resume_command

        if Checkpoints(out / CHECKPOINT_FOLDER).exists():
            command = resume_command(str(study), sites, out, holdout)
            typer.echo(f"Interrupted. To resume it: {command}", err=True)
        raise


def _show(result: Result, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.summary))
        return
    from cloister_fl.server.results.summary_table import show
    from cloister_fl.simulation.simulated_run import notices_of

    show(result.summary, result.folder)
    for name, told in notices_of(result.folder).items():
        typer.echo(f"What {name} tells its own people: {told}", err=True)
