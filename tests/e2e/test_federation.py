"""Hospitals and a coordinator, as real processes with TLS, from invitation to model."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from cloister_fl.audit_log import read
from cloister_fl.client.ledger.chain import PROTOCOL_KINDS
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.file import parse_study
from support import studies
from support.deployment import Deployment, change_policy, cloister, study_text

TRAINING = {"rounds": 2, "steps": 2, "expected_batch": 24, "images_per_patient": 2}
OPEN: dict[str, studies.Table] = {
    "training": TRAINING | {"sampling_rate": 1.0},
    "privacy": {"enabled": False},
    "evaluation": {"site_fraction": 0.0},
}
PLAIN = study_text("plain", **OPEN)
PRIVATE = study_text(
    "private",
    training=TRAINING | {"sampling_rate": 0.5},
    privacy={"epsilon": 6.0},
    evaluation={"site_fraction": 0.0},
    aggregation={"min_sites": 3, "colluders": 0},
)


def _model(folder: Path) -> np.ndarray:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return np.concatenate([file.get_tensor(name).reshape(-1) for name in sorted(file.keys())])


@pytest.mark.slow
def test_without_privacy_the_model_is_the_simulation_s(
    federation: Deployment, drawn: Path, tmp_path: Path
) -> None:
    name = federation.run(PLAIN)
    federation.approve(parse_study(PLAIN))
    summary = federation.wait_for_end(name)
    run_simulation(Simulation(parse_study(PLAIN), drawn / "sites", tmp_path / "out"))
    simulated = json.loads((tmp_path / "out" / "summary.json").read_text())
    ours = _model(federation.folder / "runs" / name)
    theirs = _model(tmp_path / "out")
    # The sum is exact whatever the masks, so both decode the very same integers.
    assert np.array_equal(ours, theirs)
    same = ("study_hash", "sites", "rounds", "rounds_lost", "site_names", "secure_aggregation")
    assert {key: summary[key] for key in same} == {key: simulated[key] for key in same}


def test_with_privacy_the_accounts_are_the_simulation_s_and_the_noise_is_not(
    three: Deployment, three_drawn: Path, tmp_path: Path
) -> None:
    name = three.run(PRIVATE, "--holdout", str(three_drawn / "holdout"))
    three.approve(parse_study(PRIVATE))
    summary = three.wait_for_end(name)
    study = parse_study(PRIVATE)
    run_simulation(
        Simulation(study, three_drawn / "sites", tmp_path / "out", holdout=three_drawn / "holdout")
    )
    simulated = json.loads((tmp_path / "out" / "summary.json").read_text())
    same = ("study_hash", "epsilon_per_site", "delta", "rounds", "rounds_lost")
    assert {key: summary[key] for key in same} == {key: simulated[key] for key in same}
    assert summary["auroc_final"] is not None
    for site, hospital in three.hospitals.items():
        deployed_ledger = _mechanisms(hospital.folder / "ledger.sqlite")
        assert deployed_ledger == _mechanisms(tmp_path / "out" / "sites" / site / "ledger.sqlite")
        assert [row["kind"] for row in deployed_ledger] == ["reserved", *2 * ["started"]]
        told = [_schema(entry.body) for entry in entries_of(hospital.site)]
        simulated_log = tmp_path / "out" / "sites" / site / "audit" / "audit.jsonl"
        there = [_schema(entry.body) for entry in read(simulated_log)]
        assert {words for words in there if words} <= {words for words in told if words}
    ours = _model(three.folder / "runs" / name)
    theirs = _model(tmp_path / "out")
    assert ours.shape == theirs.shape
    assert not np.allclose(ours, theirs)
    assert "noised and securely aggregated" in cloister(
        "server", "report", name, "--dir", three.folder
    )


@pytest.mark.slow
def test_a_signed_study_needs_nobody_where_its_signer_is_trusted(federation: Deployment) -> None:
    text = study_text("signed", **studies.merged(OPEN, {"training": {"rounds": 1}}))
    key = federation.base / "sponsor.pem"
    public = cloister("study", "key", key).split()[-1]
    for hospital in federation.hospitals.values():
        change_policy(hospital.folder, "trusted_signers", f'["{public}"]')
        change_policy(hospital.folder, "approve", '"signed"')
    (federation.base / "study.toml").write_text(text)
    cloister("study", "sign", federation.base / "study.toml", "--key", key)
    try:
        summary = federation.wait_for_end(federation.run(text))
    finally:
        (federation.base / "study.toml.sig").unlink()
        for hospital in federation.hospitals.values():
            change_policy(hospital.folder, "approve", '"none"')
            change_policy(hospital.folder, "trusted_signers", "[]")
    assert summary["rounds"] == 1
    assert summary["site_names"] == sorted(federation.hospitals)
    for hospital in federation.hospitals.values():
        judged = [e.body for e in entries_of(hospital.site) if e.kind == "judged"][-1]
        assert (judged["by"], judged["decision"]) == ("policy", "approved")
        assert public in str(judged["why"])
    told = json.loads(cloister("server", "audit", "--dir", federation.folder, "--json"))
    assert told["runs"][-1]["ended"] == "done"
    assert {one["site"] for one in told["sites"]} == set(federation.hospitals)
    assert {one["kind"] for one in told["decisions"]} >= {"invited", "approved", "roster"}


def _mechanisms(path: Path) -> list[dict[str, object]]:
    """What a ledger says of the private study, but for names, times and the policy's limits."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        bodies = [json.loads(text) for (text,) in database.execute("SELECT body FROM entries")]
    own = {"run", "time", "salt", "seq", "limit_study", "limit_lifetime"}
    digest = parse_study(PRIVATE).digest
    return [
        {key: value for key, value in body.items() if key not in own}
        for body in bodies
        if body.get("study") == digest and body["kind"] not in PROTOCOL_KINDS
    ]


def _schema(body: Mapping[str, object]) -> tuple[str, ...]:
    """What kind of message a line of the log tells of, and which fields it has."""
    kind = body.get("message")
    return (str(kind), *sorted(body)) if kind else ()
