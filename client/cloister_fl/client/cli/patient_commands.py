"""Command `cloister client patients`: patient numbers that may be one person's.

Everything heavy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.client.cli.progress_bar import progress_bar
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.system.optional import require
from cloister_fl.system.text import counted


def patients(
    out: Annotated[
        Path | None, typer.Option(help="Write the numbers to this file, CSV. It names patients.")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="Look at this study's images alone.")] = None,
    folder: Folder = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print counts as a JSON object.")] = False,
) -> None:
    """List patient numbers that may be one person's.

    Each is for the steward to decide. It prints counts alone. The numbers go to the file of
    --out, which stays here.
    """
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import patient_list
    from cloister_fl.study.file import load_study

    site = open_site(site_folder(folder))
    judged_by = None if study is None else load_study(study)
    if out is not None:
        patient_list.prepare(out)
    with progress_bar("Reading images") as progress:
        found = patient_list.matches_of(site, judged_by, progress=progress)
    if as_json:
        typer.echo(json.dumps(patient_list.as_dict(site, found)))
    else:
        typer.echo(patient_list.render(site, found))
    if out is None:
        if found and not as_json:
            command = f"cloister client patients --out patients-found.csv{dir_option(folder)}"
            typer.echo(f"Write the numbers to a file: {command}")
        return
    rows = patient_list.write(found, out)
    typer.echo(
        f"Wrote {counted(rows, 'number')} to {out}. It names patients: keep it at this site. "
        "Write into 'person' one word for each person, with a text editor (a spreadsheet drops "
        "leading zeros); then name the file in site.toml, below [data.patients]: mapping = "
        '"patients.csv".',
        err=True,
    )
