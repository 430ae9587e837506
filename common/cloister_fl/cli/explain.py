"""`cloister explain`: the page of an error code, offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.errors import OptionInvalid

_CODE = re.compile(r"(?:CLO-)?(\d{3})", re.IGNORECASE)
_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "errors_explained", _HERE.parents[2] / "docs" / "errors")
"""In a wheel, and in a checkout."""


def explain(
    code: Annotated[str, typer.Argument(help="A code such as CLO-104.")],
) -> None:
    """Show what an error means, why it happens and what to do."""
    typer.echo(page(code), nl=False)


def page(code: str) -> str:
    """The page of an error or reject code, Markdown.

    Raises:
        OptionInvalid: there is no such code.
    """
    digits = _CODE.fullmatch(code.strip())
    if digits:
        for folder in _FOLDERS:
            path = folder / f"CLO-{digits.group(1)}.md"
            if path.is_file():
                return path.read_text("utf-8")
    raise OptionInvalid(
        f"There is no error code {code!r}.", remedy="Give one as it was printed, such as CLO-104."
    )
