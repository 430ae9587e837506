"""Data of the demo: five drawn hospitals, a hold-out, and the study that fits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cloister_fl.errors import OutputInTheWay
from cloister_fl.simulation.run_folder import in_use
from cloister_fl.system.files import GIT_IGNORE, write_atomic
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.pid_lock import holder, only_one

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

SITES = Path("data/sites")
HOLDOUT = Path("data/holdout")
STUDY_FILE = Path("study.toml")
"""Where each is in the folder that ``draw`` fills."""

_LOCK = ".cloister-data"
"""File that is locked by the process that draws."""


def draw(folder: Path, *, seed: int, count: Callable[[str, int, int], None]) -> None:
    """Draw the hospitals and the hold-out, and write the study.

    Args:
        folder: new or empty.
        seed: 0 or more; draws other patients.
        count: called after each patient with the step's name, patients done and in all.

    Raises:
        OutputInTheWay: ``folder`` is not empty, or another process draws in it.
    """
    from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
    from cloister_fl.simulation.synthetic_sites import HOLDOUT_PATIENTS, draw_federation

    total = sum(hospital.patients for hospital in HOSPITALS) + HOLDOUT_PATIENTS
    done: dict[str, int] = {}

    def progress(cohort: str, patients: int, of: int) -> None:
        del of
        done[cohort] = patients
        count("Drawing patients", sum(done.values()), total)

    with _claimed(folder):
        draw_federation(folder / SITES.parent, seed=seed, progress=progress)
        write_atomic(folder / STUDY_FILE, STUDY.encode(), mode=0o644)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against other processes."""
    lock = folder / _LOCK
    with ExitStack() as held:
        try:
            if holder(lock) is not None:
                raise in_use(folder, lock)
            _refuse_content(folder)
            folder.mkdir(parents=True, exist_ok=True)
            keep_out_of_git(folder)
            held.enter_context(only_one(lock, lambda: in_use(folder, lock)))
            # Once more: another process may have drawn here until a moment ago.
            _refuse_content(folder)
        except OSError as error:
            raise OutputInTheWay(
                f"{folder} cannot be used.",
                why=(error.strerror or "The system gave no reason") + ".",
                remedy="Name a folder that you may write to.",
            ) from None
        yield


def _refuse_content(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or not {one.name for one in folder.iterdir()} <= {GIT_IGNORE, _LOCK}:
        raise OutputInTheWay(
            f"{folder} is not empty.", remedy="Name another folder (in the command, with --out)."
        )
