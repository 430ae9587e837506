"""The folder of a simulation's run: one process at a time works in it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cloister_fl.errors import OutputInTheWay
from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from cloister_fl.system.files import is_unused, sweep
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.pid_lock import holder, only_one

FEDERATION = "federation"
"""Folder of a run's root key, roster and pins."""

MARKER = ".cloister-run"
"""File that says that Cloister made the folder, so that a start that failed can be repeated. It is
locked by the process that works there."""

_OURS = ("sites", "holdout", FEDERATION)


@contextmanager
def claimed(out: Path, sites: Path, holdout: Path | None, *, resume: bool) -> Iterator[None]:
    """Make the folder of a run, or take the one to resume, and hold it against other processes.

    What a start that failed left is removed. Where the folder is refused it is left as it is.

    Args:
        out: the folder.
        sites, holdout: of the simulation, for the remedy.
        resume: whether a run is there that goes on.

    Raises:
        OutputInTheWay: another process works in it; or it holds something else, or cannot be used.
    """
    with ExitStack() as held:
        try:
            if out.exists() and not out.is_dir():
                raise OutputInTheWay(f"{out} is a file.", remedy="Name a folder (--out, out=).")
            if holder(out / MARKER) is not None:
                raise in_use(out, out / MARKER)
            if not resume:
                _refuse_content(out, sites, holdout)
            out.mkdir(parents=True, exist_ok=True)
            keep_out_of_git(out)
            held.enter_context(only_one(out / MARKER, lambda: in_use(out, out / MARKER)))
            if resume:
                sweep(out)
            else:
                # Once more: another process may have been here until a moment ago.
                _refuse_content(out, sites, holdout)
                # A start that failed left it: keys and caches of sites that trained nothing.
                for name in _OURS:
                    shutil.rmtree(out / name, ignore_errors=True)
        except OSError as error:
            raise OutputInTheWay(
                f"{out} cannot be used.",
                why=(error.strerror or "The system gave no reason") + ".",
                remedy="Name a folder that you may write to.",
            ) from None
        yield


def in_use(folder: Path, lock: Path) -> OutputInTheWay:
    """Return the error of a folder that another process holds by the lock file ``lock``."""
    process = holder(lock)
    return OutputInTheWay(
        f"{folder} is in use.",
        why=f"Process {process} works in it." if process else "Another process works in it.",
        remedy="Wait until it has ended, or name another folder (--out, out=).",
    )


def _refuse_content(out: Path, sites: Path, holdout: Path | None) -> None:
    if not out.exists() or is_unused(out):
        return
    # Asked after what is there: whoever fills the folder begins with the marker.
    ours = (out / MARKER).is_file()
    begun = Checkpoints(out / CHECKPOINT_FOLDER).exists()
    if begun:
        # The study's file is not known here.
        command = resume_command("STUDY", sites, out, holdout)
        raise OutputInTheWay(
            f"{out} is not empty.",
            remedy=f"Name another folder (--out, out=), or resume the run (resume=True): {command}",
        )
    if not ours:
        raise OutputInTheWay(
            f"{out} is not empty.",
            remedy="It has no run to resume. Name another folder (--out, out=).",
        )


def resume_command(study: str, sites: Path, out: Path, holdout: Path | None) -> str:
    """Return the command that resumes a simulation; ``study`` names the study's file."""
    given = ["--sites", str(sites)]
    if holdout is not None:
        given += ["--holdout", str(holdout)]
    return shlex.join(["cloister", "simulate", study, *given, "--out", str(out), "--resume"])
