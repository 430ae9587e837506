"""Form of a checkpoint's two texts: what each field must be before a run is resumed from it.

A checkpoint can be damaged, edited, or put together from two. Whatever is not of this form is
refused as a whole: a run that went on from half a state would report figures that nobody measured,
or an epsilon that does not hold.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.study.schema import Study

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Positive = Annotated[int, Field(ge=1, le=2**53)]
_Finite = Annotated[float, Field(allow_inf_nan=False, ge=0)]
_Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
_Id = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _Estimate(_Part):
    value: _Share
    low: _Share
    high: _Share


class _Measured(BaseModel):
    """Metrics; the figures stand beside the counts, under their names."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    __pydantic_extra__: dict[str, _Estimate | None] = Field(init=False)

    patients: _Count
    images: _Count
    class_counts: tuple[_Count, ...]

    def metrics(self, study: Study) -> Metrics:
        """The same as the run knows it.

        Raises:
            ValueError: the figures or classes are not those of the study's task.
        """
        told = self.__pydantic_extra__ or {}
        if set(told) != set(study.task.figures):
            raise ValueError("figures of another task")
        if len(self.class_counts) != len(study.task.strata):
            raise ValueError("classes of another task")
        figures = {
            name: None if one is None else Estimate(one.value, one.low, one.high)
            for name, one in told.items()
        }
        if any(one and not one.low <= one.value <= one.high for one in figures.values()):
            raise ValueError("an interval without its value")
        return Metrics(figures, self.patients, self.class_counts, self.images)


class _Figures(_Part):
    round: _Count
    sites: _Count
    seconds: _Finite
    update_norm: _Finite
    epsilon: _Finite | None
    metrics: _Measured | None
    selecting: _Measured | None


class _Released(_Part):
    asked: tuple[_Id, ...]
    sites: _Count
    noise: _Finite
    metrics: _Measured | None


class StateText(_Part):
    """The state after a round, but for its arrays; see ``checkpoint.RunState``."""

    run: _Id
    completed: _Count
    figures: tuple[_Figures, ...]
    lost: tuple[_Positive, ...]
    discarded: tuple[_Positive, ...]
    invited: tuple[_Id, ...]
    started: dict[_Id, _Count]
    sent: dict[_Id, _Count]
    seconds: _Finite
    release: _Released | None
    best_round: _Count
    ended: Literal["", "stop_after", "kept"]


class ProgressText(_Part):
    """How far the round had come that was last sent out; see ``checkpoint.Progress``."""

    round: _Count
    sites: tuple[_Id, ...]
    answered: dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], tuple[_Id, ...]]


def plain(part: _Figures | _Released, study: Study) -> dict[str, Any]:
    """The fields of a part by name, with its metrics as the run knows them.

    Raises:
        ValueError: see ``_Measured.metrics``.
    """
    measured = {name: value.metrics(study) for name, value in part if isinstance(value, _Measured)}
    return {**dict(part), **measured}


def read_state(text: str, study: Study) -> StateText:
    """Read and check the state of a run of a study.

    Raises:
        ValueError: it is of another form (pydantic's ``ValidationError``), or says what no run of
            the study can have come to.
    """
    told = StateText.model_validate_json(text)
    last, done = study.training.rounds, told.completed
    measured = [figures.round for figures in told.figures]
    if done > last or sorted(set(measured)) != measured or measured[-1:] > [done]:
        raise ValueError("more rounds than the study has, or in no order")
    if sorted(set(told.lost)) != list(told.lost) or told.lost[-1:] > (done,):
        raise ValueError("lost rounds that were not sent")
    if [number for number in told.lost if number in told.discarded] != list(told.discarded):
        raise ValueError("discarded rounds that were not lost")
    if told.best_round and told.best_round not in measured:
        raise ValueError("a best model that was not measured")
    if any(count > last for count in told.started.values()):
        raise ValueError("more rounds sent than the study has")
    return told


def read_progress(text: str, study: Study) -> ProgressText:
    """Read and check what was last sent out in a run of a study.

    Raises:
        ValueError: see ``read_state``.
    """
    told = ProgressText.model_validate_json(text)
    if told.round > study.training.rounds:
        raise ValueError("a round that the study does not have")
    return told
