"""Plots of the report: SVG in data URIs, each in both themes.

A plot says in words what it shows, for who does not see it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cloister_fl.metrics.details import CalibrationBin, Point
from cloister_fl.metrics.figures import Estimate, title_of
from cloister_fl.server.results.holdout_details import OfClass
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.study.schema import Study


@dataclass(frozen=True)
class Plot:
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


def over_rounds(
    study: Study, rounds: Sequence[Figures], lost_rounds: Sequence[int], best: int | None = None
) -> list[Plot]:
    """The headline figure and the epsilon spent, by round; none where nothing was measured.

    Args:
        study: of the run.
        rounds: rising.
        lost_rounds: that gave no model.
        best: the round whose model is delivered, where it is another than the last.
    """
    plots = []
    measured = [(row.round, one) for row in rounds if (one := _headline(study, row)) is not None]
    if measured:
        (first_round, first), (last_round, last) = measured[0], measured[-1]
        name = title_of(study.task.headline)
        alt = f"Line chart of {name} by round: {figure_of(first.value)} at round {first_round}, "
        alt += f"{figure_of(last.value)} at round {last_round}"
        alt += f", 95 % interval {figure_of(last.low)} to {figure_of(last.high)}"
        caption = f"{name} of the shared model after each round; the band is the 95 % interval."
        if best is not None:
            alt += f"; the model of round {best} is delivered"
            caption += f" The ring is the model that is delivered, of round {best}."
        if lost_rounds:
            caption += " A dotted upright line is a round that never finished."
        draw = partial(
            _draw_measure,
            name=name, chance=study.task.chance, measured=measured, lost_rounds=lost_rounds,
            best=best,
        )  # fmt: skip
        plots.append(_both(draw, alt + ".", caption))
    charged = [row for row in rounds if row.epsilon is not None]
    if charged and study.privacy.enabled:
        budget = study.privacy.epsilon
        spent = figure_of(charged[-1].epsilon, 2)
        alt = f"Line chart of the epsilon spent, at most, by round: {spent} "
        alt += f"at round {charged[-1].round}, of {budget:g} that the study allows."
        caption = "Privacy spent so far, at most: by a site that began every round. The dashed "
        caption += "line is the most that the study may cost."
        plots.append(_both(partial(_draw_epsilon, charged=charged, budget=budget), alt, caption))
    return plots


def of_class(one: OfClass, chosen: Point | None = None, unit: str = "patient") -> list[Plot]:
    """ROC, precision-recall curve and calibration of a class.

    Args:
        one: the class.
        chosen: the operating point on these curves, or None.
        unit: what has a label of its own.
    """
    (without, having), patients = one.metrics.class_counts, one.metrics.patients
    n = f"{patients} patients, {having} of them with “{one.name}”"
    if unit != "patient":
        n = f"{without + having} {unit}s of {patients} patients, {having} with “{one.name}”"
    told = "" if chosen is None else " The ring is the operating point."
    area, precision = one.metrics.auroc, one.metrics.auprc
    roc = "ROC curve: " + ("not defined" if area is None else f"area {_estimate(area)}")
    pr = "Precision-recall curve: " + (
        "not defined" if precision is None else f"average precision {_estimate(precision)}"
    )
    rate = having / (without + having)
    shown = ", ".join(f"{each.score:.2f}: {each.share.value:.2f}" for each in one.calibration)
    bins = len(one.calibration)
    return [
        _both(
            partial(_draw_roc, points=one.curve, chosen=chosen),
            f"{roc}. {n}.",
            f"{roc}. {n}. The dashed line is chance.{told}",
            "1 - specificity",
        ),
        _both(
            partial(_draw_precision, points=one.curve, chosen=chosen, rate=rate),
            f"{pr}. {n}.",
            f"{pr}. {n}. The dashed line is a model that knows nothing, {rate:.3f}.{told}",
            "Sensitivity (recall)",
        ),
        _both(
            partial(_draw_calibration, bins=one.calibration),
            f"Calibration, mean score and share with the class: {shown}. {n}.",
            f"Calibration: {n}, in {bins} bins of equally many. On the dashed line a score is the "
            "chance that it says; the bars are 95 % intervals.",
            "Mean score",
        ),
    ]


def _estimate(one: Estimate) -> str:
    return f"{one.value:.3f} (95 % interval {one.low:.3f} to {one.high:.3f})"


def figure_of(value: float | None, digits: int = 3) -> str:
    """A figure as the report writes it; n/a for none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def _headline(study: Study, row: Figures) -> Estimate | None:
    return None if row.metrics is None else row.metrics.get(study.task.headline)


