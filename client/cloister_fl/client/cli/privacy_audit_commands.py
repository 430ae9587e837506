"""Command `cloister client privacy-audit`: attack the installed training, and report the result.

Everything heavy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.client.cli.progress_bar import progress_bar
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.errors import OptionInvalid, PrivacyError
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.client.privacy_audit.own_data import Asked
    from cloister_fl.client.site.folder import Site

_NOISE = 1.0
_DELTA = 1e-5
_DRAWS = 2_000


def privacy_audit(
    study: Annotated[
        Path | None,
        typer.Option(help="Audit this study's training on the site's own patients, in one run."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="With --study: only its first rounds, else all.")
    ] = None,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=8, help="With --study: how many patients the guesses are about, else all."
        ),
    ] = None,
    guesses: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="With --study: how many guesses to make. Can be repeated: the 5 % chance of a "
            "false alarm is then divided among the numbers.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --study: draw it; a .png or .svg, to stay here.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=40,
            max=1_000_000,
            help="Without --study: how often the step is attacked; even, else 2000.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    folder: Folder = Path(),
) -> None:
    """Attack the installed training, to test its privacy claim.

    Without --study it attacks one step, on made-up patients. With --study it trains on a random
    half of the site's own patients, and guesses which half; the model is thrown away and nothing
    leaves the site, so no budget is spent. Keep what it shows here. An audit is a lower
    bound, never evidence of privacy. The exit status is 4 where the claim is refuted, else 0.
    """
    require("client", "numpy", "torch", "opacus", "dp_accounting", "pydicom")
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    if study is None:
        for option, given in (
            ("rounds", rounds), ("canaries", canaries), ("guesses", guesses), ("plot", plot)
        ):  # fmt: skip
            if given is not None:
                raise OptionInvalid(f"--{option} is for the audit of a study; name one: --study.")
        passed = _audit_code(site, _DRAWS if draws is None else draws, as_json=as_json)
    else:
        if draws is not None:
            raise OptionInvalid("--draws is for the audit without --study.")
        from cloister_fl.client.privacy_audit.own_data import Asked

        asked = Asked(rounds=rounds, canaries=canaries, guesses=tuple(guesses or ()))
        passed = _audit_study(site, study, asked, plot, as_json=as_json)
    if not passed:
        raise typer.Exit(PrivacyError.exit_status)


def _audit_code(site: Site, draws: int, *, as_json: bool) -> bool:
    from cloister_fl.client.privacy_audit.canary import audit_step
    from cloister_fl.client.privacy_audit.canary_text import as_dict, render
    from cloister_fl.client.site.audit_log import log_of

    if draws % 2:
        raise OptionInvalid("The number of draws is odd.", remedy="Give an even number.")
    found = audit_step(draws, noise_multiplier=_NOISE, delta=_DELTA)
    # The log holds no fractions.
    told = {"claimed": found.claimed_epsilon, "audited": found.audited_epsilon}
    words = {name: f"{epsilon:.4f}" for name, epsilon in told.items()}
    log_of(site).append("audited", draws=draws, passed=found.passed, **words)
    typer.echo(json.dumps(as_dict(found)) if as_json else render(found))
    return found.passed


def _audit_study(site: Site, file: Path, asked: Asked, plot: Path | None, *, as_json: bool) -> bool:
    require("client", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client.privacy_audit.one_run_text import as_dict, render
    from cloister_fl.client.privacy_audit.own_data import prepare
    from cloister_fl.study.file import load_study
    from cloister_fl.system.git_ignore import keep_file_out_of_git

    study = load_study(file)
    if plot is not None:
        require("client", "matplotlib")
        from cloister_fl.planning.plan_output import kind_of_plot

        kind_of_plot(plot)
        keep_file_out_of_git(plot)
    with progress_bar("Reading images") as progress:
        ready = prepare(site, study, asked, progress=progress)
    with progress_bar("Training") as progress:
        found = ready.audit(progress=progress)
    typer.echo(json.dumps(as_dict(found)) if as_json else render(found))
    if plot is not None:
        from cloister_fl.client.privacy_audit.one_run_plot import write_plot

        write_plot(found, plot)
        typer.echo(f"Wrote {plot}. It shows your patients' scores: keep it here.", err=True)
    return found.passed
