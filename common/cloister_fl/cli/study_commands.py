"""`cloister study`: write, check, bind, plan and sign study files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.errors import OptionInvalid, OutputInTheWay, StudyInvalid
from cloister_fl.study.file import load_study
from cloister_fl.study.schema import Aggregation, Study
from cloister_fl.system.text import counted

app = typer.Typer(help="Write, check and plan study files.", no_args_is_help=True)


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("study.toml"),
) -> None:
    """Write a commented example of a study."""
    example = files("cloister_fl.study").joinpath("example_study.toml").read_text("utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(example)
    except FileExistsError:
        raise OutputInTheWay(
            f"{file} exists already.", remedy="Name another file, or move that one away."
        ) from None
    except OSError as error:
        raise OutputInTheWay(
            f"{file} cannot be written.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a file in a folder that exists and that you may write to.",
        ) from None
    typer.echo(f"Wrote {file}. Edit it, then run: cloister study check {file}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The study file.")] = Path("study.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a study file: print all faults, or its hash and a summary."""
    try:
        study = load_study(file)
    except StudyInvalid as error:
        if as_json:
            faults = [
                {"line": f.line, "key": f.key, "message": f.message, "hint": f.hint}
                for f in error.faults
            ]
            typer.echo(json.dumps({"valid": False, "code": error.code, "faults": faults}))
            raise typer.Exit(error.exit_status) from None
        raise
    if as_json:
        typer.echo(json.dumps({"valid": True, "hash": study.digest, "study": study.model_dump()}))
        return
    typer.echo(_in_words(study))


@app.command()
def bind(
    file: Annotated[Path, typer.Argument(help="The study file; it is changed.")] = Path(
        "study.toml"
    ),
) -> None:
    """Write the hash of the initial model into a study file.

    Sites compare it with the model of the first round. Bind a study before it is signed, and on
    the machine that proposes it: its weights are drawn here, from its seed.
    """
    from cloister_fl.system.optional import require

    require("client", "torch")
    from cloister_fl.study.binding import write_initial_model
    from cloister_fl.study.initial_model import bind as bind_study

    study = bind_study(load_study(file))
    write_initial_model(file, study)
    typer.echo(_in_words(study))


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="The study file.")] = Path("study.toml"),
    patients: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]", help="Number of patients of each site; estimates are enough."
        ),
    ] = ...,  # type: ignore[assignment]  # typer's mark for an option that must be given
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw epsilon over rounds; a .png or .svg.")
    ] = None,
) -> None:
    """Estimate what a study costs and can learn.

    It shows the noise, epsilon after each round, time and bytes.
    """
    from cloister_fl.system.optional import require

    require("client", "torch", "dp_accounting", "matplotlib")
    from cloister_fl.planning import plan_output, timing
    from cloister_fl.planning.plan import make_plan

    study, counts = load_study(file), _counts(patients)
    if plot is not None:
        plan_output.kind_of_plot(plot)
    pace, weights = timing.measure(study)
    made = make_plan(study, counts, weights=weights, pace=pace)
    if plot is not None:
        plan_output.write_plot(made, plot)
    typer.echo(json.dumps(plan_output.as_dict(made)) if as_json else plan_output.render(made))
    if plot is not None and not as_json:
        typer.echo(f"Wrote {plot}.")


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    # Ten digits hold every hospital; more would only lead arithmetic astray.
    if not all(word.isascii() and word.isdigit() and len(word) <= 10 for word in words):
        counts = []
    else:
        counts = [int(word) for word in words]
    if not counts or min(counts) < 1:
        raise OptionInvalid(
            "--patients is not a list of whole numbers above 0.",
            remedy="Separate the numbers by commas, such as --patients 400,250.",
        )
    return counts


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="The file to write; for the signer only.")],
) -> None:
    """Create a key to sign studies with. An existing key is not replaced."""
    from cloister_fl.membership.identity import Identity
    from cloister_fl.system.files import create_secret
    from cloister_fl.system.git_ignore import keep_file_out_of_git

    keep_file_out_of_git(file)
    made = Identity.generate()
    if not create_secret(file, made.to_pem()):
        raise OutputInTheWay(
            f"{file} exists already.", remedy="Name another file; a key is never replaced."
        )
    typer.echo(f"Wrote {file}. Keep it secret. Its public key, for trusted_signers:")
    typer.echo(made.public.hex())


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="The study file.")],
    key: Annotated[Path, typer.Option(help="The signer's key: cloister study key FILE.")],
) -> None:
    """Sign a study for hospitals that trust your key.

    The signature is written beside the study.
    """
    from cloister_fl.membership.identity import Identity
    from cloister_fl.study import signatures
    from cloister_fl.study.binding import require_bound
    from cloister_fl.system.files import read_secret

    study = load_study(file)
    # Bound later, it would be another study than the one that was signed.
    require_bound(study, file)
    identity = Identity.from_pem(read_secret(key))
    count = signatures.add(file, study, identity)
    typer.echo(_in_words(study))
    typer.echo(
        f"Signed: {signatures.path_of(file)} has {counted(count, 'signature')}. Your public key:"
    )
    typer.echo(identity.public.hex())


