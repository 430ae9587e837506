"""Output files of a finished run: model, metrics, summary and report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cloister_fl.metrics.figures import Estimate, Metrics, title_of
from cloister_fl.model_file import save_model
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.server.results.holdout_details import Details, describe, scores_table
from cloister_fl.server.results.report import (
    LAST_MODEL,
    MODEL,
    SCORES,
    RunReport,
    SiteRow,
    write_report,
)
from cloister_fl.server.rounds.checkpoint import Released, RunState
from cloister_fl.server.rounds.collector import REASONS
from cloister_fl.server.rounds.model_choice import delivered
from cloister_fl.server.rounds.run import Outcome
from cloister_fl.study.cost import study_epsilon
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.tasks.divided_holdout import Holdout

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"

NO_SECURE_AGGREGATION = (
    "Secure aggregation is off: the coordinating site could read each hospital's update."
)
NOT_PRIVATE = "Differential privacy is off: the model and the updates may reveal single patients."
NOT_MEASURED = (
    "The model was not evaluated: with privacy on, only a hold-out that belongs to no site is "
    "used, and none was given (--holdout, holdout=). A study can also reserve epsilon for a noised "
    "evaluation (evaluation.release_epsilon)."
)
NOT_RELEASED = (
    "The noised evaluation failed: too few sites answered. Its privacy cost stays charged, and it "
    "is not repeated."
)
CHANCE = (
    "The interval does not rule out chance: the model may have learnt nothing. More patients, or "
    "the frozen network efficientnet-lite0 (scripts/install pretrained), may help; at the same "
    "epsilon fewer rounds may, too."
)
CHANCE_OPEN = (
    "The interval does not rule out chance: the model may have learnt nothing. More rounds, more "
    "patients, or another network (filter-bank for little data) may help."
)
BY_CHANCE = 0.005
"""How near to chance a balanced accuracy is as good as there."""
AT_CHANCE = (
    "The balanced accuracy is at chance: at 0.5, or as the most probable class, nearly all "
    "patients are called the same. With a rare class that says little of a model that ranks "
    "them well: call at another threshold, or weigh the classes (training.class_weights)."
)
WEAK_EPSILON = 10.0
LARGE_DELTA = 1e-4


def write_outputs(
    out: Path, study: Study, outcome: Outcome, *, seconds: float, holdout: Holdout | None = None
) -> None:
    """Write all files of a finished run into ``out``, each atomically, the summary last."""
    state = outcome.state
    handed = delivered(study, state)
    details = None
    if holdout is not None:
        scores = holdout.score(handed.model)
        details = describe(holdout, scores)
        # Of single patients, who may be a hospital's.
        write_atomic(out / SCORES, scores_table(holdout, scores))
    summary = summarise(study, outcome, seconds=seconds, details=details)
    rows = [json.dumps(figures.to_json()) for figures in state.figures]
    write_atomic(out / METRICS, ("\n".join(rows) + "\n").encode(), mode=0o644)
    facts = {key: summary[key] for key in ("epsilon_max", "delta", "rounds", "sites")}
    point = None if details is None else details.operating_point
    made = {"round": handed.figures.round}
    save_model(out / MODEL, study, handed.model, facts | made, operating_point=point)
    if handed.figures.round != state.figures[-1].round:
        made = {"round": state.figures[-1].round}
        save_model(out / LAST_MODEL, study, state.released, facts | made)
    write_report(out / REPORT, _report(study, outcome, summary, details))
    write_atomic(out / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode(), mode=0o644)


def summarise(
    study: Study, outcome: Outcome, *, seconds: float, details: Details | None = None
) -> dict[str, object]:
    """The figures of a run, ready for JSON; the keys are stable.

    ``epsilon_max`` is over sites, patient-level, of this study alone, at ``delta``; it counts
    every round that was sent, also one that was lost, and the noised evaluation once requested.
    Where the run ended by what it gave, before its last round, it is the whole study's.
    ``metrics_final`` is of the delivered model.
    """
    state = outcome.state
    epsilons = site_epsilons(study, state)
    known = [value for value in epsilons.values() if value is not None]
    handed = delivered(study, state)
    first, last = state.figures[0], handed.figures
    private = study.privacy.enabled
    return {
        "study": study.study.name,
        "study_hash": study.digest,
        "run": state.run,
        "headline": study.task.headline,
        "strata": list(study.task.strata),
        "unit": study.task.unit,
        **_headline(study.task.headline, first.metrics, last.metrics),
        "metrics_initial": first.metrics and first.metrics.to_json(),
        "metrics_final": last.metrics and last.metrics.to_json(),
        "model_round": last.round,
        "model_why": handed.why,
        "ended": state.ended or "done",
        "holdout": details and details.to_json(),
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
        "rounds_discarded": list(state.discarded),
        "secure_aggregation": study.aggregation.secure,
        "sums": outcome.sums,
        "seconds": round(max(seconds, state.seconds), 2),
        "bytes_sent_per_site": dict(sorted(state.sent.items())),
        "warnings": list(warnings(study, outcome, details)),
    }


def _headline(name: str, first: Metrics | None, last: Metrics | None) -> dict[str, object]:
    """Return the task's first figure by itself, under its own name."""
    before, after = (one and one.get(name) for one in (first, last))
    return {
        f"{name}_initial": before and before.value,
        f"{name}_final": after and after.value,
        f"{name}_final_interval": after and [after.low, after.high],
    }


