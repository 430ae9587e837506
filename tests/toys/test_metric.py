"""The toy of docs/guides/add-a-metric.md: one entry, and it is measured and told everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from cloister_fl.metrics.classification import histogram, measure, measure_histogram
from cloister_fl.metrics.curves import CURVE_FIGURES
from cloister_fl.metrics.noisy import measure_noised
from cloister_fl.server.results.summary_table import show
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import study, write_federation
from toys.youden import ROW

RNG = np.random.default_rng(7)
LABELS = RNG.integers(0, 2, 300)
SCORES = np.clip(RNG.normal(0.35 + 0.3 * LABELS, 0.2), 0, 1)


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands in the product's table."""
    monkeypatch.setitem(CURVE_FIGURES, "youden", ROW)  # type: ignore[arg-type]


def test_it_is_what_scikit_learns_curve_says() -> None:
    false, true, _ = roc_curve(LABELS, SCORES)
    found = measure(LABELS, np.stack([1 - SCORES, SCORES], axis=1)).get("youden")
    assert found is not None
    assert found.value == pytest.approx((true - false).max())
    assert found.low < found.value <= found.high


def test_counts_and_noised_counts_give_it_too() -> None:
    exact = measure(LABELS, np.stack([1 - SCORES, SCORES], axis=1)).get("youden")
    counts = histogram(LABELS, SCORES)
    counted, noised = measure_histogram(counts), measure_noised(counts[None].astype(float), 0.1)
    for one in (counted.get("youden"), noised.get("youden")):
        assert exact is not None
        assert one is not None
        assert one.value == pytest.approx(exact.value, abs=0.05)


def test_a_run_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = write_federation(tmp_path / "sites", patients=20, images=1)
    out = tmp_path / "run"
    asked = study(training={"rounds": 1}, privacy={"enabled": False})
    summary = run_simulation(Simulation(asked, sites, out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["metrics"]["youden"]["value"] <= 1
    assert "Youden&#39;s index" in (out / "report.html").read_text()
    show(summary, out)
    assert "Youden's index after training" in capsys.readouterr().out
