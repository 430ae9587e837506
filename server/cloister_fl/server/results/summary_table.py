"""Summary table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cloister_fl.server.results.artifacts import METRICS, MODEL, REPORT


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print results, privacy cost, what left each site, and where the files are."""
    console = Console(highlight=False)
    console.print()
    console.print(_results(summary))
    console.print(_sites(summary))
    console.print(f"In words: {_in_words(summary)}.", markup=False, soft_wrap=True)
    for warning in summary["warnings"]:
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)
    console.print()
    for name, what in ((MODEL, "the model"), (METRICS, "metrics by round"), (REPORT, "report")):
        console.print(f"  {what:<17} {out / name}", markup=False, soft_wrap=True)


def _results(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"Study {summary['study']}", box=box.SIMPLE, show_header=False)
    for measure in ("AUROC", "Dice"):
        key = measure.lower()
        before, after = summary.get(f"{key}_initial"), summary.get(f"{key}_final")
        if after is not None:
            low, high = summary[f"{key}_final_interval"]
            table.add_row(f"{measure} before training", _figure(before))
            table.add_row(
                f"{measure} after training", f"{after:.3f} (95 % interval {low:.3f} to {high:.3f})"
            )
    release = summary.get("release")
    if release is not None:
        auroc = release["auroc"]
        table.add_row(
            f"AUROC at {release['sites']} sites, noised",
            "none"
            if auroc is None
            else f"{auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}; "
            f"epsilon {release['epsilon']:g} of the study's)",
        )
    if summary["epsilon_max"] is not None:
        table.add_row(
            "Privacy",
            f"patient-level, epsilon {summary['epsilon_max']:.2f} at delta {summary['delta']:g}, "
            "at most, at any site",
        )
    else:
        table.add_row("Privacy", "none")
    table.add_row("Secure aggregation", "on" if summary["secure_aggregation"] else "off")
    lost = len(summary["rounds_lost"])
    rounds = summary["rounds"]
    table.add_row("Rounds", f"{rounds - lost} of {rounds}" if lost else str(rounds))
    table.add_row("Seconds", f"{summary['seconds']:.0f}")
    return table


def _sites(summary: Mapping[str, Any]) -> Table:
    table = Table(title="What left each site", box=box.SIMPLE)
    table.add_column("site")
    table.add_column("epsilon spent", justify="right")
    table.add_column("bytes", justify="right")
    for name, count in summary["bytes_sent_per_site"].items():
        epsilon = summary["epsilon_per_site"].get(name)
        table.add_row(name, _figure(epsilon, 2), f"{count:,}")
    return table


def _in_words(summary: Mapping[str, Any]) -> str:
    private, secure = summary["epsilon_max"] is not None, summary["secure_aggregation"]
    kind = " and ".join(
        word for word, on in (("noised", private), ("securely aggregated", secure)) if on
    )
    counts = "Dice" if "dice_final" in summary else "score"
    what = f"model updates and {counts} histograms; no image"
    if private:
        what = "model updates; no image, count or score"
        if summary.get("release") is not None:
            what = "model updates and, once, score histograms; no image"
    return f"{kind} {what}".strip()


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
