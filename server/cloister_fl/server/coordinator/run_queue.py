"""The coordinator's queue of runs: the request and the status of each, one folder a run.

::

    runs/<name>/run.json        what a person asked for: the study, and whether it is to run
    runs/<name>/status.json     how it stands; written by the process that executes it
    runs/<name>/checkpoint/     the state after each round
    runs/<name>/summary.json    once it has finished, with the model and the report beside it

``run.json`` is what is wanted. The server makes it so, and again after any crash, so a run that
was interrupted goes on by itself from its last checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import CloisterError, RunUnknown, StudyInvalid
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system import utc
from cloister_fl.system.files import make_private_dir, moved_away, write_atomic
from cloister_fl.system.toml import FileModel

RUNS = "runs"
ASKED = "run.json"
STATUS = "status.json"
SUMMARY = "summary.json"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
FINAL = frozenset({DONE, FAILED, STOPPED})

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")


class Asked(FileModel):
    """The file ``run.json``.

    Attributes:
        study: the study's canonical form.
        created: when it was asked for, ISO 8601.
        wanted: False where a person stopped it.
        keep: True where a person ended it with what it has.
        wait: seconds that a run which could begin waits for sites that have not answered.
        timeout: seconds after which a stage goes on without those who have not answered.
        holdout: folder of patients of no site, on whom the model is measured; or empty.
        signatures: who vouches for the study, hexadecimal, see ``study.signatures``; or empty.
    """

    study: str
    created: str
    wanted: bool = True
    keep: bool = False
    wait: float = 3600.0
    timeout: float = 3600.0
    holdout: str = ""
    signatures: str = ""


@dataclass(frozen=True)
class Status:
    """The file ``status.json``.

    Attributes:
        state: waiting, training, done, failed or stopped.
        round: last round that ended.
        rounds: rounds of the study.
        sites: who takes part.
        refused: why the others do not, a word of the closed list by site.
        told: the last thing to say, in words.
        code: of the error that ended it.
        updated: ISO 8601.
        update_bytes: size of one site's update; 0 before the first round.
    """

    state: str = "waiting"
    round: int = 0
    rounds: int = 0
    sites: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    told: str = ""
    code: str = ""
    updated: str = ""
    update_bytes: int = 0


_STATUS = TypeAdapter(Status)


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """Its name, which commands take."""
        return self.path.name

    def asked(self) -> Asked:
        """Return what was asked for.

        Raises:
            RunUnknown: the file cannot be read.
        """
        try:
            return Asked.model_validate_json((self.path / ASKED).read_text("utf-8"), strict=False)
        except (OSError, ValueError):
            raise RunUnknown(
                f"The run {self.name} cannot be read.",
                why=f"Its {ASKED} is missing or not valid.",
                remedy=f"Restore {self.path / ASKED} from a backup; or give the run up, and keep "
                f"it elsewhere: {moved_away(self.path / ASKED)}",
            ) from None

    def study(self) -> Study:
        """The study, as it was when it was asked for."""
        return study_from_canonical(self.asked().study)

    def ask(self, asked: Asked) -> None:
        """Change what is wanted."""
        write_atomic(self.path / ASKED, asked.model_dump_json(indent=2).encode())

    def status(self) -> Status:
        """Return its status; ``waiting`` before it has started, or where it cannot be read.

        A run whose status is lost is executed again from its last checkpoint, unless a person
        stopped it.
        """
        try:
            return _STATUS.validate_json((self.path / STATUS).read_bytes())
        except (OSError, ValueError):
            return Status(told="the run has not started")

    def tell(self, status: Status) -> None:
        """Replace its status."""
        told = {**asdict(status), "updated": utc.timestamp("microseconds")}
        write_atomic(self.path / STATUS, json.dumps(told).encode())

    @property
    def folder_option(self) -> str:
        """Option ``--dir`` of the coordinator's folder, for a remedy."""
        return dir_option(self.path.parent.parent)

    def summary(self) -> dict[str, object]:
        """The summary of a run that is finished.

        Raises:
            RunUnknown: it cannot be read.
        """
        path = self.path / SUMMARY
        try:
            told = json.loads(path.read_bytes())
            if isinstance(told, dict) and "study_hash" in told:
                return told
        except (OSError, ValueError):
            pass
        raise RunUnknown(
            f"The summary of the run {self.name} cannot be read.",
            why=f"{path} is damaged.",
            remedy="Restore it from a backup; or let it be made again, from the last checkpoint: "
            f"{moved_away(path)}; cloister server resume {self.name}{self.folder_option}",
        )

    @property
    def finished(self) -> bool:
        """True where the run has a model."""
        return (self.path / SUMMARY).exists()


def new_run(
    root: Path,
    study: Study,
    *,
    wait: float,
    timeout: float,
    holdout: Path | None,
    signatures: bytes = b"",
) -> RunFolder:
    """Ask for a run of a study, under the next free name.

    Raises:
        RunUnknown: a run of the very study has not ended.
        OutputInTheWay: the folder cannot be written.
    """
    for run in runs(root):
        if run.study().digest == study.digest and run.status().state not in FINAL:
            raise RunUnknown(
                f"The run {run.name} of this study has not ended.",
                remedy=f"Stop it first: cloister server stop --run {run.name}{dir_option(root)}",
            )
    number = 1
    while (root / RUNS / f"{study.study.name}-{number}").exists():
        number += 1
    run = RunFolder(root / RUNS / f"{study.study.name}-{number}")
    make_private_dir(root / RUNS)
    make_private_dir(run.path)
    run.ask(
        Asked(
            study=study.canonical(),
            created=utc.timestamp("microseconds"),
            wait=wait,
            timeout=timeout,
            holdout=str(holdout.absolute()) if holdout is not None else "",
            signatures=signatures.hex(),
        )
    )
    return run