def _in_words(study: Study) -> str:
    training, privacy = study.training, study.privacy
    promise = (
        f"patient-level differential privacy, epsilon {privacy.epsilon:g} at delta "
        f"{privacy.delta:g}, clipping norm {privacy.clipping_norm:g}"
        if privacy.enabled
        else "NO differential privacy: what leaves a site may reveal single patients"
    )
    if study.releases:
        promise += f"; {study.evaluation.release_epsilon:g} of it for one noised evaluation"
    masked = (
        "by secure aggregation: only their sum can be read"
        if study.aggregation.secure
        else "WITHOUT secure aggregation: the coordinator can read each site's"
    )
    given = study.input
    shape = f"{given.size} x {given.size} pixels"
    if given.depth is not None:
        shape = f"volumes of {given.depth} x {given.size} x {given.size} voxels, slices "
        shape += f"{given.spacing:g} mm apart"
    return "\n".join(
        (
            f"{study.study.name}: {study.study.question}",
            f"  input      {', '.join(given.modalities)}, {shape}",
            f"  target     {study.task.described}",
            f"  network    {study.network.name}",
            f"  training   {counted(training.rounds, 'round')} of "
            f"{counted(training.steps_per_round, 'step')}, "
            f"each patient in a step with probability {training.sampling_rate:g}",
            *_more_of_training(study),
            f"  privacy    {promise}",
            f"  starts     {_starts(study)}",
            f"  sites      {study.aggregation.strategy}, at least {_fewest(study.aggregation)}",
            f"  updates    {masked}",
            f"  hash       {study.digest}",
        )
    )


def _more_of_training(study: Study) -> Iterator[str]:
    """What shapes a run and is seldom set."""
    given = study.training.class_weights
    if given:
        yield "             classes weigh " + ", ".join(
            f"{name} {given[name]:g}" for name in study.task.strata
        )
    patience = study.evaluation.stop_after
    if patience:
        yield (
            f"             ends after {counted(patience, 'evaluation')} in a row without a better "
            "model"
        )


def _starts(study: Study) -> str:
    """Which model round 1 begins with."""
    if study.training.initial_model:
        return f"from the model with the hash {study.training.initial_model}"
    return (
        f"from seed {study.training.seed}; the study's hash changes once it is bound to the model"
    )


def _fewest(aggregation: Aggregation) -> str:
    """How few sites can train a study, and why where that is more than it says."""
    if aggregation.fewest_sites == aggregation.min_sites:
        return str(aggregation.fewest_sites)
    return (
        f"{aggregation.fewest_sites}: min_sites is {aggregation.min_sites}, and secure aggregation "
        "needs colluders + 3"
    )
