"""The report of a run: one HTML file that a newcomer and a security officer can both read.

The file needs nothing but itself: styles stand in it, plots are SVG in data URIs, there is no
script, and its own Content-Security-Policy forbids the browser to fetch anything. Everything
that came from outside, such as the study's question or a site's name, is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from cloister_fl.metrics.figures import Estimate, Metrics, title_of
from cloister_fl.server.results.holdout_details import Details
from cloister_fl.server.results.report_plots import Plot, figure_of, of_class, over_rounds
from cloister_fl.server.rounds.checkpoint import ENDED_KEPT, ENDED_STALLED, Figures
from cloister_fl.study.cost import RELEASE_BINS
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.system.text import counted
from cloister_fl.tasks.divided_holdout import Part
from cloister_fl.version import __version__

TEMPLATE = "templates/report.html.j2"
MODEL = "model.safetensors"
LAST_MODEL = "last-model.safetensors"
"""The model of the last round, where another one is delivered."""
SCORES = "holdout-scores.csv"

# Told elsewhere in the report; what else a summary holds is listed as it is.
# fmt: off
_KNOWN = frozenset((
    "secure_aggregation", "study", "study_hash",
    "privacy", "epsilon_max", "epsilon_per_site", "delta", "sites", "site_names", "refused",
    "rounds", "rounds_lost", "rounds_discarded", "seconds", "bytes_sent_per_site", "warnings",
    "release", "headline", "strata", "unit", "metrics_initial", "metrics_final",
    "model_why", "model_round", "holdout", "ended",
))
_HEADLINE = ("initial", "final", "final_interval")
# fmt: on

ENDED = {
    ENDED_STALLED: "before its last round: as many evaluations in a row as the study's "
    "evaluation.stop_after says brought no better model.",
    ENDED_KEPT: "before its last round, since a person stopped it and kept what it had.",
}
"""How a run ended that did not come to its last round, in words."""


@dataclass(frozen=True)
class SiteRow:
    """One site's part.

    Attributes:
        name: the site's name in the federation.
        rounds: rounds that were sent to it, and thus charged there.
        bytes_sent: bytes of payload that left it.
        epsilon: what the study cost a patient there, at the study's delta.
        refused: in words, why it refused; ``None`` where it did not.
    """

    name: str
    rounds: int
    bytes_sent: int
    epsilon: float | None
    refused: str | None


@dataclass(frozen=True)
class RunReport:
    """What a report tells.

    Attributes:
        study: what was trained.
        summary: facts about the run, as ``artifacts.summarise`` gives them. Read of it are
            ``secure_aggregation`` (bool; off unless it says True), ``seconds`` (of the whole run)
            and ``release``. What the rows tell is left out; the rest is listed as it is.
        rounds: the models; the initial one has round 0.
        sites: in any order; they are sorted by name.
        lost_rounds: rounds that were sent, and charged, but never finished.
        warnings: sentences that a reader must not miss.
        details: what the delivered model says of a hold-out; None without one.
    """

    study: Study
    summary: Mapping[str, object]
    rounds: Sequence[Figures]
    sites: Sequence[SiteRow]
    lost_rounds: Sequence[int]
    warnings: Sequence[str]
    details: Details | None = None


def write_report(path: Path, report: RunReport) -> None:
    """Write the report whole, replacing an older one.

    Raises:
        OutputInTheWay: the file cannot be written.
    """
    write_atomic(path, render(report).encode(), mode=0o644)


def render(report: RunReport) -> str:
    """Return the report's HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        figure=figure_of, size=_size, span=_span, plain=_plain, measured=_measured
    )
    source = files("cloister_fl.server.results").joinpath(TEMPLATE).read_text("utf-8")
    return environment.from_string(source).render(_context(report))


