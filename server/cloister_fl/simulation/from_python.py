"""Simulations as a function of Python, for notebooks, scripts and the commands alike.

A host program finds itself as it was: its environment, logging, signal handlers, working folder,
threads of torch and random numbers. So what changes them on import is imported inside, by
``undisturbed_imports``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.simulation.result import Result, read_result
from cloister_fl.simulation.shown_progress import ProgressCallback, RaisesLater, shown
from cloister_fl.study import signatures as study_signatures
from cloister_fl.study.file import given_study
from cloister_fl.study.schema import Study
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.libraries.imports import undisturbed_imports
from cloister_fl.system.libraries.logs import libraries_silenced
from cloister_fl.system.optional import require

if TYPE_CHECKING:
    from cloister_fl.simulation.simulated_run import Engine

_ENGINES: tuple[Engine, ...] = ("in-process", "ray")

_NEEDED = ("flwr", "torch", "opacus", "pydicom", "jinja2")

_IMPORTED = (
    *("torch._dynamo", "opacus.validators", "flwr.serverapp", "flwr.clientapp"),
    *("matplotlib.figure", "pydicom", "dp_accounting.pld"),
    *("cloister_fl.client.app", "cloister_fl.server.app"),
    *("cloister_fl.server.flower.engines", "cloister_fl.simulation.simulated_run"),
)
"""What a run imports, and what changes its host when it is first imported."""

MAX_THREADS = 1024
"""Most threads of torch that may be asked for; it would try to start any number."""

# Flower keeps in variables of the process for whom it acts.
_one_at_a_time = threading.RLock()


def simulate(
    study: Study | StrPath,
    sites: StrPath,
    out: StrPath,
    *,
    holdout: StrPath | None = None,
    engine: Engine = "in-process",
    resume: bool = False,
    progress: bool | ProgressCallback | None = None,
    threads: int | None = None,
    signatures: bytes | None = None,
) -> Result:
    """Run a whole federation on this machine and return its result.

    It is what ``cloister simulate`` runs: server and sites of a deployment, with secure
    aggregation, privacy ledgers and DICOM reading, one after the other in this process. It works
    in a notebook, in a thread and under a running event loop, which waits meanwhile. One
    simulation runs at a time; another call waits for it.

    An interrupt (``KeyboardInterrupt``) ends it. What was trained is kept in ``out``, and a call
    with ``resume`` goes on: with privacy, the round under way stays charged and is not repeated.

    Args:
        study: what is trained, from ``study.load`` or ``study.parse``; or the path of its file.
        sites: folder with a directory a site: ``dicom/`` and ``labels.csv``, or a site folder
            with a ``site.toml``, which is used in place and charged for good.
        out: folder of the run, new or empty; gets the model, the report and the figures. One
            process at a time works in it.
        holdout: folder with ``dicom/`` and ``labels.csv`` of patients of no site, to measure on.
        engine: ``in-process``, or ``ray`` for Flower's simulation engine, which starts
            processes.
        resume: go on with the run in ``out``.
        progress: a function that is called with each ``Progress``; True for a display, on a
            terminal, in a notebook, or as lines on standard error; False for none. None shows it
            where somebody can see it: on a terminal or in a notebook.
        threads: of torch, 1 or more, while the run lasts; None for the number that torch has.
            With 1 a small network trains quickest, by far where other work shares the cores.
        signatures: who vouches for the study at sites with a policy of their own, from
            ``study.load_signatures``. None for those that lie beside the study's file, where
            ``study`` is its path, else for none.

    Returns:
        Figures by round, privacy cost and files. ``read_result`` reads it from ``out`` again.

    Raises:
        CloisterError: with ``code``, ``what``, ``why`` and ``remedy``; nothing is printed. All
            that follow are such errors.
        FileUnreadable: the study's file, its signatures or the folder of sites cannot be read.
        StudyInvalid: the study has faults, or its engine does not support its privacy claim.
        OutputInTheWay: ``out`` holds something and ``resume`` is off, or another process works
            in it.
        NothingToResume, ResumeMismatch: ``resume`` is on, and ``out`` holds no run of the study.
        TooFewSitesGiven: there are fewer site folders than the study asks for.
        TooFewSites: too few sites take part; each site's own reason is told.
        OptionInvalid: an argument is not what is described here, or a folder is not one of a
            site.
        DataError: the hold-out cannot be used.
        ExtraMissing: a package is not installed; the remedy names the command.
    """
    asked = given_study(study)
    folder, run = arguments.path("sites", sites), arguments.path("out", out)
    apart = None if holdout is None else arguments.path("holdout", holdout)
    chosen: Engine = arguments.word("engine", engine, _ENGINES)
    resumed = arguments.flag("resume", resume)
    _refuse_progress(progress)
    if threads is not None:
        threads = arguments.whole("threads", threads, 1, MAX_THREADS)
    vouched = _signatures(study, asked, signatures)
    require("simulation", *_NEEDED)
    with _one_at_a_time, libraries_silenced():
        with undisturbed_imports():
            for name in (*_IMPORTED, *(("ray",) if chosen == "ray" else ())):
                import_module(name)
        from cloister_fl.simulation.simulated_run import Simulation, run_simulation

        simulation = Simulation(asked, folder, run, chosen, resumed, apart, vouched)
        with _threads_of_torch(threads), shown(progress) as display:
            told = RaisesLater(display)
            run_simulation(simulation, notify=told, check=told.check)
            told.check()
    return read_result(run)


def _signatures(given: Study | StrPath, study: Study, signatures: Any) -> bytes:
    if signatures is None:
        if isinstance(given, Study):
            return b""
        return study_signatures.load(arguments.path("study", given), study)
    if not isinstance(signatures, bytes) or not study_signatures.is_entries(signatures):
        remedy = "Give what study.load_signatures returns, or leave it out."
        raise arguments.refused("signatures", signatures, remedy)
    return signatures


def _refuse_progress(progress: Any) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise arguments.refused("progress", progress, "Give True, False, None or a function.")


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
        OutputInTheWay: the folder is not empty, or another process draws in it.
        OptionInvalid: an argument is not what is described here.
        ExtraMissing: a package is not installed.
    """
    path = arguments.path("folder", folder)
    seed = arguments.whole("seed", seed, 0, arguments.MAX_SEED)
    _refuse_progress(progress)
    require("simulation", "numpy", "pydicom")
    with undisturbed_imports():
        import_module("pydicom")
    from cloister_fl.simulation import demo_data

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
