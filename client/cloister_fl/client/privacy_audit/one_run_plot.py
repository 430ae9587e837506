"""Plot of a one-run audit: scores, ROC curve, and the epsilons side by side."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.one_run import OneRunAudit
from cloister_fl.client.privacy_audit.one_run_text import verdict
from cloister_fl.planning.plan_output import kind_of_plot
from cloister_fl.system.files import write_atomic

_INK, _FAINT, _GRID, _LINE, _ACCENT = "#1d2b33", "#52636d", "#d9e1e5", "#0b6e75", "#a8480f"
_PALE = "#b9c6cd"


def write_plot(found: OneRunAudit, path: Path) -> None:
    """Draw an audit; an older file is replaced. Mode 0600: it was computed from patients.

    Raises:
        OptionInvalid: the file's name ends in neither .png nor .svg.
        OutputInTheWay: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = kind_of_plot(path)
    with mpl.rc_context({"svg.hashsalt": "cloister", "font.size": 10, "text.color": _INK}):
        # Figure without pyplot: no global state, no display.
        figure = Figure(figsize=(11.5, 4.4), layout="constrained", dpi=150)
        scores, told, epsilons = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
        for axes in (scores, told, epsilons):
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_GRID)
            axes.tick_params(length=0, colors=_FAINT)
        _draw_scores(scores, found)
        _draw_roc(told, found)
        _draw_epsilons(epsilons, found)
        figure.suptitle(verdict(found), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(
            "A lower bound, never evidence of privacy. Computed from this site's patients without "
            "noise: keep it here.",
            fontsize=9,
            color=_FAINT,
        )
        out = io.BytesIO()
        nothing = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(out, format=kind, metadata=nothing)
    write_atomic(path, out.getvalue())


def roc(found: OneRunAudit) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates of "there" at every threshold, from (0, 0) to (1, 1)."""
    scores, present = np.array(found.scores), np.array(found.present)
    order = np.argsort(-scores, kind="stable")
    # Equal scores are guessed together.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    rates = []
    for kind in (~present, present):
        risen = np.cumsum(kind[order])[ends]
        rates.append(np.concatenate([[0.0], risen / max(int(kind.sum()), 1)]))
    return rates[0], rates[1]


def allowed(found: OneRunAudit, false: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest true positive rate that the claim allows on one patient (Kairouz et al. 2015)."""
    grown = np.exp(min(found.claimed_epsilon, 700.0))
    most: NDArray[np.float64] = np.clip(
        np.minimum(grown * false + found.delta, 1 - (1 - found.delta - false) / grown), 0, 1
    )
    return most


def _draw_scores(axes: Any, found: OneRunAudit) -> None:
    from matplotlib.ticker import MaxNLocator

    scores, present = np.array(found.scores), np.array(found.present)
    reach = float(np.abs(scores).max(initial=1e-9))
    bins = np.linspace(-reach, reach, 25).tolist()
    for which, colour, word in ((~present, _ACCENT, "left out"), (present, _LINE, "trained on")):
        axes.hist(
            scores[which], bins, histtype="stepfilled", facecolor=colour + "40", edgecolor=colour,
            linewidth=1.5, label=f"{word} ({int(which.sum())})",
        )  # fmt: skip
    axes.axvline(0, ymax=0.87, color=_FAINT, linewidth=1, linestyle=":")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9, columnspacing=1.2)
    axes.set_title("What the adversary saw of each canary", fontsize=10.5, loc="left")
    axes.set_xlabel("Score: above 0 is guessed as trained on", color=_INK)
    axes.set_ylabel("Patients", color=_INK)


def _draw_roc(axes: Any, found: OneRunAudit) -> None:
    false, true = roc(found)
    grid = np.linspace(0, 1, 401)
    most = allowed(found, grid)
    axes.fill_between(grid, most, 1, color=_ACCENT, alpha=0.12, linewidth=0)
    axes.plot(
        grid,
        most,
        color=_ACCENT,
        linewidth=1.5,
        linestyle=(0, (4, 3)),
        label="most the claim allows",
    )
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle=":", label="guessing blindly")
    axes.plot(false, true, color=_LINE, linewidth=2, label="this audit")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.set_title("How well the scores tell them apart", fontsize=10.5, loc="left")
    axes.set_xlabel("False positive rate", color=_INK)
    axes.set_ylabel("True positive rate", color=_INK)


def _draw_epsilons(axes: Any, found: OneRunAudit) -> None:
    lines = (
        ("claimed", found.claimed_epsilon, _FAINT),
        (f"audited, at least\n({found.confidence:.0%} confidence)", found.audited_epsilon, _LINE),
        ("had every\nguess been right", found.most_epsilon, _PALE),
    )
    for place, (_, value, colour) in enumerate(lines):
        axes.barh(place, value, height=0.5, color=colour)
        axes.annotate(
            f"{value:.2f}", (value, place), xytext=(6, 0), textcoords="offset points", va="center",
            # The line of the claim may run behind a figure.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    axes.axvline(
        found.claimed_epsilon, color=_ACCENT, linewidth=1.5, linestyle=(0, (4, 3)), zorder=0
    )
    axes.set_xlim(0, max(value for _, value, _ in lines) * 1.2 + 1e-3)
    axes.set_yticks(range(len(lines)), [word for word, _, _ in lines], color=_INK)
    axes.invert_yaxis()
    axes.set_title("How much the guesses show", fontsize=10.5, loc="left")
    axes.set_xlabel(f"Epsilon at delta {found.delta:g}", color=_INK)
