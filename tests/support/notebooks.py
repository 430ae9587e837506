"""Notebooks that a Jupyter kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def run_notebook(cells: Sequence[str], *, folder: Path, seconds: int) -> list[list[dict[str, Any]]]:
    """Run cells one after the other in a kernel of this interpreter; the outputs of each.

    Args:
        cells: source of each.
        folder: the kernel's working folder.
        seconds: most time for a cell.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return [list(cell["outputs"]) for cell in notebook["cells"]]
