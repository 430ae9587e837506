"""Checkpoints of a run, from which another process can resume it.

Two files in ``OUT/checkpoint``: ``state.safetensors``, the whole state after a round, and
``progress.json``, the last round that was sent out, and for whom it was unmasked. Both are
replaced atomically. A round that was sent and not finished is known after a crash: its sites were
charged for it.

What the state tells of each round does not grow with it: every hundred rounds the figures move to a
sealed segment, ``figures-000001.jsonl`` and so on, which is never written again and of which the
state keeps the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cloister_fl.errors import NothingToResume, ResumeMismatch
from cloister_fl.metrics.figures import Metrics
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.server.rounds.checkpoint_form import StateText, plain, read_progress, read_state
from cloister_fl.server.rounds.kept_sums import SUMS_FOLDER, KeptSums
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic

FORMAT = "cloister/checkpoint/v6"
CHECKPOINT_FOLDER = "checkpoint"
"""Its name inside the folder of a run."""

_STATE = "state.safetensors"
_PROGRESS = "progress.json"
ENDED_STALLED = "stop_after"
"""The study's ``evaluation.stop_after`` evaluations passed without a better model."""
ENDED_KEPT = "kept"
"""A person ended the run with what it had."""

FIGURES_A_SEGMENT = 100
"""Evaluated models whose figures are sealed together."""


@dataclass(frozen=True)
class Figures:
    """A model of the run, as it is told.

    Attributes:
        round: whose result it is; 0 for the initial model.
        sites: how many sites' updates went into it.
        seconds: wall time of the round.
        update_norm: L2 norm of the mean update.
        epsilon: privacy spent so far, at the study's delta; None where privacy is off.
        metrics: what it was measured to do; None where it was not, or may not be, evaluated.
        selecting: the same on the patients of a hold-out by whom a model is chosen, and who are
            not reported; None without a divided hold-out.
    """

    round: int
    sites: int
    seconds: float
    update_norm: float
    epsilon: float | None = None
    metrics: Metrics | None = None
    selecting: Metrics | None = None

    def to_json(self) -> dict[str, Any]:
        """A dictionary ready for ``json.dumps``."""
        metrics = self.metrics and self.metrics.to_json()
        selecting = self.selecting and self.selecting.to_json()
        return {**vars(self), "metrics": metrics, "selecting": selecting}


@dataclass(frozen=True)
class Released:
    """The study's noised evaluation, once it was requested.

    Attributes:
        asked: ids of the sites that it was asked of, rising; they count as charged.
        sites: how many are in the sum; 0 where there is none, and never will be.
        noise: standard deviation of the noise in each cell of the sum, in patients.
        metrics: what was measured, noised throughout; None where there is no sum.
    """

    asked: tuple[str, ...]
    sites: int = 0
    noise: float = 0.0
    metrics: Metrics | None = None

    def to_json(self) -> dict[str, Any]:
        """A dictionary ready for ``json.dumps``."""
        return {**vars(self), "metrics": self.metrics and self.metrics.to_json()}