def _context(report: RunReport) -> dict[str, Any]:
    study, summary = report.study, report.summary
    rounds = sorted(report.rounds, key=lambda row: row.round)
    sites = sorted(report.sites, key=lambda row: row.name)
    known = {*_KNOWN, *(f"{study.task.headline}_{end}" for end in _HEADLINE)}
    seconds = summary.get("seconds")
    spent = [row.epsilon for row in sites if row.epsilon is not None]
    spent += [row.epsilon for row in rounds if row.epsilon is not None]
    return {
        "version": __version__,
        "study": study,
        "task": study.task,
        "measure": _title(study),
        "titles": {name: title_of(name) for name in study.task.figures},
        "settings": list(_flat(json.loads(study.canonical()))),
        "result": _result(report, rounds),
        "masked": summary.get("secure_aggregation") is True,
        "release": summary.get("release"),
        "noised": _noised(study, summary.get("release")),
        "strata": partial(_strata, study),
        "release_bins": RELEASE_BINS,
        "model": MODEL,
        "predict": f"cloister predict {MODEL} FOLDER --out "
        + ("scores.csv" if study.task.columns else "masks"),
        "extra": [(key, value) for key, value in summary.items() if key not in known],
        "rounds": rounds,
        "trained": sum(row.round > 0 for row in rounds),
        "sites": sites,
        "contributed": [row for row in sites if row.refused is None],
        "refused": [row for row in sites if row.refused is not None],
        "bytes": sum(row.bytes_sent for row in sites),
        "seconds": seconds if isinstance(seconds, int | float) else sum(r.seconds for r in rounds),
        "lost": sorted(report.lost_rounds),
        "warnings": list(report.warnings),
        "epsilon": max(spent, default=None),
        "odds": _odds(max(spent)) if spent and study.privacy.enabled else None,
        "plots": over_rounds(study, rounds, report.lost_rounds, _best(report, rounds)),
        "details": report.details,
        "units": f"{study.task.unit.capitalize()}s",
        "one_unit": {"patient": "A patient"}.get(study.task.unit, f"An {study.task.unit}"),
        "holdout_plots": _holdout_plots(report.details, study.task.unit),
        "why": summary.get("model_why"),
        "ended": ENDED.get(str(summary.get("ended"))),
        "delivered": summary.get("model_round"),
        "scores": SCORES,
        "last_model": LAST_MODEL if _best(report, rounds) is not None else None,
    }


@dataclass(frozen=True)
class _Result:
    """The verdict: the headline figure of the first and the last model that were measured."""

    before: float | None
    after: Estimate | None
    metrics: Metrics | None
    better: bool
    above_chance: bool
    in_words: str


def _headline(study: Study, row: Figures) -> Estimate | None:
    return None if row.metrics is None else row.metrics.get(study.task.headline)


def _result(report: RunReport, rounds: Sequence[Figures]) -> _Result:
    task = report.study.task
    measured = [(row, one) for row in rounds if (one := _headline(report.study, row)) is not None]
    before = next((one.value for row, one in measured if row.round == 0), None)
    number = report.summary.get("model_round")
    of_model = [pair for pair in measured if pair[0].round == number] or measured[-1:]
    row, after = of_model[0] if of_model else (None, None)
    if row is None or after is None or row.round == 0:
        return _Result(before, None, None, False, False, "")
    better = before is not None and after.low > before
    above = task.chance is None or after.low > task.chance
    return _Result(before, after, row.metrics, better, above, task.told(after.value))


def _best(report: RunReport, rounds: Sequence[Figures]) -> int | None:
    """The round whose model is delivered, where it is not the last one."""
    number = report.summary.get("model_round")
    return number if isinstance(number, int) and number != rounds[-1].round else None


def _holdout_plots(details: Details | None, unit: str) -> list[Plot]:
    if details is None:
        return []
    made = details.calls
    is_chosen = made is not None and details.operating_point is not None
    chosen = made.point if made is not None and is_chosen else None
    return [plot for one in details.classes for plot in of_class(one, chosen, unit)]


def _noised(study: Study, release: Any) -> Any:
    """The headline figure of the noised evaluation, as ``summarise`` tells it; None without."""
    return release and release["metrics"] and release["metrics"][study.task.headline]


def _strata(study: Study, counts: Sequence[int]) -> str:
    """How many patients have each label, or how many of what else has one."""
    pairs = zip(study.task.strata, counts, strict=True)
    by = "" if study.task.unit == "patient" else f"by {study.task.unit}, "
    return by + ", ".join(f"{name} {count}" for name, count in pairs)


def _measured(of: Metrics | Part) -> str:
    """How many patients and images, in words."""
    told = counted(of.patients, "patient")
    return f"{told} with {counted(of.images, 'image')}" if of.images else told


def _title(study: Study) -> str:
    return title_of(study.task.headline)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows.extend(_flat(value, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", _plain(value)))
    return rows


def _plain(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("e-0", "e-")
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _odds(epsilon: float) -> str:
    """The factor e^epsilon, as words: two digits are all that a reader needs."""
    if epsilon > 11.5:
        return "more than 100,000"
    factor = math.exp(epsilon)
    return f"{factor:.2f}" if factor < 10 else f"{float(f'{factor:.2g}'):,.0f}"
