"""Result of a finished run, read from the files that the run wrote."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.errors import FileUnreadable
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.metrics import Estimate, Metrics


def _is_number(value: Any) -> bool:
    given = isinstance(value, int | float) and not isinstance(value, bool)
    return given and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_cost(value: Any) -> bool:
    return value is None or _is_number(value)


def _are_sentences(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_SUMMARY: Mapping[str, Callable[[Any], bool]] = {
    "epsilon_max": _is_cost,
    "headline": lambda value: isinstance(value, str),
    "metrics_final": lambda value: value is None or isinstance(value, dict),
    "release": lambda value: value is None or isinstance(value, dict),
    "rounds": _is_count,
    "sites": _is_count,
    "warnings": _are_sentences,
}
"""The keys of the summary that are read here, and what each may be."""

_ROUND: Mapping[str, Callable[[Any], bool]] = {
    "round": _is_count,
    "metrics": lambda value: value is None or isinstance(value, dict),
    "epsilon": _is_cost,
    "sites": _is_count,
    "seconds": _is_number,
    "update_norm": _is_number,
}
"""The keys of a row of ``metrics.jsonl``, likewise."""


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
    """Return a row of ``metrics.jsonl``, the fields of ``checkpoint.Figures``, as a round.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    _judge(row, _ROUND)
    return Round(
        number=row["round"],
        metrics=_metrics(row["metrics"]),
        epsilon=row["epsilon"],
        sites=row["sites"],
        seconds=row["seconds"],
        update_norm=row["update_norm"],
    )


def _judge(told: Mapping[str, Any], rules: Mapping[str, Callable[[Any], bool]]) -> None:
    for key, is_right in rules.items():
        if not is_right(told[key]):
            raise ValueError(f"{key} is not what a run writes")


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


@dataclass(frozen=True, repr=False)
class Result:
    """What a run gave: figures, privacy cost, and the files in its folder.

    Attributes:
        folder: the folder of the run.
        summary: the object in ``summary.json``, whole. Its keys are stable: ``study``,
            ``study_hash``, ``run``; ``headline``, the name of the figure that is told first, and
            under its name with _initial, _final and _final_interval behind it that figure;
            ``metrics_initial``, ``metrics_final`` of the delivered model, ``strata``, what a label
            may be, and ``unit``, what has one; ``model_round`` and ``model_why``, which model is
            delivered; ``holdout``, how its patients were divided, the operating point, curves,
            calibration, calls and groups; ``ended``, ``done``, ``stop_after`` or ``kept``;
            ``release``, the noised evaluation; ``privacy``, ``epsilon_max``,
            ``epsilon_per_site``, ``delta``; ``sites``, ``site_names``, ``refused``; ``rounds``,
            ``rounds_lost``, ``rounds_discarded``, ``seconds``; ``secure_aggregation``,
            ``sums``, whether they are kept for ``cloister verify``, or why not;
            ``bytes_sent_per_site``; ``warnings``.
        rounds: every round that was measured, the untrained model first.
    """

    folder: Path
    summary: Mapping[str, Any]
    rounds: tuple[Round, ...]

    @property
    def metrics(self) -> Metrics | None:
        """What the delivered model was measured to do; None where it was not measured."""
        return _metrics(self.summary["metrics_final"])

    @property
    def _patients(self) -> str:
        metrics = self.metrics
        assert metrics is not None
        images = f", {counted(metrics.images, 'image')}" if metrics.images else ""
        pairs = zip(self.summary["strata"], metrics.class_counts, strict=True)
        return f"{metrics.patients}{images} ({', '.join(f'{name} {n}' for name, n in pairs)})"

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

    def __repr__(self) -> str:
        return f"<Result in {str(self.folder)!r}: {self}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: figures, privacy cost, warnings, and where the report is."""
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(told)}</td></tr>"
            for name, told in self._rows()
        )
        notes = "".join(f"<li>{html.escape(one)}</li>" for one in self.warnings)
        return f"<table>{rows}</table><ul>{notes}</ul>" if notes else f"<table>{rows}</table>"

    def _rows(self) -> Iterator[tuple[str, str]]:
        from cloister_fl.metrics import title_of

        for name, one in (self.metrics.figures if self.metrics else {}).items():
            told = "none" if one is None else (
                f"{one.value:.3f} (95 % interval {one.low:.3f} to {one.high:.3f})"
            )  # fmt: skip
            yield title_of(name), told
        if self.metrics is not None:
            yield "patients measured", self._patients
        yield "privacy", "none" if self.epsilon is None else f"epsilon {self.epsilon:.2f} at most"
        yield "rounds", str(self.summary["rounds"])
        yield "sites", str(self.summary["sites"])
        yield "report", str(self.report)


def read_result(folder: StrPath) -> Result:
    """Return the result of a run that has finished, from the run's folder.

    Args:
        folder: the folder that ``simulate`` or ``cloister simulate`` was given for the run.

    Raises:
        FileUnreadable: no finished run is there, or its files are not what a run writes.
        OptionInvalid: it is no path.
    """
    path = arguments.path("folder", folder)
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
        rows = (path / "metrics.jsonl").read_text("utf-8").splitlines()
        rounds = tuple(round_of(json.loads(row)) for row in rows)
        _judge(summary, _SUMMARY)
        # Read now, so that a property of the result raises nothing later.
        _metrics((summary["release"] or {}).get("metrics"))
        if not rounds:
            raise ValueError("a run has a model before its first round")
        _refuse_headline(summary["headline"], _metrics(summary["metrics_final"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise FileUnreadable(
            f"{path} has no finished run.",
            why="summary.json or metrics.jsonl is missing or cannot be read.",
            remedy="Name the folder of a run that has finished, or resume the run.",
        ) from None
    return Result(path, summary, rounds)


def _refuse_headline(name: str, measured: Metrics | None) -> None:
    from cloister_fl.metrics import title_of

    title_of(name)
    if measured is not None and name not in measured.figures:
        raise ValueError("the headline is no figure of the run")
