"""A server that wants more of a hospital than its patients were charged for, or that asks again.

The messages are made by hand and go through the product's ClientApp. What counts: which rounds the
ledger charged, how often the site trained, and that a refusal opens no file of the data.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister_fl.client import app as client
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.ledger import rollback
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import path_of
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.networks import registry
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.protocol.round_messages import (
    EvaluateTask,
    Exchange,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Update,
    Vector,
    octets,
)
from cloister_fl.study.schema import Study
from support.federations import study
from support.hand_asked_site import WATCH, ask, fits, rounds_charged, write_hospital

UNMASKED = {"aggregation": "secure = false"}
STUDY = study(**UNMASKED)


class Greed:
    """A server that says what it likes to one hospital, whose training it counts."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.trained: list[int] = []
        honest = client.train_round

        def counted(*given: Any, **named: Any) -> Vector:
            self.trained.append(named["round_number"])
            return honest(*given, **named)

        monkeypatch.setattr(client, "train_round", counted)

    def restart(self) -> None:
        """What the site's process kept in memory is gone."""
        client.app.kept._cohorts.clear()

    def prepare(self, asked: Study = STUDY, run: str = "run") -> RoundMessage:
        return ask(self.site, Prepare(asked.canonical(), run, 5, "", b"", ""))

    def train(
        self, number: int, asked: Study = STUDY, run: str = "run", shift: float = 0.0
    ) -> RoundMessage:
        return ask(self.site, self.task(number, asked, run, shift))

    def task(
        self, number: int, asked: Study = STUDY, run: str = "run", shift: float = 0.0
    ) -> TrainTask:
        module = registry.build(
            asked.network, 2, 1, size=asked.input.size, seed=asked.training.seed
        )
        vector = (flatten(module) + shift).astype(np.float32)
        return TrainTask(asked.canonical(), run, number, 5, octets(), vector)


@pytest.fixture
def greed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Greed]:
    client.app.kept._cohorts.clear()
    yield Greed(write_hospital(tmp_path, fits(STUDY)), monkeypatch)
    WATCH.folders = ()


def reason(reply: RoundMessage) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.reason


def test_a_round_is_trained_once_however_often_it_is_asked_for(greed: Greed) -> None:
    assert isinstance(greed.prepare(), Prepared)
    assert isinstance(greed.train(1), Update)
    for shift, word in ((0.0, "round-spent"), (0.0, "round-spent"), (0.5, "model")):
        assert reason(greed.train(1, shift=shift)) == word
    greed.restart()
    assert reason(greed.train(1)) == "round-spent"
    assert reason(greed.train(1, run="again")) == "budget"
    assert greed.trained == rounds_charged(greed.site) == [1]


