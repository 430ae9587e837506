"""Output files of a finished run: model, metrics, summary and report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from cloister_fl.model_file import save_model
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.server.results.report import RoundRow, RunReport, SiteRow, write_report
from cloister_fl.server.rounds.checkpoint import Figures, Released, RunState
from cloister_fl.server.rounds.collector import REASONS
from cloister_fl.server.rounds.run import Outcome, study_epsilon
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic

MODEL = "model.safetensors"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"

NO_SECURE_AGGREGATION = (
    "Secure aggregation is off: the coordinating site could read each hospital's update."
)
NOT_PRIVATE = "Differential privacy is off: the model and the updates may reveal single patients."
NOT_MEASURED = (
    "The model was not evaluated: with privacy on, only a hold-out that belongs to no site is "
    "used, and none was given (--holdout). A study can also reserve epsilon for a noised "
    "evaluation (evaluation.release_epsilon)."
)
NOT_RELEASED = (
    "The noised evaluation failed: too few sites answered. Its privacy cost stays charged, and it "
    "is not repeated."
)
CHANCE = (
    "The interval of the AUROC does not rule out chance: the model may have learnt nothing. More "
    "patients, another network (filter-bank for little data) or more rounds may help."
)
WEAK_EPSILON = 10.0
LARGE_DELTA = 1e-4


def write_outputs(out: Path, study: Study, outcome: Outcome, *, seconds: float) -> None:
    """Write all files of a finished run into ``out``, each atomically, the summary last."""
    summary = summarise(study, outcome, seconds=seconds)
    rows = [json.dumps(asdict(figures)) for figures in outcome.state.figures]
    write_atomic(out / METRICS, ("\n".join(rows) + "\n").encode(), mode=0o644)
    facts = {key: summary[key] for key in ("epsilon_max", "delta", "rounds", "sites")}
    save_model(out / MODEL, study, outcome.state.released, facts)
    write_report(out / REPORT, _report(study, outcome, summary))
    write_atomic(out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode(), mode=0o644)


def summarise(study: Study, outcome: Outcome, *, seconds: float) -> dict[str, object]:
    """The figures of a run, ready for JSON; the keys are stable.

    ``epsilon_max`` is over sites, patient-level, of this study alone, at ``delta``; it counts
    every round that was sent, also one that was lost, and the noised evaluation once requested.
    """
    state = outcome.state
    epsilons = site_epsilons(study, state)
    known = [value for value in epsilons.values() if value is not None]
    first, last = state.figures[0], state.figures[-1]
    private = study.privacy.enabled
    return {
        "study": study.study.name,
        "study_hash": study.digest,
        "run": state.run,
        "auroc_initial": first.auroc,
        "auroc_final": last.auroc,
        "auroc_final_interval": None if last.auroc is None else [last.auroc_low, last.auroc_high],
        "auprc_final": last.auprc,
        "balanced_accuracy_final": last.balanced_accuracy,
        **(_dice_figures(first, last) if study.target.segment else {}),
        "release": _release(study, state.release),
        "privacy": "patient-level differential privacy" if private else "off",
        "epsilon_max": max(known) if known else None,
        "epsilon_per_site": epsilons,
        "delta": study.privacy.delta if private else None,
        "sites": len(outcome.sites),
        "site_names": list(outcome.sites),
        "refused": dict(outcome.refused),
        "rounds": state.completed,
        "rounds_lost": list(state.lost),
        "secure_aggregation": study.aggregation.secure,
        "seconds": round(max(seconds, state.seconds), 2),
        "bytes_sent_per_site": dict(sorted(state.sent.items())),
        "warnings": list(warnings(study, outcome)),
    }


def _dice_figures(first: Figures, last: Figures) -> dict[str, object]:
    """Return the figures of a segmentation, which replace AUROC and the others."""
    interval = None if last.dice is None else [last.dice_low, last.dice_high]
    return {
        "dice_initial": first.dice,
        "dice_final": last.dice,
        "dice_final_interval": interval,
    }


def site_epsilons(study: Study, state: RunState) -> dict[str, float | None]:
    """Return epsilon by site, noised evaluation included; None where privacy is off."""
    asked = () if state.release is None else state.release.asked
    rounds = {**dict.fromkeys(asked, 0), **state.started}
    return {
        name: study_epsilon(study, count, released=name in asked)
        for name, count in sorted(rounds.items())
    }


def _release(study: Study, release: Released | None) -> dict[str, object] | None:
    """Return the noised evaluation for the summary; None where none was requested."""
    if release is None:
        return None
    return {
        "noised": True,
        "epsilon": study.evaluation.release_epsilon,
        "sites": release.sites,
        "noise_per_cell": release.noise,
        **(release.metrics or {"auroc": None, "auprc": None, "balanced_accuracy": None}),
    }


def warnings(study: Study, outcome: Outcome) -> tuple[str, ...]:
    """Return the warnings for readers of the results."""
    found: list[str] = []
    if study.aggregation.secure:
        n = len(outcome.state.invited)
        found.extend(Parameters.derive(n, study.aggregation.colluders).cautions)
    else:
        found.append(NO_SECURE_AGGREGATION)
    if not study.privacy.enabled:
        found.append(NOT_PRIVATE)
    else:
        found.extend(_weak(study))
    last = outcome.state.figures[-1]
    release = outcome.state.release
    if release is not None and release.metrics is None:
        found.append(NOT_RELEASED)
    if last.auroc is None and study.privacy.enabled and study.releases:
        auroc = None if release is None or release.metrics is None else release.metrics["auroc"]
        if auroc is not None and auroc["low"] <= 0.5:
            found.append(CHANCE)
    elif last.auroc is None and last.dice is None:
        found.append(NOT_MEASURED)
    elif last.auroc_low is not None and last.auroc_low <= 0.5:
        found.append(CHANCE)
    if outcome.state.lost:
        rounds = ", ".join(str(number) for number in outcome.state.lost)
        found.append(
            f"Rounds lost to a crash or a failed aggregation: {rounds}. Their privacy cost stays "
            "charged, and they are not trained again."
        )
    return tuple(found)


def _weak(study: Study) -> Iterator[str]:
    privacy = study.privacy
    if privacy.epsilon > WEAK_EPSILON:
        yield f"Epsilon {privacy.epsilon:g} is weak: above {WEAK_EPSILON:g}, it protects little."
    if privacy.delta > LARGE_DELTA:
        yield (
            f"Delta {privacy.delta:g} is large: with that probability the protection may fail. "
            "It should be below 1 / (10 x the number of a site's patients)."
        )


def _report(study: Study, outcome: Outcome, summary: Mapping[str, object]) -> RunReport:
    state = outcome.state
    epsilons = site_epsilons(study, state)
    rounds = [
        RoundRow(
            round=f.round,
            value=f.auroc if f.dice is None else f.dice,
            low=f.auroc_low if f.dice is None else f.dice_low,
            high=f.auroc_high if f.dice is None else f.dice_high,
            auprc=f.auprc,
            balanced_accuracy=f.balanced_accuracy,
            update_norm=f.update_norm,
            sites=f.sites,
            seconds=f.seconds,
            epsilon=f.epsilon,
        )
        for f in state.figures
    ]
    names = sorted({*outcome.sites, *outcome.refused, *state.started})
    sites = [
        SiteRow(
            name=name,
            rounds=state.started.get(name, 0),
            bytes_sent=state.sent.get(name, 0),
            epsilon=epsilons.get(name),
            refused=REASONS.get(outcome.refused[name]) if name in outcome.refused else None,
        )
        for name in names
    ]
    return RunReport(
        study=study,
        summary=summary,
        rounds=rounds,
        sites=sites,
        lost_rounds=state.lost,
        warnings=warnings(study, outcome),
    )
