"""Which model a run hands out: the best on patients who are not reported, or the last.

A run that goes too far delivers its worst model where only the last one counts. Who chooses must
not be who is reported, so a model is chosen on the selecting part of a divided hold-out alone
(``tasks.divided_holdout``); without one there is nothing to choose by, and the last model is it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cloister_fl.errors import OptionInvalid
from cloister_fl.metrics.figures import Metrics, title_of
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.server.rounds.checkpoint import Figures, RunState
from cloister_fl.study.schema import Study
from cloister_fl.tasks.divided_holdout import Holdout


@dataclass(frozen=True)
class Delivered:
    """The model that a run hands out.

    Attributes:
        model: flat, (D,).
        figures: of the round that gave it.
        why: why this one, a sentence for people.
    """

    model: Vector
    figures: Figures
    why: str


def chosen(study: Study, state: RunState) -> RunState:
    """The state, its best model replaced by the newest where that is better.

    A model must be better than all before it. The initial model is no candidate: nobody trained it.
    """
    best = best_round(study, state.figures)
    if best == state.best_round:
        return state
    return replace(state, best=state.released, best_round=best)


def best_round(study: Study, figures: Sequence[Figures]) -> int:
    """The round of the best model by the patients who choose; 0 for none.

    By the headline; of equals by the figures that follow it, of equals in all the first.
    """
    best, highest = 0, tuple[float, ...]()
    for one in figures:
        values = _values(study, one)
        if one.round and values > highest:
            best, highest = one.round, values
    return best


def require_who_chooses(study: Study, holdout: Holdout | None) -> None:
    """Refuse a study that stops by a hold-out where there is none that can choose.

    Raises:
        OptionInvalid: see above.
    """
    if not study.evaluation.stop_after:
        return
    if holdout is None:
        raise OptionInvalid(
            "The study's evaluation.stop_after needs a hold-out, and none was named.",
            why="Whether a model is better is asked of patients that belong to no site.",
            remedy="Name one (--holdout, holdout=), or take stop_after out of the study.",
        )
    if not holdout.is_divided:
        raise OptionInvalid(
            "The study's evaluation.stop_after needs a hold-out with two patients of each label.",
            why="Half of them choose, the others are reported; here a label has a single patient.",
            remedy="Add patients to it, or take stop_after out of the study.",
        )


def is_stalled(study: Study, state: RunState) -> bool:
    """Whether the study's ``stop_after`` evaluations passed without a better model."""
    patience = study.evaluation.stop_after
    if not patience or not state.best_round:
        return False
    after = [
        one for one in state.figures if one.round > state.best_round and one.selecting is not None
    ]
    return len(after) >= patience


def delivered(study: Study, state: RunState) -> Delivered:
    """The model that a run hands out, with what it has by now."""
    last = state.figures[-1]
    if state.best is None or not state.best_round:
        return Delivered(state.released, last, _why_last(study, state))
    best = _figures(state, state.best_round)
    name, value = title_of(study.task.headline), _value(study, best)
    counted = best.selecting.patients if best.selecting else 0
    measured = sum(one.selecting is not None and one.round > 0 for one in state.figures)
    which = "the last one" if state.best_round == last.round else f"that of round {best.round}"
    why = (
        f"Of {measured} measured models, {which} had the best {name} ({value:.3f}) on the "
        f"{counted} patients of the hold-out that choose; none of them is in the figures here."
    )
    return Delivered(state.best, best, why)


def _why_last(study: Study, state: RunState) -> str:
    if all(one.selecting is None for one in state.figures):
        if any(one.metrics is not None for one in state.figures) and study.privacy.enabled:
            return (
                "The last model: the hold-out is not divided, since a label has a single patient, "
                "so there is nobody to choose by."
            )
        return "The last model: without a divided hold-out there is nobody to choose by."
    return "The last model: no other one was measured on the patients who choose."


def _figures(state: RunState, number: int) -> Figures:
    return next(one for one in state.figures if one.round == number)


def _values(study: Study, figures: Figures) -> tuple[float, ...]:
    """The figures that choose, the headline first; none where that is not defined."""
    if _value(study, figures) is None or figures.selecting is None:
        return ()
    told = [figures.selecting.get(name) for name in study.task.figures]
    return tuple(-1.0 if one is None else one.value for one in told)


def _value(study: Study, figures: Figures) -> float | None:
    metrics: Metrics | None = figures.selecting
    estimate = None if metrics is None else metrics.get(study.task.headline)
    return None if estimate is None else estimate.value