@dataclass(frozen=True)
class RunState:
    """Everything that the next round needs.

    Attributes:
        run: random id of the run; the sites' ledgers know it.
        completed: last round whose result is in ``model``; 0 before the first.
        model: the global model, (D,), from which the next round starts.
        average: the moving average of the models, (D,), where the study asks for one.
        optimizer: moments of the server optimiser.
        figures: one entry an evaluated model, the initial one first.
        lost: rounds that were sent, charged, and gave no model.
        discarded: those of them that had a sum, which no honest sites can give.
        invited: ids of the sites that the run began with, rising; they stay the same.
        started: by site, how many rounds were sent to it.
        sent: by site, bytes of payload that left it.
        seconds: wall time of the run so far.
        release: the study's release; None until it is asked for.
        best: the model that was best by the patients who choose, (D,); None where there is none.
        best_round: whose result it is; 0 where there is none.
        ended: why no further round is to come before the study's last: ``ENDED_STALLED``,
            ``ENDED_KEPT``, or empty.
    """

    run: str
    completed: int
    model: Vector
    optimizer: OptimizerState
    figures: tuple[Figures, ...] = ()
    lost: tuple[int, ...] = ()
    invited: tuple[str, ...] = ()
    started: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    average: Vector | None = None
    release: Released | None = None
    discarded: tuple[int, ...] = ()
    best: Vector | None = None
    best_round: int = 0
    ended: str = ""

    @property
    def released(self) -> Vector:
        """The model that is measured and handed out."""
        return self.model if self.average is None else self.average

    @property
    def summed(self) -> tuple[int, ...]:
        """Rounds that gave a sum, rising."""
        without = set(self.lost) - set(self.discarded)
        return tuple(number for number in range(1, self.completed + 1) if number not in without)


