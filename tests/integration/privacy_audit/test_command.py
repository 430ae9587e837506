"""The command that audits the installed step: sound code passes, code without noise does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

from cloister_fl.client.cli import client_group
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.training import local_training
from cloister_fl.errors import OptionInvalid
from cloister_fl.privacy.accounting import epsilon_pld
from support import commands
from support.errors import raises

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return init_site(tmp_path / "anker")


def run(site: Site, *words: str) -> Result:
    return commands.invoke(client_group.app, "privacy-audit", *words, "--dir", site.root)


def test_the_installed_code_passes_and_the_log_says_so(site: Site) -> None:
    result = run(site, "--draws", "200", "--json")
    assert result.exit_code == 0
    told = json.loads(result.output)
    assert told["claimed_epsilon"] == pytest.approx(epsilon_pld(1.0, 1.0, 2, 1e-5))
    # 200 draws see this much: less would be an attack that looks at nothing.
    assert 1 < told["audited_epsilon"] <= told["claimed_epsilon"]
    assert (told["draws"], told["confidence"], told["passed"]) == (200, 0.99, True)
    (entry,) = entries_of(site)
    assert (entry.kind, entry.body["passed"]) == ("audited", True)
    assert entry.body["claimed"] == f"{told['claimed_epsilon']:.4f}"
    assert not site.ledger.exists()


def test_code_that_adds_a_third_of_the_noise_is_refuted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = local_training.PatientDPOptimizer

    def weak(*words: object, noise_multiplier: float, **more: object) -> object:
        return whole(*words, noise_multiplier=noise_multiplier / 3, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(local_training, "PatientDPOptimizer", weak)
    result = run(site, "--draws", "200")
    assert result.exit_code == 4
    assert "THE CLAIM IS REFUTED" in result.output
    assert "lower bound and no proof" in result.output
    assert entries_of(site)[-1].body["passed"] is False


def test_draws_come_in_pairs(site: Site) -> None:
    with raises(OptionInvalid, match="odd"):
        run(site, "--draws", "201")
    assert entries_of(site) == ()
