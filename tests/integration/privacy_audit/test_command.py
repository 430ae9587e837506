"""The command that audits the installed code: what it prints, its log entry, its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

from cloister_fl.client.cli import client_group
from cloister_fl.client.privacy_audit import round_audit
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.errors import OptionInvalid
from support import commands
from support.errors import raises


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return init_site(tmp_path / "anker")


def run(site: Site, *words: str) -> Result:
    return commands.invoke(client_group.app, "privacy-audit", *words, "--dir", site.root)


def sound(evidence: Evidence, _: Path) -> None:
    evidence.test(Claim.NOISE_SIZE, "size", 0.3)
    evidence.require(Claim.SUM, "sum", holds=True)


def unsound(evidence: Evidence, _: Path) -> None:
    evidence.test(Claim.NOISE_SIZE, "size of the noise", 1e-9, "0.5000 of what is claimed")
    for place in range(7):
        evidence.require(Claim.SUM, f"sum {place}", holds=False)


def stages(monkeypatch: pytest.MonkeyPatch, **found: round_audit.Stage) -> None:
    monkeypatch.setattr(round_audit, "stages_of_code", lambda _: dict(found))


def test_sound_code_passes_and_the_log_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch, rounds=sound)
    result = run(site, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["passed"], told["tests"], told["checks"]) == (True, 1, 1)
    assert (told["level"], told["done"], told["left"]) == (0.01, ["rounds"], [])
    assert [one["claim"] for one in told["claims"] if one["tests"]] == ["noise-size"]
    (entry,) = entries_of(site)
    assert entry.kind == "audited"
    assert dict(entry.body) == {"on": "made-up patients", "passed": True}
    assert not site.ledger.exists()
    words = run(site).stdout
    assert "The claims stand" in words
    assert "no proof" in words
    assert "at most 1%" in words
    assert f"stands      {Claim.SUM.says} (0 tests, 1 checks)" in words
    assert f"not tested  {Claim.EPSILON.says}" in words


def test_what_is_refuted_is_explained(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch, rounds=unsound, more=sound)
    result = run(site)
    assert result.exit_code == 4
    assert "THE CLAIM IS REFUTED" in result.stdout
    assert f"REFUTED     {Claim.NOISE_SIZE.says}" in result.stdout
    assert "0.5000 of what is claimed (chance from sound code: below 1e-09)" in result.stdout
    assert f"What it means: {Claim.NOISE_SIZE.means}" in result.stdout
    assert "and 2 more" in result.stdout
    assert "Not gone through after that: more." in result.stdout
    assert entries_of(site)[-1].body["passed"] is False
    refuted = run(site, "--json")
    assert refuted.exit_code == 4
    told = json.loads(refuted.stdout)
    assert told["left"] == ["more"]
    (one,) = [claim for claim in told["claims"] if claim["claim"] == "noise-size"]
    assert one["refuted"] == [
        {"test": "size of the noise", "p": 1e-9, "seen": "0.5000 of what is claimed"}
    ]


@pytest.mark.parametrize("option", ["--rounds", "--canaries"])
def test_options_of_a_study_need_one(site: Site, option: str) -> None:
    with raises(OptionInvalid, match="name one: --study"):
        run(site, option, "8")
    assert entries_of(site) == ()
