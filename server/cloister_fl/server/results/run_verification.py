"""Check of a run's folder: each sum from what sites signed, each step of the server, offline.

Computed again, and compared bit for bit: the model after each round, by the hash that the sites
signed in the next one; the state after the last; the model file. The steps are those that a run
takes (``run.advanced``), so nothing is computed in a second way.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cloister_fl.errors import CloisterError, FileUnreadable
from cloister_fl.model_file import load_model
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.secagg import SumRecord
from cloister_fl.server.results.artifacts import SUMMARY
from cloister_fl.server.results.report import MODEL
from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints, RunState
from cloister_fl.server.rounds.collector import Collected
from cloister_fl.server.rounds.kept_sums import MOST_BYTES, KeptSums, why_not
from cloister_fl.server.rounds.model_choice import best_round, delivered
from cloister_fl.server.rounds.run import advanced
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.server.rounds.sum_check import is_possible, norm_of
from cloister_fl.study.initial_model import digest_of
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system import cpu

_STATE = "state.safetensors"
_MOST_HEADER = 1 << 24
_MOST_FILES = 1 << 16
_MOST_STATE = 5 * MOST_BYTES + _MOST_HEADER
_NORM = 1e-6
"""How far two computations of a norm may lie apart, by the order of their sums."""


@dataclass(frozen=True)
class RunVerdict:
    """What was found in a run's folder.

    Attributes:
        study, run: hash of the study, and id of the run.
        rounds: how many are done.
        sums: how many sums were computed again from what sites signed.
        discarded, lost: rounds whose sum, and rounds that, gave no model.
        sites: by site, the public key that its signatures were verified with.
        rosters: digests of the rosters that the keys are from.
        has_model_file: whether there was one of a finished run to compare with.
        findings: what does not hold, a sentence each; empty where all does.
    """

    study: str
    run: str
    rounds: int
    sums: int
    discarded: tuple[int, ...]
    lost: tuple[int, ...]
    sites: dict[str, str]
    rosters: tuple[str, ...]
    has_model_file: bool
    findings: tuple[str, ...]


def verify_run(folder: Path) -> RunVerdict:
    """Check the folder of a run.

    Raises:
        FileUnreadable: it is no run, its state cannot be read, or its sums were not kept.
    """
    study, state, sums = _opened(folder)
    check = _Check(study, state, sums)
    findings = tuple(check.rounds())
    if state.best_round != best_round(study, state.figures):
        findings += ("The best model in the state is not the one that its figures name.",)
    model = folder / MODEL
    # Until the summary is there, the model file may be of an earlier round.
    has_model = (folder / SUMMARY).exists() and model.exists()
    if has_model:
        findings += tuple(_model_file(model, study, state))
    return RunVerdict(
        study=study.digest,
        run=state.run,
        rounds=state.completed,
        sums=check.sums,
        discarded=state.discarded,
        lost=tuple(number for number in state.lost if number not in state.discarded),
        sites=dict(sorted(check.sites.items())),
        rosters=tuple(sorted(check.rosters)),
        has_model_file=has_model,
        findings=findings,
    )


def _opened(folder: Path) -> tuple[Study, RunState, KeptSums]:
    checkpoint = folder / CHECKPOINT_FOLDER
    if not (checkpoint / _STATE).is_file():
        raise FileUnreadable(
            f"{folder} is not the folder of a run.",
            why=f"It has no {CHECKPOINT_FOLDER}/{_STATE}.",
            remedy="Name the folder of a run, an audit log or a certificate.",
        )
    _require_bounded(checkpoint)
    checkpoints = Checkpoints(checkpoint)
    try:
        study = study_from_canonical(_study_text(checkpoint / _STATE))
        state, _ = checkpoints.load(study)
    except OSError as error:
        raise FileUnreadable(
            f"The state of the run in {folder} cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a folder that this user can read.",
        ) from None
    except CloisterError as error:
        raise FileUnreadable(
            f"The state of the run in {folder} cannot be read.",
            why=f"A file of it is damaged, or another version of Cloister wrote it ({error.code}).",
            remedy="Ask for a new copy of the run's folder.",
        ) from None
    if state.completed > study.training.rounds:
        raise FileUnreadable(
            f"The state of the run in {folder} counts more rounds than its study has.",
            remedy="Ask for a new copy of the run's folder.",
        )
    if not checkpoints.sums.exists():
        why = why_not(study, len(state.invited), state.model.size)
        raise FileUnreadable(
            f"The run in {folder} has no kept sums.",
            why=f"Its sums were not kept: {why}."
            if why
            else "They were removed, or a version that keeps none began the run.",
            remedy="Verify the audit logs and certificates of the run.",
        )
    return study, state, checkpoints.sums


def _require_bounded(folder: Path) -> None:
    """Refuse a checkpoint with a file that is none, or larger than one can be."""
    for count, path in enumerate(folder.iterdir()):
        about = path.lstat()
        if stat.S_ISDIR(about.st_mode):
            continue
        most = _MOST_STATE if path.name == _STATE else _MOST_HEADER
        if not stat.S_ISREG(about.st_mode) or about.st_size > most or count > _MOST_FILES:
            raise FileUnreadable(
                f"{path.name} is not a file of a checkpoint.",
                why="It is larger than one can be, or not a regular file.",
                remedy="Ask for a new copy of the run's folder.",
            )


def _study_text(path: Path) -> str:
    """The canonical study of a state; empty where there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            return ""
        try:
            return str(json.loads(file.read(length))["__metadata__"]["study"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""


@dataclass
class _Check:
    """The chain of states that is computed again, from round to round."""

    study: Study
    stated: RunState
    kept: KeptSums
    sums: int = 0
    sites: dict[str, str] = field(default_factory=dict)
    rosters: set[str] = field(default_factory=set)
    state: RunState | None = None
    """The computed one; None from where the chain is broken."""

    def rounds(self) -> Iterator[str]:
        """Go through the rounds; what is found, in order."""
        try:
            model = self.kept.initial(self.stated.model.size)
        except FileUnreadable as error:
            yield f"The initial model: {_said(error)}"
        else:
            if digest_of(model) != self.study.training.initial_model:
                yield "The initial model is not the one whose hash the study carries."
            optimizer = OptimizerState.fresh(model.size, self.study.aggregation)
            self.state = RunState(self.stated.run, 0, model, optimizer)
        summed = set(self.stated.summed)
        for number in range(1, self.stated.completed + 1):
            if number in summed:
                yield from self._round(number)
            else:
                self._pass(number)
                if self.kept.has(number):
                    yield f"Round {number} counts as lost, and there is a record of its sum."
        yield from self._end()

    def _round(self, number: int) -> Iterator[str]:
        size = self.stated.model.size
        found: list[str] = []
        collected = None
        try:
            record = self.kept.record(number, sites=len(self.stated.invited), dimension=size)
            collected = self._collected(number, record, found)
        except CloisterError as error:
            found.append(f"Round {number}: {_said(error)}")
        except Exception as error:
            # Whatever a library makes of a hostile file is a finding, and no end of the check.
            what = type(error).__name__
            found.append(f"Round {number}: its record cannot be checked ({what}).")
        yield from found
        if collected is None:
            self.state = None
            return
        self.sums += 1
        if self.state is not None:
            yield from self._step(number, collected)

    def _collected(self, number: int, record: SumRecord, found: list[str]) -> Collected:
        """Return the mean that the sites' messages give; what else does not hold is appended."""
        study, stated, terms = self.study, self.stated, record.terms
        expected = replace(
            terms,
            study=bytes.fromhex(study.digest),
            invited=stated.invited,
            colluders=study.aggregation.colluders,
        )
        if terms != expected or terms.run.partition("/")[0] != stated.run:
            found.append(f"Round {number}: the record is of another run, study or set of sites.")
        roster = self.kept.roster(terms.roster)
        session = sessions.update_session(
            study,
            stated.invited,
            round_number=number,
            attempt=record.attempt,
            model=stated.model if self.state is None else self.state.model,
        )
        if self.state is not None and session.model != record.model:
            found.append(
                f"Round {number}: the model that the sites were sent is not the one that the sums "
                "and the server's steps before it give."
            )
            self.state = None
        session = replace(session, model=record.model)
        aggregate = record.replay(roster, session, threads=cpu.available())
        self.rosters.add(roster.digest.hex())
        for site in aggregate.survivors:
            key = roster.keys[site].hex()
            if self.sites.setdefault(site, key) != key:
                found.append(f"Round {number}: {site} signed with another key than before.")
        return Collected(aggregate.mean(), aggregate.survivors)

    def _step(self, number: int, collected: Collected) -> Iterator[str]:
        assert self.state is not None
        norm = norm_of(collected.mean)
        is_discarded = number in self.stated.discarded
        if is_possible(self.study, number, self.state.model, collected, norm) is is_discarded:
            was = "discarded" if is_discarded else "used"
            yield f"Round {number}: its sum was {was}, against the bound of an honest sum."
        if is_discarded:
            self._pass(number)
            return
        figures = next((one for one in self.stated.figures if one.round == number), None)
        if figures is None:
            yield f"Round {number}: the state has no figures of it."
        elif figures.sites != len(collected.sites) or not np.isclose(
            figures.update_norm, norm, rtol=_NORM, atol=0
        ):
            yield f"Round {number}: the state's figures are of another sum."
        try:
            self.state = advanced(self.state, number, collected.mean, self.study.aggregation)
        except CloisterError as error:
            self.state = None
            yield f"Round {number}: {_said(error)}"
            return
        best = self.stated.best_round == number
        if best and not _are_same(self.state.released, self.stated.best):
            yield f"The best model in the state is not that of round {number}."

    def _pass(self, number: int) -> None:
        """Go on after a round that gave no model."""
        if self.state is not None:
            lost = (*self.state.lost, number)
            self.state = replace(self.state, completed=number, lost=lost)

    def _end(self) -> Iterator[str]:
        found, stated = self.state, self.stated
        if found is None:
            yield "The last model was not compared: the rounds before do not lead to it."
            return
        pairs = {
            "model": (found.model, stated.model),
            "average of the models": (found.average, stated.average),
            "first moment": (found.optimizer.first, stated.optimizer.first),
            "second moment": (found.optimizer.second, stated.optimizer.second),
        }
        for name, (one, other) in pairs.items():
            if not _are_same(one, other):
                yield f"The {name} in the state is not what the sums and the server's steps give."


def _model_file(path: Path, study: Study, state: RunState) -> Iterator[str]:
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > state.model.nbytes + _MOST_HEADER:
            yield f"{path.name} is not a model of the run's size."
            return
        # Compared before the network is built that a study names.
        is_same = _study_text(path) == study.canonical() and _are_same(
            flat_parameters.flatten(load_model(path)[0]), delivered(study, state).model
        )
    except CloisterError as error:
        yield _said(error)
        return
    except OSError as error:
        yield f"{path.name} cannot be read ({error.strerror})."
        return
    if not is_same:
        yield f"{path.name} is not the model to deliver."


def _are_same(one: Vector | None, other: Vector | None) -> bool:
    """Whether two vectors are the same, bit for bit."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _said(error: CloisterError) -> str:
    return " ".join(part for part in (error.what, error.why, f"({error.code})") if part)
