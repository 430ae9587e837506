"""Summary table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cloister_fl.metrics.figures import CALLED_TOLD, Metrics, title_of
from cloister_fl.server.results.artifacts import METRICS, REPORT
from cloister_fl.server.results.report import ENDED, LAST_MODEL, MODEL, SCORES


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print results, privacy cost, what left each site, and where the files are."""
    console = Console(highlight=False)
    console.print()
    console.print(_results(summary))
    console.print(_sites(summary))
    console.print(f"Model: {summary['model_why']}", markup=False, soft_wrap=True)
    if summary["ended"] != "done":
        whole = " The study's epsilon is that of all its rounds."
        told = ENDED[summary["ended"]] + (whole if summary["epsilon_max"] is not None else "")
        console.print(f"Ended: {told}", markup=False, soft_wrap=True)
    console.print(f"In words: {_in_words(summary)}.", markup=False, soft_wrap=True)
    if "balanced_accuracy" in (summary["metrics_final"] or {}):
        console.print(f"Balanced accuracy: {CALLED_TOLD}", markup=False, soft_wrap=True)
    for warning in summary["warnings"]:
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)
    console.print()
    files = [(MODEL, f"the model of round {summary['model_round']}")]
    if (out / LAST_MODEL).exists():
        files.append((LAST_MODEL, "the last round's"))
    files += [(METRICS, "metrics by round"), (REPORT, "report")]
    if summary["holdout"] is not None:
        files.append((SCORES, "hold-out's scores"))
    for name, what in files:
        console.print(f"  {what:<22} {out / name}", markup=False, soft_wrap=True)


def _results(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"Study {summary['study']}", box=box.SIMPLE, show_header=False)
    headline = summary["headline"]
    before, after = summary["metrics_initial"], summary["metrics_final"]
    if after is not None:
        first = before and before[headline]
        table.add_row(f"{_title(headline)} before training", _figure(first and first["value"]))
        _add(table, after, " after training")
        table.add_row("Patients measured", _patients(after, summary))
        _add_calls(table, summary["holdout"], summary.get("unit", "patient"))
    release = summary["release"]
    if release is not None:
        noised = f" at {release['sites']} sites, noised"
        if release["metrics"] is None:
            table.add_row(f"{_title(headline)}{noised}", "none")
        else:
            _add(table, release["metrics"], noised)
            told = _patients(release["metrics"], summary)
            table.add_row(f"Patients{noised}", told)
        table.add_row("Its epsilon, of the study's", f"{release['epsilon']:g}")
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


def _add(table: Table, metrics: Mapping[str, Any], where: str) -> None:
    """Add a row for each figure, as ``Metrics.to_json`` tells it."""
    for name, one in Metrics.from_json(metrics).figures.items():
        told = "none" if one is None else (
            f"{one.value:.3f} (95 % interval {one.low:.3f} to {one.high:.3f})"
        )  # fmt: skip
        table.add_row(f"{_title(name)}{where}", told)


def _add_calls(table: Table, holdout: Mapping[str, Any] | None, unit: str) -> None:
    """Add what comes of calling at the operating point, each share with its patients."""
    if holdout is None or holdout["operating_point"] is None:
        return
    point = holdout["operating_point"]
    table.add_row(
        "Operating point",
        f"{point['positive']} at {point['threshold']:.4g}, chosen on {point['patients']} other "
        "patients",
    )
    for rate in holdout["calls"]["rates"][:2]:
        one = rate["estimate"]
        of = "" if unit == "patient" else f"{rate['units']} {unit}s of "
        told = "none" if one is None else (
            f"{one['value']:.3f} (95 % interval {one['low']:.3f} to {one['high']:.3f}), "
            f"{of}{rate['patients']} patients"
        )  # fmt: skip
        table.add_row(f"  {rate['name']}", told)


def _patients(metrics: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """How many patients were measured, and how many of them, or of their units, have each label."""
    pairs = zip(summary["strata"], metrics["class_counts"], strict=True)
    images = f", {metrics['images']} images" if metrics["images"] else ""
    unit = summary.get("unit", "patient")
    by = "" if unit == "patient" else f"by {unit}: "
    counts = by + ", ".join(f"{name} {count}" for name, count in pairs)
    return f"{metrics['patients']}{images} ({counts})"


def _title(name: str) -> str:
    title = title_of(name)
    return title[:1].upper() + title[1:]


def _sites(summary: Mapping[str, Any]) -> Table:
    table = Table(title="What left each site", box=box.SIMPLE)
    table.add_column("site")
    table.add_column("epsilon, at most", justify="right")
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
    what = "model updates and counts of patients; no image"
    if private:
        what = "model updates; no image, count or score"
        if summary.get("release") is not None:
            what = "model updates and, once, counts of patients; no image"
    return f"{kind} {what}".strip()


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
