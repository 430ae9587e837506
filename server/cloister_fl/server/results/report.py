"""The report of a run: one HTML file that a newcomer and a security officer can both read.

The file needs nothing but itself: styles stand in it, plots are SVG in data URIs, there is no
script, and its own Content-Security-Policy forbids the browser to fetch anything. Everything
that came from outside, such as the study's question or a site's name, is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from cloister_fl.metrics.figures import Estimate, Metrics, title_of
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.study.cost import RELEASE_BINS
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.version import __version__

TEMPLATE = "templates/report.html.j2"
MODEL = "model.safetensors"

# Told elsewhere in the report; what else a summary holds is listed as it is.
# fmt: off
_KNOWN = frozenset((
    "secure_aggregation", "study", "study_hash",
    "privacy", "epsilon_max", "epsilon_per_site", "delta", "sites", "site_names", "refused",
    "rounds", "rounds_lost", "rounds_discarded", "seconds", "bytes_sent_per_site", "warnings",
    "release", "headline", "strata", "unit", "metrics_initial", "metrics_final",
))
_HEADLINE = ("initial", "final", "final_interval")
# fmt: on


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
    """

    study: Study
    summary: Mapping[str, object]
    rounds: Sequence[Figures]
    sites: Sequence[SiteRow]
    lost_rounds: Sequence[int]
    warnings: Sequence[str]


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
    environment.filters.update(figure=_figure, size=_size, span=_span, plain=_plain)
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
        "plots": _plots(report, rounds),
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
    row, after = measured[-1] if measured else (None, None)
    if row is None or after is None or row.round == 0:
        return _Result(before, None, None, False, False, "")
    better = before is not None and after.low > before
    above = task.chance is None or after.low > task.chance
    return _Result(before, after, row.metrics, better, above, task.told(after.value))


def _noised(study: Study, release: Any) -> Any:
    """The headline figure of the noised evaluation, as ``summarise`` tells it; None without."""
    return release and release["metrics"] and release["metrics"][study.task.headline]


def _strata(study: Study, counts: Sequence[int]) -> str:
    """How many patients have each label, or how many of what else has one."""
    pairs = zip(study.task.strata, counts, strict=True)
    by = "" if study.task.unit == "patient" else f"by {study.task.unit}, "
    return by + ", ".join(f"{name} {count}" for name, count in pairs)


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


def _figure(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


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


# Plots


@dataclass(frozen=True)
class _Plot:
    """A plot in both themes.

    Attributes:
        light: data URI.
        dark: data URI.
        alt: what it shows, in words and figures.
        caption: how to read it.
    """

    light: str
    dark: str
    alt: str
    caption: str


@dataclass(frozen=True)
class _Theme:
    ink: str
    faint: str
    grid: str
    line: str
    accent: str


_Draw = Callable[[Any, _Theme], None]
_DASHES = (0, (4, 3))

# The same colours as in the template; the ratio to its cards is above 4.5 for ink, faint, lines.
_LIGHT = _Theme("#1d2b33", "#52636d", "#d9e1e5", "#0b6e75", "#a8480f")
_DARK = _Theme("#e6eef1", "#a3b4bd", "#33444e", "#5cc8cf", "#f0a271")


def _plots(report: RunReport, rounds: Sequence[Figures]) -> list[_Plot]:
    plots = []
    measured = [
        (row.round, one) for row in rounds if (one := _headline(report.study, row)) is not None
    ]
    if measured:
        (first_round, first), (last_round, last) = measured[0], measured[-1]
        name = _title(report.study)
        alt = f"Line chart of {name} by round: {_figure(first.value)} at round {first_round}, "
        alt += f"{_figure(last.value)} at round {last_round}"
        alt += f", 95 % interval {_figure(last.low)} to {_figure(last.high)}"
        caption = f"{name} of the shared model after each round; the band is the 95 % interval."
        if report.lost_rounds:
            caption += " A dotted upright line is a round that never finished."
        chance = report.study.task.chance
        draw = partial(
            _draw_measure,
            name=name, chance=chance, measured=measured, lost_rounds=report.lost_rounds,
        )  # fmt: skip
        plots.append(_both(draw, alt + ".", caption))
    charged = [row for row in rounds if row.epsilon is not None]
    if charged and report.study.privacy.enabled:
        budget = report.study.privacy.epsilon
        spent = _figure(charged[-1].epsilon, 2)
        alt = f"Line chart of the epsilon spent, at most, by round: {spent} "
        alt += f"at round {charged[-1].round}, of {budget:g} that the study allows."
        caption = "Privacy spent so far, at most: by a site that began every round. The dashed "
        caption += "line is the most that the study may cost."
        plots.append(_both(partial(_draw_epsilon, charged=charged, budget=budget), alt, caption))
    return plots


def _both(draw: _Draw, alt: str, caption: str) -> _Plot:
    return _Plot(_svg(draw, _LIGHT), _svg(draw, _DARK), alt, caption)


def _svg(draw: _Draw, theme: _Theme) -> str:
    """Draw in one theme; return a data URI. Figure without pyplot: no global state, no display."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {
        "svg.hashsalt": "cloister",  # the same run gives the same bytes
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.2, 3.1))
        # Fixed, for to find room by drawing twice is half of the time that a short run takes here.
        figure.subplots_adjust(left=0.13, right=0.97, bottom=0.155, top=0.96)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(theme.faint)
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
        draw(axes, theme)
        axes.set_xlabel("Round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        out = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _draw_measure(
    axes: Any,
    theme: _Theme,
    name: str,
    chance: float | None,
    measured: Sequence[tuple[int, Estimate]],
    lost_rounds: Sequence[int],
) -> None:
    numbers = [number for number, _ in measured]
    lows, highs = [one.low for _, one in measured], [one.high for _, one in measured]
    axes.fill_between(numbers, lows, highs, color=theme.line, alpha=0.2, linewidth=0)
    _line(axes, theme, numbers, [one.value for _, one in measured])
    lowest = min(lows)
    if chance is not None:
        axes.axhline(chance, color=theme.faint, linewidth=1, linestyle=_DASHES)
        _label(axes, "chance", (1, chance), theme.faint, ha="right", xytext=(0, 3))
        lowest = min(lowest, chance)
    for lost in lost_rounds:
        axes.axvline(lost, color=theme.accent, linewidth=1, linestyle=":")
    axes.set_ylim(max(0.0, lowest - 0.05), 1.0)
    axes.set_ylabel(name)


def _draw_epsilon(axes: Any, theme: _Theme, charged: Sequence[Figures], budget: float) -> None:
    spent = [row.epsilon for row in charged if row.epsilon is not None]
    _line(axes, theme, [row.round for row in charged], spent)
    axes.axhline(budget, color=theme.accent, linewidth=1.5, linestyle=_DASHES)
    words = f"the study's limit, {budget:g}"
    _label(axes, words, (0, budget), theme.accent, ha="left", xytext=(4, 3))
    axes.set_ylim(0, 1.18 * max(budget, *spent))
    axes.set_ylabel("Epsilon spent, at most")


def _line(axes: Any, theme: _Theme, numbers: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(numbers, values, color=theme.line, linewidth=2, marker="o", markersize=4)


def _label(axes: Any, words: str, at: tuple[float, float], color: str, **where: Any) -> None:
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "bottom"}
    axes.annotate(words, at, color=color, fontsize=10, **place, **where)