def find_run(root: Path, name: str) -> RunFolder:
    """The run of this name.

    Raises:
        RunUnknown: there is none.
    """
    run = RunFolder(root / RUNS / name)
    if not _NAME.fullmatch(name) or not (run.path / ASKED).is_file():
        raise RunUnknown(
            f"There is no run {name!r} in {root}.",
            remedy=f"List the runs: cloister server status{dir_option(root)}",
        )
    return run


def runs(root: Path) -> Iterator[RunFolder]:
    """All runs that can be read, in the order in which they were asked for."""
    return _in_order(_folders(root))


def damaged_runs(root: Path) -> tuple[str, ...]:
    """What a person is told of runs that cannot be read, a sentence each."""
    found = []
    for run in _folders(root):
        try:
            run.study()
        except CloisterError as error:
            found.append(str(error))
    return tuple(found)


def next_run(root: Path) -> RunFolder | None:
    """The run to execute now: the oldest that is wanted and has not ended.

    Of runs that ended, in all the years, no more is looked at than that.
    """
    open_runs = [run for run in _folders(root) if not run.finished]
    open_runs = [run for run in open_runs if run.status().state not in FINAL]
    return next((run for run in _in_order(open_runs) if run.asked().wanted), None)


def _folders(root: Path) -> list[RunFolder]:
    return sorted(
        (RunFolder(path.parent) for path in (root / RUNS).glob(f"*/{ASKED}")),
        key=lambda run: run.name,
    )


def _in_order(found: Iterable[RunFolder]) -> Iterator[RunFolder]:
    known: list[tuple[str, RunFolder]] = []
    for run in found:
        try:
            run.study()
            known.append((run.asked().created, run))
        except (RunUnknown, StudyInvalid):
            continue
    yield from (run for _, run in sorted(known, key=lambda pair: (pair[0], pair[1].name)))


def update_bytes(root: Path) -> int:
    """Size of one site's update in the run under way, bytes; 0 where no run has begun.

    For the process that faces the sites: the executor has said so in the run's status before it
    asks any site for an update.
    """
    found = (RunFolder(path.parent).status() for path in (root / RUNS).glob(f"*/{STATUS}"))
    return max((one.update_bytes for one in found if one.state not in FINAL), default=0)


def close_finished(root: Path) -> None:
    """Set the status of runs that have a model to done.

    For the process that executes runs alone, before its first: a kill between a run's summary and
    its status leaves it "training", and it would not be executed again.
    """
    for run in runs(root):
        status = run.status()
        if run.finished and status.state not in FINAL:
            run.tell(replace(status, state=DONE, round=status.rounds, told="finished", code=""))


def stop_run(run: RunFolder) -> None:
    """Request that a run stops; the run executor sees it before the next round.

    Raises:
        RunUnknown: it has ended.
    """
    if run.finished or run.status().state in FINAL:
        raise RunUnknown(
            f"The run {run.name} has ended already.",
            remedy=f"See its status: cloister server status{run.folder_option}",
        )
    run.ask(run.asked().model_copy(update={"wanted": False}))


def keep_run(run: RunFolder) -> None:
    """Request that a run ends with what it has: its results are those of the rounds by now.

    A run that was stopped, or that failed, is taken up for that.

    Raises:
        RunUnknown: it is finished, or no round of it has ended.
    """
    if run.finished:
        raise RunUnknown(
            f"The run {run.name} is finished.",
            remedy=f"See its results: cloister server report {run.name}{run.folder_option}",
        )
    status = run.status()
    if status.round < 1:
        raise RunUnknown(
            f"No round of the run {run.name} has ended, so there is nothing to keep.",
            remedy="Stop it without --keep: "
            f"cloister server stop --run {run.name}{run.folder_option}",
        )
    if status.state in FINAL:
        run.tell(Status(told="to be ended", rounds=status.rounds, round=status.round))
    run.ask(run.asked().model_copy(update={"wanted": True, "keep": True}))


def resume_run(run: RunFolder) -> None:
    """Request that a run that was stopped, or that failed, is executed again.

    Raises:
        RunUnknown: it is finished, or is running.
    """
    if run.finished:
        raise RunUnknown(
            f"The run {run.name} is finished.",
            remedy=f"See its results: cloister server report {run.name}{run.folder_option}",
        )
    status, asked = run.status(), run.asked()
    if asked.wanted and status.state not in FINAL:
        raise RunUnknown(
            f"The run {run.name} is already running.",
            remedy=f"See its status: cloister server status{run.folder_option}",
        )
    run.tell(Status(told="resumed", rounds=status.rounds, round=status.round))
    run.ask(asked.model_copy(update={"wanted": True}))


def failure(error: CloisterError, status: Status) -> Status:
    """Return the status of a run that an error ended."""
    told = " ".join(part for part in (error.what, error.why, error.remedy) if part)
    return Status(
        state=FAILED,
        round=status.round,
        rounds=status.rounds,
        sites=status.sites,
        refused=status.refused,
        told=told,
        code=error.code,
    )
