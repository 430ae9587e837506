"""Hospitals that go away and come back, and a run that waits for them by itself."""

from __future__ import annotations

import pytest

from cloister_fl.audit_log import read
from cloister_fl.study.file import parse_study
from support.coordinator_process import wait_for
from support.deployment import Deployment, study_text

STUDY = study_text(
    "sleepers",
    training={"rounds": 9},
    privacy={"enabled": False},
    aggregation={"min_sites": 5},
    evaluation={"site_fraction": 0.0},
)


def _summed(federation: Deployment, run: str) -> list[tuple[int, list[str]]]:
    """Which sites were in the sum of each round, from the coordinator's audit log."""
    began = ""
    found = []
    digest = parse_study(STUDY).digest
    for entry in read(federation.place.keys / "audit.jsonl"):
        if entry.kind == "began" and entry.body["study"] == digest:
            began = str(entry.body["run"])
        if entry.kind == "summed" and entry.body["run"] == began:
            found.append((int(str(entry.body["round"])), str(entry.body["sites"]).split()))
    return found


@pytest.mark.slow
def test_a_site_that_sleeps_and_comes_back_and_a_run_that_waits(federation: Deployment) -> None:
    everyone = sorted(federation.hospitals)
    first, second = federation.hospitals["eastfield"], federation.hospitals["hillcrest"]
    run = federation.run(STUDY)
    federation.approve(parse_study(STUDY))

    def sums() -> int:
        return len(_summed(federation, run))

    wait_for(lambda: sums() >= 1, 200, federation.told)
    first.stop()
    asleep = sums()
    wait_for(lambda: sums() >= asleep + 3, 200, federation.told)
    first.start()
    # Five were invited and one colluder is allowed for: a sum needs four.
    wait_for(lambda: len(_summed(federation, run)[-1][1]) == 5, 200, federation.told)
    back = sums()
    first.stop()
    second.stop()
    status = federation.wait_for_state(run, "waiting", within=600)
    assert "3 sites take part so far, 4 are needed" in status["told"]
    waited_at = sums()
    second.start()
    summary = federation.wait_for_end(run)
    first.start()
    rounds = _summed(federation, run)
    by_round = dict(rounds)
    without = [
        number for number, sites in rounds if sites == [s for s in everyone if s != "eastfield"]
    ]
    assert len([number for number in without if number <= back]) >= 3
    assert sorted(by_round[max(n for n in by_round if n <= back)]) == everyone
    assert waited_at < len(rounds)
    assert summary["rounds"] == 9
    assert [number for number, _ in rounds] == [
        n for n in range(1, 10) if n not in summary["rounds_lost"]
    ]
    assert all(len(sites) >= 4 for _, sites in rounds)