@dataclass(frozen=True)
class Progress:
    """How far the round had come that was last sent out.

    Attributes:
        round: its number; 0 before the first.
        sites: to whom it was sent.
        answered: by number of the sum, the survivors that sites were asked to unmask it for. No
            site answers for others, so another attempt must be for the same.
    """

    round: int = 0
    sites: tuple[str, ...] = ()
    answered: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sums = KeptSums(folder / SUMS_FOLDER)
        """Sums that are kept, for who computes them again."""
        self._sealed: list[str] = []
        """SHA-256 of the segments that the state on disk names."""

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self._folder / _STATE).is_file()

    def save(self, study: Study, state: RunState) -> None:
        """Replace the state on disk by ``state``."""
        from safetensors.numpy import save

        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "model": state.model,
            "first": state.optimizer.first,
            "second": state.optimizer.second,
        }
        if state.average is not None:
            tensors["average"] = state.average
        if state.best is not None:
            tensors["best"] = state.best
        sealed = self._seal(state.figures)
        plain = {
            "run": state.run,
            "completed": state.completed,
            "sealed": sealed,
            "figures": [
                figures.to_json() for figures in state.figures[len(sealed) * FIGURES_A_SEGMENT :]
            ],
            "lost": list(state.lost),
            "discarded": list(state.discarded),
            "invited": list(state.invited),
            "started": state.started,
            "sent": state.sent,
            "seconds": state.seconds,
            "release": state.release and state.release.to_json(),
            "best_round": state.best_round,
            "ended": state.ended,
        }
        metadata = {"format": FORMAT, "study": study.canonical(), "state": json.dumps(plain)}
        write_atomic(self._folder / _STATE, save(tensors, metadata=metadata))

    def _seal(self, figures: Sequence[Figures]) -> list[str]:
        """Write the segments that are full and not on disk yet; the hashes of all.

        Before the state that names them: a kill between the two leaves a file that is written again
        with the same content.
        """
        for number in range(len(self._sealed), len(figures) // FIGURES_A_SEGMENT):
            begin = number * FIGURES_A_SEGMENT
            rows = figures[begin : begin + FIGURES_A_SEGMENT]
            data = "".join(f"{json.dumps(one.to_json())}\n" for one in rows).encode()
            write_atomic(self._segment(number), data)
            self._sealed.append(hashlib.sha256(data).hexdigest())
        return self._sealed

    def _segment(self, number: int) -> Path:
        return self._folder / f"figures-{number + 1:06d}.jsonl"

    def _unsealed(self, text: str) -> str:
        """The state's text, with the figures of its segments in it.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: a segment is missing or not
                the one that the text names, or the text has another form.
        """
        told = json.loads(text)
        sealed, rows = [str(one) for one in told.pop("sealed")], []
        for number, digest in enumerate(sealed):
            data = self._segment(number).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("a segment was changed")
            rows += [json.loads(line) for line in data.splitlines()]
        self._sealed = sealed
        return json.dumps({**told, "figures": [*rows, *told["figures"]]})

    def mark(self, progress: Progress) -> None:
        """Record, before a message leaves, how far its round has come."""
        note = {
            "round": progress.round,
            "sites": progress.sites,
            "answered": {str(number): names for number, names in progress.answered.items()},
        }
        write_atomic(self._folder / _PROGRESS, json.dumps(note).encode())

    def initial_model(self) -> str:
        """Hash of the model that the run began with, as its study carries it; else empty."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / _STATE, framework="np") as file:
                stated = json.loads((file.metadata() or {})["study"])["training"]["initial_model"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return ""
        return stated if isinstance(stated, str) else ""

    def load(self, study: Study) -> tuple[RunState, Progress]:
        """Return the state, and how far the last round had come.

        Raises:
            NothingToResume: there is no checkpoint, it cannot be read, or a field or an array of it
                is not of the form that a run of the study writes.
            ResumeMismatch: it belongs to another study.
        """
        from safetensors import SafetensorError, safe_open

        remedy = "Start a new run in an empty folder, without --resume."
        if not self.exists():
            raise NothingToResume("The folder has no run to resume.", remedy=remedy)
        damaged = NothingToResume(
            "The checkpoint cannot be read.",
            why="A file of it is damaged, or another version of Cloister wrote it.",
            remedy=f"Restore the folder {self._folder} from a backup, or start a new run in an "
            "empty folder, without --resume: cloister explain CLO-504",
        )
        try:
            with safe_open(self._folder / _STATE, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError):
            raise damaged from None
        if metadata.get("format") != FORMAT:
            raise NothingToResume("The checkpoint has another format.", remedy=remedy)
        if metadata.get("study") != study.canonical():
            raise ResumeMismatch(
                "The run in this folder belongs to another study.",
                why="A study's hash covers everything in it, so a changed study is a new one.",
                remedy="Resume with the study file that it was started with.",
            )
        note = self._folder / _PROGRESS
        try:
            text = self._unsealed(metadata["state"])
            state = _state(read_state(text, study), tensors, study)
            progress = _progress(note.read_text("utf-8"), study) if note.is_file() else Progress()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
        return state, progress


def _progress(text: str, study: Study) -> Progress:
    note = read_progress(text, study)
    answered = {int(number): names for number, names in note.answered.items()}
    return Progress(note.round, note.sites, answered)


def _state(told: StateText, tensors: Mapping[str, Vector], study: Study) -> RunState:
    """Raises ValueError and KeyError where arrays or figures are not those of the study."""
    moments = OptimizerState(tensors["first"], tensors["second"])
    arrays = {"model", "first", "second"} | ({"average", "best"} & set(tensors))
    model = tensors["model"]
    fresh = OptimizerState.fresh(model.size, study.aggregation)
    shapes = dict.fromkeys(("model", "average", "best"), (model.size,))
    shapes |= {"first": fresh.first.shape, "second": fresh.second.shape}
    if set(tensors) != arrays or ("average" in arrays and not study.aggregation.ema):
        raise ValueError("arrays of another study")
    if ("best" in arrays) != (told.best_round > 0):
        raise ValueError("arrays of another study")
    for name, array in tensors.items():
        if array.dtype != np.float32 or array.shape != shapes[name] or not np.isfinite(array).all():
            raise ValueError("an array of another form")
    return RunState(
        run=told.run,
        completed=told.completed,
        model=np.array(model),
        optimizer=moments,
        figures=tuple(Figures(**plain(figures, study)) for figures in told.figures),
        lost=told.lost,
        discarded=told.discarded,
        invited=told.invited,
        started=told.started,
        sent=told.sent,
        seconds=told.seconds,
        average=np.array(tensors["average"]) if "average" in tensors else None,
        release=None if told.release is None else Released(**plain(told.release, study)),
        best=np.array(tensors["best"]) if "best" in tensors else None,
        best_round=told.best_round,
        ended=told.ended,
    )
