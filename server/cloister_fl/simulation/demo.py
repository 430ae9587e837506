"""The demo: five drawn hospitals, one study, one federation, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.simulation.from_python import generate_sites, simulate
from cloister_fl.simulation.result import Result
from cloister_fl.simulation.shown_progress import ProgressCallback
from cloister_fl.study.file import load_study

if TYPE_CHECKING:
    from cloister_fl.simulation.simulated_run import Engine


def free_folder(wanted: Path) -> Path:
    """Return ``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that is not there."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run_demo(
    folder: Path, *, seed: int, engine: Engine, progress: bool | ProgressCallback | None = None
) -> Result:
    """Draw the hospitals, write the study, run it, and return the result.

    Args:
        folder: new or empty; gets ``data/``, ``study.toml`` and ``run/``.
        seed: 0 or more; draws other patients. The noise of privacy has no seed.
        engine: where the simulation runs.
        progress: see ``simulate``.

    Raises:
        OutputInTheWay: ``folder`` is not empty.
    """
    drawn = generate_sites(folder, seed=seed, progress=progress)
    return simulate(
        load_study(drawn.study),
        drawn.sites,
        folder / "run",
        holdout=drawn.holdout,
        engine=engine,
        progress=progress,
        # On a network this small a second thread only waits for the first, for minutes where
        # other work shares the cores.
        threads=1,
    )
