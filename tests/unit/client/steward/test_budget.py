"""The steward's view of the budget: what it says, what it exports, and what closing does."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cloister_fl.client import service
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.cli import client_group
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.service_status import ServiceStatus
from cloister_fl.client.steward import budget
from cloister_fl.encoding.framing import u64
from cloister_fl.errors import (
    BudgetExhausted,
    CertificateInvalid,
    OptionInvalid,
    OutputInTheWay,
)
from cloister_fl.membership.identity import verify
from cloister_fl.study.schema import Study
from cloister_fl.verify import ledger_export
from support import commands, spending
from support.errors import raises
from support.federations import SEEN, study, study_text, with_engine

STUDY = study()
SITES = max(5, STUDY.aggregation.min_sites)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return init_site(
        tmp_path / "anker",
        policy=Policy(patients_at_most=1_000, max_epsilon_study=6, max_epsilon_lifetime=9),
    )


@pytest.fixture
def charged(site: Site) -> Site:
    """A study is approved, its whole cost reserved, and one round of it charged."""
    judge(site, STUDY, Decision.APPROVED, data=SEEN)
    spending.admit(site, STUDY, run="run-1", invited=SITES)
    spending.charge(site, STUDY, run="run-1", round_number=1)
    return site


def run(site: Site, *words: str) -> Result:
    return commands.invoke(client_group.app, "budget", *words, "--dir", site.root)


def test_the_account_is_the_ledgers(charged: Site) -> None:
    told = json.loads(run(charged, "--json").output)
    ledger = Ledger.open(charged.ledger, delta=charged.policy.ledger_delta)
    assert told["lifetime_spent"] == ledger.epsilon_lifetime()
    assert told["lifetime_promised"] == ledger.epsilon_lifetime(reserved=True)
    assert told["lifetime_left"] == 9 - told["lifetime_promised"]
    (one,) = told["studies"]
    steps = STUDY.training.steps_per_round
    assert (one["study"], one["name"]) == (STUDY.digest, STUDY.study.name)
    assert one["steps_started"] == steps
    assert one["steps_reserved"] == STUDY.training.total_steps - steps
    assert 0 < one["epsilon_spent"] < one["epsilon_promised"] <= STUDY.privacy.epsilon


def test_both_epsilons_stand_beside_each_other_wherever_a_site_reads(charged: Site) -> None:
    told = budget.statement(charged)
    words = (
        f"patient-level, this study: {told.studies[0].epsilon_promised:.2f}; "
        f"lifetime on this data: {told.lifetime_promised:.2f} of 9"
    )
    assert words in run(charged).output
    where = ["--dir", str(charged.root)]
    for command in (["status"], ["review", STUDY.digest]):
        assert words in CliRunner().invoke(client_group.app, [*command, *where]).output


def test_a_proposal_is_judged_by_both_gates_and_reserves_nothing(
    charged: Site, tmp_path: Path
) -> None:
    path = tmp_path / "other.toml"
    path.write_text(study_text(study='name = "another"'))
    head = Ledger.open(charged.ledger, delta=charged.policy.ledger_delta).head()
    asked = json.loads(run(charged, "--study", str(path), "--json").output)["proposal"]
    assert asked["study_epsilon"] == pytest.approx(STUDY.privacy.epsilon, abs=0.02)
    assert asked["study_gate"] is True
    assert asked["lifetime_gate"] is False
    assert asked["lifetime_epsilon"] > 9
    assert any("lifetime budget" in sentence for sentence in asked["objections"])
    assert "lifetime gate  exceeded" in run(charged, "--study", str(path)).output
    assert Ledger.open(charged.ledger, delta=charged.policy.ledger_delta).head() == head


def test_looking_at_a_site_without_a_ledger_makes_none(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study_text())
    asked = json.loads(run(site, "--study", str(path), "--json").output)
    assert asked["studies"] == []
    assert asked["lifetime_promised"] == 0
    assert asked["proposal"]["lifetime_gate"] is True
    assert not site.ledger.exists()
    with raises(OptionInvalid, match="no ledger"):
        run(site, "export", "--out", str(tmp_path / "out"))


def test_an_export_can_be_checked_with_the_file_and_the_key_alone(
    charged: Site, tmp_path: Path
) -> None:
    out = tmp_path / "ledger.jsonl"
    run(charged, "export", "--out", str(out))
    *lines, last = out.read_bytes().splitlines(keepends=True)
    previous = "0" * 64
    for line in lines:
        held = json.loads(line)
        body = json.dumps(held["body"], sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(b"cloister/ledger/v2\0" + previous.encode() + b"\0" + body)
        assert held["previous"] == previous
        assert held["hash"] == digest.hexdigest()
        previous = held["hash"]
    signed = json.loads(last)
    assert signed["head"] == {"seq": len(lines), "hash": previous}
    assert signed["key"] == charged.identity().public.hex()
    content = hashlib.sha256(b"".join(lines)).digest()
    # No study of it has an engine without support for its claim.
    assert signed["unsupported"] == []
    fields = [b"anker", u64(len(lines)), previous.encode(), content, b""]
    key, signature = bytes.fromhex(signed["key"]), bytes.fromhex(signed["signature"])
    assert verify(key, signature, "cloister/ledger/export/v3", *fields)
    assert not verify(key, signature, "cloister/ledger/export/v3", b"birke", *fields[1:])
    with pytest.raises(OutputInTheWay):
        run(charged, "export", "--out", str(out))


def test_what_a_run_leaves_reserved_is_told_with_the_command_that_releases_it(
    charged: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = STUDY.training.total_steps - STUDY.training.steps_per_round
    command = f"cloister client budget close {STUDY.digest[:16]} --dir {charged.root}"
    assert command in run(charged).output
    told = budget.left_reserved(charged)
    assert f"{rest} steps reserved and not started" in told[0]
    assert command in told[1]
    # The service says it once, when messages have ceased.
    said: list[str] = []
    now = ServiceStatus(health="127.0.0.1:1", last_asked=time.time() - service.REMIND_S + 60)
    serving = service._Service.__new__(service._Service)
    vars(serving).update(_site=charged, _say=said.append, _now=now, _reminded=False)
    serving._remind()
    assert said == []
    now.last_asked -= 61
    serving._remind()
    serving._remind()
    assert len(said) == 2
    assert command in said[1]
    # A run of which nothing is left has nothing to say.
    for number in range(2, STUDY.training.rounds + 1):
        spending.charge(charged, STUDY, run="run-1", round_number=number)
    assert budget.left_reserved(charged) == ()
    assert "budget close" not in run(charged).output


def test_steps_of_an_engine_that_does_not_keep_its_claim_are_marked_and_named_in_the_export(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of an earlier version: its steps are in the ledger, and its epsilon never held."""
    asked = with_engine(STUDY, "book-keeping")
    for one in (STUDY, asked):
        judge(site, one, Decision.APPROVED, data=SEEN)
    with monkeypatch.context() as earlier:
        earlier.setattr(Study, "unsound_engine", property(lambda study: ""))
        spending.admit(site, asked, run="run-1", invited=SITES)
        spending.charge(site, asked, run="run-1", round_number=1)
    told = run(site).output
    assert "remark    these epsilons do not hold: " in told
    (account,) = json.loads(run(site, "--json").output)["studies"]
    assert "one patient can move" in account["unsound"]
    out = tmp_path / "ledger.jsonl"
    run(site, "export", "--out", str(out))
    assert ledger_export.read(out.read_bytes()).unsupported == (asked.digest,)
    # Signed: it cannot be left out.
    *lines, last = out.read_bytes().splitlines(keepends=True)
    lying = json.dumps({**json.loads(last), "unsupported": []}).encode() + b"\n"
    with raises(CertificateInvalid):
        ledger_export.read(b"".join(lines) + lying)
    wider = replace(site, policy=site.policy.model_copy(update={"max_epsilon_lifetime": 30.0}))
    spending.admit(wider, STUDY, run="run-2", invited=SITES)
    assert "do not hold" in run(site).output.split(STUDY.digest[:16])[0]
    assert "do not hold" not in run(site).output.split(STUDY.digest[:16])[1]


def test_a_closed_study_gives_its_steps_back_and_never_starts_again(charged: Site) -> None:
    before = budget.statement(charged)
    rest = STUDY.training.total_steps - STUDY.training.steps_per_round
    assert f"Steps released: {rest}." in run(charged, "close", STUDY.digest[:12], "--yes").output
    after = budget.statement(charged)
    assert after.lifetime_spent == before.lifetime_spent == after.lifetime_promised
    assert after.studies[0].closed
    assert after.studies[0].steps_reserved == 0
    assert f"{STUDY.digest[:16]}, closed" in run(charged).output
    last = entries_of(charged)[-2]
    assert (last.kind, last.body["study"], last.body["released"]) == ("closed", STUDY.digest, rest)
    with pytest.raises(BudgetExhausted, match="closed"):
        spending.admit(charged, STUDY, run="run-1", invited=SITES)
    with pytest.raises(BudgetExhausted, match="closed"):
        spending.charge(charged, STUDY, run="run-1", round_number=2)
    with raises(OptionInvalid, match="no study"):
        run(charged, "close", "f" * 64)