def test_two_messages_at_once_get_one_round(greed: Greed) -> None:
    assert isinstance(greed.prepare(), Prepared)
    replies: list[RoundMessage] = []
    start = threading.Barrier(4)
    task = greed.task(1)

    def together() -> None:
        start.wait()
        replies.append(ask(greed.site, task))

    threads = [threading.Thread(target=together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(reply).__name__ for reply in replies) == ["Refusal"] * 3 + ["Update"]
    reasons = {reply.reason for reply in replies if isinstance(reply, Refusal)}
    assert reasons == {"round-spent"}, read_last_refusal(greed.site.root)
    assert greed.trained == rounds_charged(greed.site) == [1]


def test_no_round_beyond_those_that_were_charged(greed: Greed) -> None:
    assert isinstance(greed.prepare(), Prepared)
    for number in (0, -1, 4, 2**40):
        assert reason(greed.train(number)) == "message"
    for number in (3, 1, 2):
        assert isinstance(greed.train(number), Update)
    for number in (1, 2, 3, 4):
        assert reason(greed.train(number)) in {"round-spent", "message"}
    assert greed.trained == rounds_charged(greed.site) == [3, 1, 2]
    ledger = Ledger.open(greed.site.ledger, delta=greed.site.policy.ledger_delta)
    assert [held.left for held in ledger.reservations()] == [0]
    assert ledger.epsilon_study(STUDY.digest, STUDY.privacy.delta) <= STUDY.privacy.epsilon


@pytest.mark.parametrize(
    "more",
    [
        {"training": "steps = 20"},
        {"training": "rounds = 4"},
        {"training": "sampling_rate = 0.6"},
        {"privacy": "epsilon = 6.1"},
        {"privacy": "delta = 1e-4"},
        {"privacy": "clipping_norm = 9.0"},
        {"privacy": "enabled = false"},
    ],
    ids=lambda tables: next(iter(tables.values())),
)
def test_a_study_that_takes_more_is_another_study(greed: Greed, more: dict[str, str]) -> None:
    assert isinstance(greed.prepare(), Prepared)
    other = study(**UNMASKED, **more)
    greed.restart()
    WATCH.seen.clear()
    WATCH.folders = (str(greed.site.dicom), str(greed.site.labels))
    assert reason(greed.train(1, other)) in {"approval", "policy"}
    assert WATCH.seen == []
    assert greed.trained == rounds_charged(greed.site) == []


def test_a_run_that_another_one_replaced_holds_no_second_budget(greed: Greed) -> None:
    assert isinstance(greed.prepare(run="one"), Prepared)
    assert isinstance(greed.prepare(run="two"), Prepared)
    assert isinstance(greed.train(1, run="one"), Update)
    for run in ("two", "three"):
        assert reason(greed.prepare(run=run)) == "budget"
        assert reason(greed.train(1, run=run)) == "budget"
    assert greed.trained == rounds_charged(greed.site) == [1]


def test_scores_are_not_given_while_privacy_is_on(greed: Greed) -> None:
    assert isinstance(greed.prepare(), Prepared)
    vector = greed.task(1).vector
    for number in (0, 1, 3):
        task = EvaluateTask(STUDY.canonical(), "run", number, 5, octets(), vector)
        assert reason(ask(greed.site, task)) == "policy"


# A refusal opens no file of the data, whatever it is for and whatever was asked.


def used_up(greed: Greed) -> None:
    for number in (1, 2, 3):
        assert isinstance(greed.train(number), Update)


def denied(greed: Greed) -> None:
    judge(greed.site, STUDY, Decision.DENIED)


def closed(greed: Greed) -> None:
    ledger = Ledger.open(greed.site.ledger, delta=greed.site.policy.ledger_delta)
    ledger.close(STUDY.digest, greed.site.identity())


def damaged(greed: Greed) -> None:
    with sqlite3.connect(greed.site.ledger) as connection:
        connection.execute("DROP TRIGGER no_delete")
        connection.execute("DELETE FROM entries WHERE seq = 2")


def no_ledger(greed: Greed) -> None:
    greed.site.ledger.write_bytes(b"")


def forged_ahead(greed: Greed) -> None:
    path = greed.site.root / rollback.FILE
    path.write_text(json.dumps({"seq": 99, "hash": "0" * 64}))


def forged_beside(greed: Greed) -> None:
    path = greed.site.root / rollback.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "hash": "0" * 64}))


def no_log(greed: Greed) -> None:
    path_of(greed.site).unlink()


def torn_log(greed: Greed) -> None:
    content = path_of(greed.site).read_bytes()
    path_of(greed.site).write_bytes(content.replace(b'"seq":', b'"seq": '))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (used_up, "round-spent"),
        (denied, "approval"),
        (closed, "budget"),
        (damaged, "declined"),
        (no_ledger, "declined"),
        (forged_ahead, "declined"),
        (forged_beside, "declined"),
        (no_log, "declined"),
        (torn_log, "declined"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_a_refusal_comes_before_the_data(
    greed: Greed, harm: Callable[[Greed], None], expected: str
) -> None:
    assert isinstance(greed.prepare(), Prepared)
    harm(greed)
    greed.restart()
    before = list(greed.trained)
    task = greed.task(1)
    WATCH.seen.clear()
    WATCH.folders = (str(greed.site.dicom), str(greed.site.labels))
    other = replace(task, run="other")
    asked: list[RoundMessage] = [
        task,
        Exchange(task.study, "run", 1, 5, octets()),
        EvaluateTask(task.study, "run", 1, 5, octets(), task.vector),
        other,
    ]
    reasons = [reason(ask(greed.site, one)) for one in asked]
    assert reasons[0] == expected
    assert reasons[3] == ("budget" if harm is used_up else expected)
    if harm is not used_up:
        assert set(reasons) == {expected}
        assert reason(greed.prepare()) == expected
    assert WATCH.seen == []
    assert greed.trained == before


def test_what_is_not_refused_is_read(greed: Greed) -> None:
    """Or the tests above could not fail."""
    assert isinstance(greed.prepare(), Prepared)
    greed.restart()
    WATCH.seen.clear()
    WATCH.folders = (str(greed.site.dicom), str(greed.site.labels))
    assert isinstance(greed.train(1), Update)
    assert WATCH.seen
