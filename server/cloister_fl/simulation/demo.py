"""The demo: five drawn hospitals, one study, one federation, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.errors import OutputInTheWay
from cloister_fl.simulation.simulated_run import Engine, Simulation, run_simulation
from cloister_fl.study.file import parse_study
from cloister_fl.system.files import is_unused, write_atomic
from cloister_fl.system.git_ignore import keep_out_of_git

if TYPE_CHECKING:
    from cloister_fl.server.results.progress import Display

STUDY = """\
# The demo's study. Change it and run it again:
#   cloister simulate study.toml --sites data/sites --holdout data/holdout --out another-run

[study]
name = "demo-nodule"
question = "Does the (drawn) radiograph show a nodule?"

[input]
modalities = ["CR", "DX"]
size = 64

[target]
column = "finding"
classes = ["normal", "nodule"]

[network]
# A fixed bank of filters under a head of 513 trainable weights: little data and a tight privacy
# budget leave no room for more.
name = "filter-bank"

[training]
rounds = 8
steps = 5
sampling_rate = 1.0
expected_batch = 120
images_per_patient = 2
learning_rate = 1.5

[privacy]
epsilon = 7.9
delta = 1e-5
clipping_norm = 1.0
"""


def free_folder(wanted: Path) -> Path:
    """Return ``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that is not there."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run_demo(folder: Path, *, seed: int, engine: Engine, display: Display) -> dict[str, object]:
    """Draw the hospitals, write the study, run it, and return the summary.

    Args:
        folder: new or empty; gets ``data/``, ``study.toml`` and ``run/``.
        seed: 0 or more; draws other patients. The noise of privacy has no seed.
        engine: where the simulation runs.
        display: shows progress.

    Raises:
        OutputInTheWay: ``folder`` is not empty.
    """
    from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
    from cloister_fl.simulation.synthetic_sites import HOLDOUT_PATIENTS, draw_federation

    if folder.exists() and not (folder.is_dir() and is_unused(folder)):
        raise OutputInTheWay(f"{folder} is not empty.", remedy="Name another folder with --out.")
    total = sum(hospital.patients for hospital in HOSPITALS) + HOLDOUT_PATIENTS
    done: dict[str, int] = {}

    def progress(cohort: str, patients: int, of: int) -> None:
        del of
        done[cohort] = patients
        display.count("Drawing patients", sum(done.values()), total)

    folder.mkdir(parents=True, exist_ok=True)
    keep_out_of_git(folder)
    draw_federation(folder / "data", seed=seed, progress=progress)
    write_atomic(folder / "study.toml", STUDY.encode(), mode=0o644)
    return run_simulation(
        Simulation(
            study=parse_study(STUDY),
            sites=folder / "data" / "sites",
            out=folder / "run",
            engine=engine,
            holdout=folder / "data" / "holdout",
        ),
        notify=display,
    )