def _both(draw: _Draw, alt: str, caption: str, across: str = "Round") -> Plot:
    return Plot(_svg(draw, _LIGHT, across), _svg(draw, _DARK, across), alt, caption)


def _svg(draw: _Draw, theme: _Theme, across: str) -> str:
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
        axes.set_xlabel(across)
        if across == "Round":
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
    best: int | None,
) -> None:
    numbers = [number for number, _ in measured]
    lows, highs = [one.low for _, one in measured], [one.high for _, one in measured]
    axes.fill_between(numbers, lows, highs, color=theme.line, alpha=0.2, linewidth=0)
    _line(axes, theme, numbers, [one.value for _, one in measured])
    delivered = [one.value for number, one in measured if number == best]
    if delivered:
        _ring(axes, theme, best, delivered[0])
    lowest = min(lows)
    if chance is not None:
        axes.axhline(chance, color=theme.faint, linewidth=1, linestyle=_DASHES)
        # Below the line: the curve is above it, if the model learnt anything.
        _label(axes, "chance", (1, chance), theme.faint, ha="right", va="top", xytext=(0, -3))
        lowest = min(lowest, chance - 0.05)
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
    axes.annotate(words, at, color=color, fontsize=10, **place | where)


def _draw_roc(axes: Any, theme: _Theme, points: Sequence[Point], chosen: Point | None) -> None:
    axes.plot([0, 1], [0, 1], color=theme.faint, linewidth=1, linestyle=_DASHES)
    rates = [one.false_positive_rate for one in points]
    axes.plot(rates, [one.sensitivity for one in points], color=theme.line, linewidth=2)
    if chosen is not None:
        _ring(axes, theme, chosen.false_positive_rate, chosen.sensitivity)
    _unit_square(axes, "Sensitivity")


def _draw_precision(
    axes: Any, theme: _Theme, points: Sequence[Point], chosen: Point | None, rate: float
) -> None:
    axes.axhline(rate, color=theme.faint, linewidth=1, linestyle=_DASHES)
    # Each patient with the class counts at the precision of the threshold that reaches it.
    recalls = [one.sensitivity for one in points]
    axes.step(recalls, [one.precision for one in points], color=theme.line, linewidth=2)
    if chosen is not None:
        _ring(axes, theme, chosen.sensitivity, chosen.precision)
    _unit_square(axes, "Precision")


def _draw_calibration(axes: Any, theme: _Theme, bins: Sequence[CalibrationBin]) -> None:
    axes.plot([0, 1], [0, 1], color=theme.faint, linewidth=1, linestyle=_DASHES)
    scores, shares = [one.score for one in bins], [one.share.value for one in bins]
    below = [one.share.value - one.share.low for one in bins]
    above = [one.share.high - one.share.value for one in bins]
    axes.errorbar(scores, shares, (below, above), color=theme.line, fmt="o", markersize=5)
    _unit_square(axes, "Share with the class")


def _unit_square(axes: Any, name: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(name)


def _ring(axes: Any, theme: _Theme, x: float | None, y: float) -> None:
    axes.plot(
        [x], [y], marker="o", markersize=11, markerfacecolor="none",
        markeredgecolor=theme.accent, markeredgewidth=2, linestyle="none",
    )  # fmt: skip