def site_epsilons(study: Study, state: RunState) -> dict[str, float | None]:
    """Return epsilon by site, noised evaluation included; None where privacy is off."""
    asked = () if state.release is None else state.release.asked
    rounds = {**dict.fromkeys(asked, 0), **state.started}
    if state.ended:
        # Ended by what it gave: the proof of a study's epsilon needs its steps fixed beforehand.
        whole = study_epsilon(study, study.training.rounds, released=study.releases)
        return {name: whole for name, count in sorted(rounds.items()) if count}
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
        "metrics": release.metrics and release.metrics.to_json(),
    }


def warnings(study: Study, outcome: Outcome, details: Details | None = None) -> tuple[str, ...]:
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
    task, release = study.task, outcome.state.release
    if release is not None and release.metrics is None:
        found.append(NOT_RELEASED)
    measured = delivered(study, outcome.state).figures.metrics
    headline = _first(task.headline, measured)
    if headline is None and release is not None:
        headline = _first(task.headline, release.metrics)
    elif headline is None and not study.releases:
        found.append(NOT_MEASURED)
    if headline is not None and task.chance is not None and headline.low <= task.chance:
        found.append(CHANCE if study.privacy.enabled else CHANCE_OPEN)
    if measured is not None:
        found.extend(_caveats(measured, details))
    discarded = outcome.state.discarded
    lost = [number for number in outcome.state.lost if number not in discarded]
    if discarded:
        rounds = ", ".join(str(number) for number in discarded)
        found.append(
            f"Rounds discarded, since their sums are larger than honest sites can send: {rounds}. "
            "A site sends something else than its update. Their privacy cost stays charged."
        )
    if lost:
        rounds = ", ".join(str(number) for number in lost)
        found.append(
            f"Rounds lost to a crash or a failed aggregation: {rounds}. Their privacy cost stays "
            "charged, and they are not trained again."
        )
    return tuple(found)


def _first(name: str, metrics: Metrics | None) -> Estimate | None:
    return None if metrics is None else metrics.get(name)


def _caveats(metrics: Metrics, details: Details | None) -> Iterator[str]:
    """What the figures do not say by themselves."""
    names = [name for name, one in metrics.figures.items() if one and one.low == one.high]
    if names:
        told = ", ".join(title_of(name) for name in names)
        yield (
            f"The interval of {told} has no width: with {metrics.patients} patients the method "
            "sees no chance at work, which is its blind spot and not certainty."
        )
    balanced = metrics.get("balanced_accuracy")
    if balanced is not None and abs(balanced.value - 1 / len(metrics.class_counts)) < BY_CHANCE:
        yield (
            AT_CHANCE
            if details is None or details.operating_point is None
            else (f"{AT_CHANCE} At the operating point it is told by sensitivity and specificity.")
        )


def _weak(study: Study) -> Iterator[str]:
    privacy = study.privacy
    if privacy.epsilon > WEAK_EPSILON:
        yield f"Epsilon {privacy.epsilon:g} is weak: above {WEAK_EPSILON:g}, it protects little."
    if privacy.delta > LARGE_DELTA:
        yield (
            f"Delta {privacy.delta:g} is large: with that probability the protection may fail. "
            "It should be below 1 / (10 x the number of a site's patients)."
        )


def _report(
    study: Study, outcome: Outcome, summary: Mapping[str, object], details: Details | None
) -> RunReport:
    state = outcome.state
    epsilons = site_epsilons(study, state)
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
        rounds=state.figures,
        sites=sites,
        lost_rounds=state.lost,
        warnings=warnings(study, outcome, details),
        details=details,
    )
