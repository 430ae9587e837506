"""A run that goes too far delivers its best model, and may end before its last round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import budget
from cloister_fl.model_file import load_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.server.rounds.checkpoint import Checkpoints
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import NAMES, approve, study, write_cohort

POLICY = Policy(
    max_epsilon_study=6.0,
    max_epsilon_lifetime=30.0,
    patients_at_most=1000,
    release_unstarted=True,
)


def _sites(root: Path, policy: Policy) -> Path:
    rng = np.random.default_rng(1)
    for name in NAMES:
        data = write_cohort(root / "data" / name, rng, f"MRN-{name}", patients=12)
        init_site(
            root / "sites" / name,
            name=name,
            dicom=data / "dicom",
            labels=data / "labels.csv",
            policy=policy,
        )
    return root / "sites"


@pytest.mark.slow
def test_a_rate_far_too_high_delivers_the_best_model_and_stops(tmp_path: Path) -> None:
    """Why ``stop_after`` is there: the last model of such a run was no better than a coin."""
    asked = study(training={"rounds": 14, "learning_rate": 8.0}, evaluation={"stop_after": 2})
    sites = _sites(tmp_path, POLICY)
    # One hospital decided otherwise.
    file = sites / "esche" / "site.toml"
    file.write_text(
        file.read_text().replace("release_unstarted = true", "release_unstarted = false")
    )
    for name in NAMES:
        approve(sites / name, asked)
    holdout = write_cohort(tmp_path / "holdout", np.random.default_rng(99), "HOLD", patients=60)
    out = tmp_path / "run"
    summary = run_simulation(Simulation(asked, sites, out, holdout=holdout))

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("auroc", "auprc", "balanced_accuracy")
    values = [[row["selecting"][name]["value"] for name in names] for row in rows]
    best = max(range(1, len(values)), key=lambda number: values[number])
    assert summary["model_round"] == best
    assert summary["metrics_final"] == rows[best]["metrics"]
    state, _ = Checkpoints(out / "checkpoint").load(asked)
    np.testing.assert_array_equal(flatten(load_model(out / "model.safetensors")[0]), state.best)
    done = rows[-1]["round"]
    assert (summary["ended"], done - best) in {("stop_after", 2), ("done", 14 - best)}
    # The study costs what was planned, at the sites and in the summary.
    assert summary["epsilon_max"] == pytest.approx(6.0, abs=0.05)
    for name in NAMES:
        told = budget.statement(open_site(sites / name))
        (one,) = told.studies
        assert one.epsilon_planned == pytest.approx(6.0, abs=0.05)
        assert (one.rounds_started, one.rounds_planned) == (done, 14)
        log = entries_of(open_site(sites / name))
        sent = [entry.body["message"] for entry in log if entry.kind == "sent"]
        assert ("finished" in sent) is (done < 14)
        if done < 14:
            regained = name != "esche"
            assert one.closed is regained
            assert (told.lifetime_promised == told.lifetime_spent) is regained
            assert f"planned 6.00; {done} of 14 rounds started" in budget.render(told)
