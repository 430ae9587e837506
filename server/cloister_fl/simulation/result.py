"""Result of a finished run, read from the files that the run wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.errors import FileUnreadable
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.metrics import Estimate, Metrics

_KEYS = {"epsilon_max", "headline", "release", "rounds", "sites", "warnings"}


@dataclass(frozen=True)
class Round:
    """The model after a round; the one before the first round has the number 0.

    Attributes:
        number: of the round, from 0.
        metrics: what the model was measured to do, and on how many patients; None where it was
            not measured.
        epsilon: upper bound on what the rounds so far cost a patient of a site that took part in
            all; None where privacy is off.
        sites: how many sites are in the round's sum; 0 before the first.
        seconds: wall time of the round.
        update_norm: L2 norm of the change of the model; 0 before the first.
    """

    number: int
    metrics: Metrics | None
    epsilon: float | None
    sites: int
    seconds: float
    update_norm: float

    def __str__(self) -> str:
        name = f"round {self.number}" if self.number else "before training"
        told = _told(self.metrics)
        told += [f"epsilon {self.epsilon:.2f}"] if self.epsilon is not None else []
        return f"{name}: {', '.join(told)}" if told else name


def round_of(row: Mapping[str, Any]) -> Round:
    """Return a row of ``metrics.jsonl``, the fields of ``checkpoint.Figures``, as a round."""
    return Round(
        number=row["round"],
        metrics=_metrics(row["metrics"]),
        epsilon=row["epsilon"],
        sites=row["sites"],
        seconds=row["seconds"],
        update_norm=row["update_norm"],
    )


def _metrics(told: Mapping[str, Any] | None) -> Metrics | None:
    # Late: the module is imported also where numpy is not installed.
    from cloister_fl.metrics import Metrics

    return None if told is None else Metrics.from_json(told)


def _told(metrics: Metrics | None) -> list[str]:
    from cloister_fl.metrics import title_of

    if metrics is None:
        return []
    return [
        f"{title_of(name)} {one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
        for name, one in metrics.figures.items()
        if one is not None
    ]


@dataclass(frozen=True)
class Result:
    """What a run gave: figures, privacy cost, and the files in its folder.

    Attributes:
        folder: the folder of the run.
        summary: the object in ``summary.json``, whole; its keys are stable.
        rounds: every round that was measured, the untrained model first.
    """

    folder: Path
    summary: Mapping[str, Any] = field(repr=False)
    rounds: tuple[Round, ...] = field(repr=False)

    @property
    def metrics(self) -> Metrics | None:
        """What the trained model was measured to do; None where it was not measured."""
        return self.rounds[-1].metrics

    @property
    def noised_metrics(self) -> Metrics | None:
        """What the study's noised evaluation on the sites' own patients gave; None without one."""
        return _metrics((self.summary["release"] or {}).get("metrics"))

    @property
    def headline(self) -> Estimate | None:
        """The figure of the task that is told first, such as the AUROC; None if not measured."""
        return None if self.metrics is None else self.metrics.get(self.summary["headline"])

    @property
    def epsilon(self) -> float | None:
        """What the run cost a patient at most, at any site; None where privacy is off."""
        epsilon: float | None = self.summary["epsilon_max"]
        return epsilon

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the figures must know, in sentences."""
        return tuple(self.summary["warnings"])

    @property
    def model(self) -> Path:
        """The file of the trained model, for ``predict`` and ``load_model``."""
        return self.folder / "model.safetensors"

    @property
    def report(self) -> Path:
        """The file of the report, an HTML page."""
        return self.folder / "report.html"

    def __str__(self) -> str:
        cost = "no privacy" if self.epsilon is None else f"epsilon {self.epsilon:.2f}"
        rounds, sites = (
            counted(self.summary[key], key.removesuffix("s")) for key in ("rounds", "sites")
        )
        told = _told(self.metrics) or ["not measured"]
        return ", ".join((*told, cost, f"{rounds} at {sites}"))


def read_result(folder: str | os.PathLike[str]) -> Result:
    """Return the result of a run that has finished, from the run's folder.

    Args:
        folder: the folder that ``simulate`` or ``cloister simulate`` was given for the run.

    Raises:
        FileUnreadable: no finished run is there.
    """
    path = Path(folder)
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
        rows = (path / "metrics.jsonl").read_text("utf-8").splitlines()
        rounds = tuple(round_of(json.loads(row)) for row in rows)
        if not rounds or not summary.keys() >= _KEYS:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FileUnreadable(
            f"{path} has no finished run.",
            why="summary.json or metrics.jsonl is missing or cannot be read.",
            remedy="Name the folder of a run that has finished, or resume the run.",
        ) from None
    return Result(path, summary, rounds)
