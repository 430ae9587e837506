"""The site folder that a command acts on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.errors import OptionInvalid

PatientsAtMost = Annotated[
    int | None,
    typer.Option(
        "--patients-at-most",
        metavar="N",
        min=1,
        max=1_000_000_000,
        help="A public upper bound on the site's patients, rounded up generously, for a site.toml "
        "made now.",
    ),
]


def site_folder(folder: Path) -> Path:
    """The folder, if it is a site's.

    Raises:
        OptionInvalid: it is none.
    """
    from cloister_fl.client.site.folder import SITE_FILE

    if not (folder / SITE_FILE).exists():
        # Whole, also where --dir was left out: a person may stand elsewhere than they think.
        place = folder.absolute()
        raise OptionInvalid(
            f"{place} is not a site folder.",
            why=f"It has no {SITE_FILE}.",
            remedy="Name another with --dir, or create it: "
            f"cloister client init {shlex.quote(str(place))}",
        )
    return folder
