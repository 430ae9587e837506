"""Simulations as a function of Python, for notebooks, scripts and the commands alike.

A host program finds itself as it was: its environment, logging, signal handlers, working folder,
threads of torch and random numbers. So what changes them on import is imported inside, by
``undisturbed_imports``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cloister_fl.errors import OptionInvalid
from cloister_fl.simulation.result import Result, read_result
from cloister_fl.simulation.shown_progress import ProgressCallback, RaisesLater, shown
from cloister_fl.study.schema import Study
from cloister_fl.system.libraries.imports import undisturbed_imports
from cloister_fl.system.libraries.logs import libraries_silenced
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.simulation.simulated_run import Engine

StrPath: TypeAlias = str | os.PathLike[str]

_NEEDED = ("flwr", "torch", "opacus", "pydicom", "jinja2")

_IMPORTED = (
    *("torch._dynamo", "opacus.validators", "flwr.serverapp", "flwr.clientapp"),
    *("matplotlib.figure", "pydicom", "dp_accounting.pld"),
    *("cloister_fl.client.app", "cloister_fl.server.app"),
    *("cloister_fl.server.flower.engines", "cloister_fl.simulation.simulated_run"),
)
"""What a run imports, and what changes its host when it is first imported."""

# Flower keeps in variables of the process for whom it acts.
_one_at_a_time = threading.RLock()


def simulate(
    study: Study,
    sites: StrPath,
    out: StrPath,
    *,
    holdout: StrPath | None = None,
    engine: Engine = "in-process",
    resume: bool = False,
    progress: bool | ProgressCallback | None = None,
    threads: int | None = None,
    signatures: bytes = b"",
) -> Result:
    """Run a whole federation on this machine and return its result.

    It is what ``cloister simulate`` runs: server and sites of a deployment, with secure
    aggregation, privacy ledgers and DICOM reading, one after the other in this process. It works
    in a notebook, in a thread and under a running event loop, which waits meanwhile. One
    simulation runs at a time; another call waits for it.

    An interrupt (``KeyboardInterrupt``) ends it. What was trained is kept in ``out``, and a call
    with ``resume`` goes on: with privacy, the round under way stays charged and is not repeated.

    Args:
        study: what is trained, from ``study.load`` or ``study.parse``.
        sites: folder with a directory a site: ``dicom/`` and ``labels.csv``, or a site folder
            with a ``site.toml``, which is used in place and charged for good.
        out: folder of the run, new or empty; gets the model, the report and the figures.
        holdout: folder with ``dicom/`` and ``labels.csv`` of patients of no site, to measure on.
        engine: ``in-process``, or ``ray`` for Flower's simulation engine, which starts
            processes.
        resume: go on with the run in ``out``.
        progress: a function that is called with each ``Progress``; True for a display, on a
            terminal, in a notebook, or as lines on standard error; False for none. None shows it
            where somebody can see it: on a terminal or in a notebook.
        threads: of torch, 1 or more, while the run lasts; None for the number that torch has.
            With 1 a small network trains quickest, by far where other work shares the cores.
        signatures: who vouches for the study at sites with a policy of their own, see
            ``study.signatures``.

    Returns:
        Figures by round, privacy cost and files. ``read_result`` reads it from ``out`` again.

    Raises:
        CloisterError: with ``code``, ``what``, ``why`` and ``remedy``; nothing is printed. All
            that follow are such errors.
        StudyInvalid: the study's engine does not support its privacy claim.
        OutputInTheWay: ``out`` holds something and ``resume`` is off.
        NothingToResume, ResumeMismatch: ``resume`` is on, and ``out`` holds no run of the study.
        TooFewSitesGiven: there are fewer site folders than the study asks for.
        TooFewSites: too few sites take part; each site's own reason is told.
        OptionInvalid: there is no such engine, or a folder is not one of a site.
        DataError: the hold-out cannot be used.
        ExtraMissing: a package is not installed; the remedy names the command.
    """
    if engine not in ("in-process", "ray"):
        raise OptionInvalid(
            f"There is no engine {engine!r}.", remedy="Choose 'in-process' or 'ray'."
        )
    if threads is not None and threads < 1:
        raise OptionInvalid("There must be one thread or more.", remedy="Leave 'threads' out.")
    require("simulation", *_NEEDED)
    with _one_at_a_time, libraries_silenced():
        with undisturbed_imports():
            for name in (*_IMPORTED, *(("ray",) if engine == "ray" else ())):
                import_module(name)
        from cloister_fl.simulation.simulated_run import Simulation, run_simulation

        simulation = Simulation(
            study,
            Path(sites),
            Path(out),
            engine,
            resume,
            None if holdout is None else Path(holdout),
            signatures,
        )
        with _threads_of_torch(threads), shown(progress) as display:
            told = RaisesLater(display)
            run_simulation(simulation, notify=told, check=told.check)
            told.check()
    return read_result(out)


@dataclass(frozen=True)
class GeneratedSites:
    """Generated DICOM of a federation, and a study that fits it.

    Attributes:
        sites: folder of the sites, for ``simulate``.
        holdout: folder of patients of no site.
        study: the study file.
    """

    sites: Path
    holdout: Path
    study: Path


def generate_sites(
    folder: StrPath, *, seed: int = 0, progress: bool | ProgressCallback | None = None
) -> GeneratedSites:
    """Draw the radiographs of five hospitals and a hold-out, and write a study of them.

    They are those of ``cloister demo``: 470 patients at five hospitals that differ as hospitals
    do, and 240 of no hospital. The question is whether a nodule is seen. Nothing of it has
    clinical value.

    Args:
        folder: new or empty; gets ``data/`` and ``study.toml``.
        seed: 0 or more; the same seed draws the same patients.
        progress: see ``simulate``.

    Raises:
        OutputInTheWay: the folder is not empty.
        ExtraMissing: a package is not installed.
    """
    require("simulation", "numpy", "pydicom")
    with undisturbed_imports():
        import_module("pydicom")
    from cloister_fl.simulation import demo_data

    path = Path(folder)
    with shown(progress) as display:
        demo_data.draw(path, seed=seed, count=display.count)
    return GeneratedSites(
        path / demo_data.SITES, path / demo_data.HOLDOUT, path / demo_data.STUDY_FILE
    )


@contextmanager
def _threads_of_torch(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        # Also where none were asked for: training that was interrupted leaves one.
        torch.set_num_threads(before)
