"""Command `cloister client certificate`: a run's privacy cost at this site, signed.

Everything heavy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.system.optional import require


def certificate(
    study: Annotated[str, typer.Argument(help="A hash that budget lists, 8 digits or more.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; else it is shown.")] = None,
    run: Annotated[str | None, typer.Option(help="The run; else the study's last here.")] = None,
    folder: Folder = Path(),
) -> None:
    """Sign a certificate of a run's privacy cost at this site.

    It holds no lifetime figures.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import budget
    from cloister_fl.client.steward.issue_certificate import certify
    from cloister_fl.errors import OutputInTheWay
    from cloister_fl.privacy.certificate import sign
    from cloister_fl.system.files import write_atomic

    if out is not None and out.exists():
        raise OutputInTheWay(f"{out} exists already.", remedy="Name another file: --out FILE")
    site = open_site(site_folder(folder))
    made = certify(site, budget.find(site, study), run=run)
    data = sign(made, site.identity())
    if out is None:
        typer.echo(data.decode(), nl=False)
        return
    write_atomic(out, data)
    typer.echo(
        f"Wrote the certificate of {made.site} to {out}: {made.steps_started} of "
        f"{made.steps_reserved} steps, epsilon {made.epsilon_run:.2f} at delta {made.delta:g}, "
        "patient-level."
    )
    typer.echo(f"Anybody can check it: cloister verify {shlex.quote(str(out))}")
