"""A study that pays for its figures: one release over secure sums, in a whole federation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister_client.certifying import certify
from cloister_client.ledger import Ledger
from cloister_client.site import open_site
from cloister_common.charges import charges, sensitivity
from cloister_server.simulation import Simulation, simulate
from federations import NAMES, study, write_federation

ASKED = study(
    privacy="epsilon = 100.0",
    training="rounds = 3\nsteps = 4\nsampling_rate = 1.0\nexpected_batch = 20\nlearning_rate = 0.5",
    evaluation="release_epsilon = 40.0\nsite_fraction = 0.5",
)
"""Little noise: with 40 patients a site, the figures must then be those of the patients."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released")
    write_federation(root / "sites", patients=40, images=1)
    simulate(Simulation(ASKED, root / "sites", root / "run"))
    return root / "run"


def test_the_sum_is_measured_and_marked_as_noised(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    release = summary["release"]
    assert release["noised"] is True
    assert release["epsilon"] == 40.0
    assert release["sites"] == 5
    used = charges(ASKED)
    assert used.release is not None
    assert release["noise_per_cell"] == pytest.approx(used.release.noise_multiplier * 5**0.5)
    # About half of 200 patients; a bright upper half is easily learned.
    assert 70 <= release["patients"] <= 130
    assert release["auroc"]["value"] > 0.9
    low, high = release["auroc"]["low"], release["auroc"]["high"]
    assert 0.6 < low <= release["auroc"]["value"] <= high <= 1
    assert summary["auroc_final"] is None
    assert summary["epsilon_max"] == charges(ASKED).epsilon() <= 100.0
    assert summary["epsilon_max"] > charges(ASKED).epsilon(released=False) + 1
    assert not any("Nothing was measured" in warning for warning in summary["warnings"])
    report = (run / "report.html").read_text()
    assert "Released once, noised" in report
    assert f"AUROC {release['auroc']['value']:.3f} (noised)" in report


def test_every_site_charged_the_whole_and_can_show_it(run: Path, tmp_path: Path) -> None:

    summary = json.loads((run / "summary.json").read_text())
    used = charges(ASKED)
    for name in NAMES:
        site = open_site(run / "sites" / name)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        assert ledger.spent(ASKED.digest) == used.composition()
        found = certify(site, ASKED.digest)
        assert found.epsilon_run == summary["epsilon_per_site"][name] == used.epsilon()
    assert found.release is not None
    assert found.release.sensitivity == sensitivity(ASKED)
    assert found.release.charged
