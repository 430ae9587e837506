"""Histograms that sites send in the open: one site's numbers cannot end an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import Counts, Evaluated
from cloister_fl.server.rounds.collector import MOST_COUNTED, Members, PlainCollector
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support import studies

OPEN = {"privacy": {"enabled": False}, "aggregation": {"secure": False}}
SEGMENTATION = """
[study]
name = "lungs"
question = "Where are the lungs?"
[target]
kind = "segmentation"
segment = "lung"
[network]
name = "unet"
[privacy]
enabled = false
[aggregation]
secure = false
"""
KINDS = {
    "classification": studies.study(**OPEN),
    "segmentation": parse_study(SEGMENTATION),
}
SITES = ("a", "b", "c")


@dataclass(frozen=True)
class _Reply:
    node: int
    message: Evaluated


class _Messenger:
    def __init__(self, *replies: Evaluated) -> None:
        self.replies = [_Reply(node, reply) for node, reply in enumerate(replies)]

    def ask(self, *_: Any) -> list[_Reply]:
        return self.replies


def honest(study: Study) -> Counts:
    counts = np.zeros(sessions.counts_shape(study), np.int64).reshape(-1)
    counts[[3, -3]] = 5
    return counts


def collected(study: Study, *replies: Evaluated) -> Any:
    members = Members("run", dict(enumerate(SITES)), len(SITES), SITES)
    collector = PlainCollector(_Messenger(*replies), study, members)  # type: ignore[arg-type]
    return collector.histogram(1, np.zeros(3, np.float32))


def evaluated(site: str, counts: Counts, number: int = 1) -> Evaluated:
    return Evaluated(site, number, counts.shape[-1], counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [MOST_COUNTED + 1, 2**40, 2**62, -1])
def test_a_number_of_patients_beyond_any_hospital_is_left_out(kind: str, value: int) -> None:
    study = KINDS[kind]
    good, bad = honest(study), honest(study)
    bad[-5] = value
    each = zip(SITES, (good, bad, bad), strict=True)
    found = collected(study, *(evaluated(site, counts) for site, counts in each))
    assert found.sites == 1
    assert np.array_equal(found.total.reshape(-1), good)


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_that_is_taken_can_be_measured(kind: str) -> None:
    study = KINDS[kind]
    most = honest(study)
    most[-5] = MOST_COUNTED
    found = collected(study, *(evaluated(site, most) for site in SITES))
    assert found.sites == 3
    assert study.task.measure_counts(found.total).patients == 3 * (MOST_COUNTED + 10)


def test_an_answer_in_anothers_name_or_of_another_round_is_left_out() -> None:
    study = KINDS["classification"]
    good = honest(study)
    found = collected(study, evaluated("a", good), evaluated("a", good), evaluated("c", good, 2))
    assert found.sites == 1
