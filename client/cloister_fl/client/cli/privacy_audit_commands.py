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
    from cloister_fl.client.privacy_audit.round_audit import RoundAudit
    from cloister_fl.client.site.folder import Site
    from cloister_fl.study.schema import Study


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    folder: Folder = Path(),
) -> None:
    """Attack the installed training, to test its privacy claim.

    It asks made-up sites for whole rounds, as a coordinator does, and judges the noise, the
    influence of single patients, the sampling, the charges and the release: about a minute. With
    --study it also asks for that study's own rounds on made-up patients, and then trains it on a
    random half of the site's own patients, and guesses which half; the model is thrown away and
    nothing leaves the site, so no budget is spent. Keep what it shows here. An audit can refute a
    claim and is no evidence of privacy. The exit status is 4 where a claim is refuted, else 0.
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
        passed = _audit_code(site, as_json=as_json)
    else:
        from cloister_fl.client.privacy_audit.own_data import Asked

        asked = Asked(rounds=rounds, canaries=canaries, guesses=tuple(guesses or ()))
        passed = _audit_study(site, study, asked, plot, as_json=as_json)
    if not passed:
        raise typer.Exit(PrivacyError.exit_status)


def _audit_code(site: Site, *, as_json: bool) -> bool:
    from cloister_fl.client.privacy_audit.round_audit_text import as_dict, render

    found = _audit_rounds(site)
    typer.echo(json.dumps(as_dict(found)) if as_json else render(found))
    return found.passed


def _audit_rounds(site: Site, study: Study | None = None) -> RoundAudit:
    """Ask made-up sites for rounds, of the study too where one is given, and note it in the log."""
    from cloister_fl.client.privacy_audit.round_audit import (
        audit_rounds,
        stages_of_code,
    )
    from cloister_fl.client.privacy_audit.whole_round.study_rounds import stages_of_study
    from cloister_fl.client.site.audit_log import log_of
    from cloister_fl.networks.pretrained import MODELS_FOLDER

    models = site.root / MODELS_FOLDER
    stages = stages_of_code(models)
    told: dict[str, str] = {}
    if study is not None:
        stages |= stages_of_study(study, models)
        told["study"] = study.digest
    with progress_bar("Asking for rounds") as progress:
        found = audit_rounds(stages, progress=progress)
    log_of(site).append("audited", on="made-up patients", passed=found.passed, **told)
    return found


def _audit_study(site: Site, file: Path, asked: Asked, plot: Path | None, *, as_json: bool) -> bool:
    require("client", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client.privacy_audit import round_audit_text
    from cloister_fl.client.privacy_audit.one_run_text import as_dict, render
    from cloister_fl.client.privacy_audit.own_data import check, prepare
    from cloister_fl.study.file import load_study
    from cloister_fl.system.git_ignore import keep_file_out_of_git

    study = load_study(file)
    if plot is not None:
        require("client", "matplotlib")
        from cloister_fl.planning.plan_output import kind_of_plot

        kind_of_plot(plot)
        keep_file_out_of_git(plot)
    check(site, study, asked)
    rounds = _audit_rounds(site, study)
    told = {"whole_rounds": round_audit_text.as_dict(rounds), "passed": rounds.passed}
    if not as_json:
        typer.echo(round_audit_text.render(rounds))
    if not rounds.passed:
        # The site's own patients are not read for what is refuted already.
        if as_json:
            typer.echo(json.dumps(told))
        return False
    with progress_bar("Reading images") as progress:
        ready = prepare(site, study, asked, progress=progress)
    with progress_bar("Training") as progress:
        found = ready.audit(progress=progress)
    typer.echo(json.dumps({**told, **as_dict(found)}) if as_json else f"\n{render(found)}")
    if plot is not None:
        from cloister_fl.client.privacy_audit.one_run_plot import write_plot

        write_plot(found, plot)
        typer.echo(f"Wrote {plot}. It shows your patients' scores: keep it here.", err=True)
    return found.passed
