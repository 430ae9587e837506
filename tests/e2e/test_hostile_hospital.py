"""One enrolled hospital lies in every round of a real run: the run ends, and the others' way.

Real processes, TLS, privacy on. The hostile site is one of four; it takes part as the product does,
and answers each request to train with something malformed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from cloister_fl.client.app import app
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.protocol.round_messages import SITE_KEY
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import draw_federation
from cloister_fl.study.file import parse_study
from support import coordinator_process
from support.coordinator_process import wait_for
from support.deployment import Deployment, deployed, study_text
from support.hand_driven_node import HandDrivenNode, Sent, driven, raw

POLICY = {
    "max_epsilon_study": "8.0",
    "max_epsilon_lifetime": "100.0",
    "colluders": "0",
    "min_sites": "3",
}
ROUNDS = 3
ASKED = {
    "training": {"rounds": ROUNDS, "expected_batch": 24},
    "privacy": {"epsilon": 2.0},
    "aggregation": {"min_sites": 3, "colluders": 0},
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    drawn = tmp_path_factory.mktemp("data") / "drawn"
    small = [replace(hospital, patients=24, prevalence=0.5) for hospital in HOSPITALS[:4]]
    draw_federation(drawn, seed=5, hospitals=small, holdout_patients=20)
    sites = {path.name: path for path in sorted((drawn / "sites").iterdir())}
    with deployed(tmp_path_factory.mktemp("federation"), sites, policy=POLICY) as made:
        yield made


class Liar:
    """A hospital that does as it is asked until it is asked to train."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lies = itertools.cycle((self._lacks_a_child, self._no_message, self._no_time))
        self.lied = 0

    def __call__(self, node: HandDrivenNode, message: Message) -> None:
        if message.metadata.message_type == "train":
            self.lied += 1
            node.send(next(self.lies)(node, message))
            return
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node.node,
            node_config={SITE_KEY: str(self.folder)},
            state=RecordDict(),
            run_config={},
        )
        node.send(node.written(app(message, context).content, message))

    def _lacks_a_child(self, node: HandDrivenNode, message: Message) -> Sent:
        return node.written(RecordDict(), message).with_root(raw("Message", ("0" * 64,), b""))

    def _no_message(self, node: HandDrivenNode, message: Message) -> Sent:
        return node.written(RecordDict(), message).with_root(raw("ConfigRecord", (), b""))

    def _no_time(self, node: HandDrivenNode, message: Message) -> Sent:
        sent = node.written(RecordDict(), message)
        sent.head.metadata.created_at = float("nan")
        return sent


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hospital_that_lies_in_every_round_ends_no_run_and_costs_nobody_a_round(
    four: Deployment,
) -> None:
    *others, name = sorted(four.hospitals)
    hostile = four.hospitals[name]
    hostile.stop()
    node = HandDrivenNode(coordinator_process.Hospital(four.server, hostile.site))
    liar = Liar(hostile.folder)
    text = study_text("hostile-hospital", **ASKED)
    study = parse_study(text)
    with driven({node: liar}):
        run = four.run(text)
        four.approve(study)
        summary = four.wait_for_end(run, within=1500)
    # It has no place in the keys of the round after a lie, and is asked again in the next.
    assert liar.lied > 1
    assert summary["rounds"] == ROUNDS
    assert summary["rounds_lost"] == []
    assert list(summary["refused"]) == [name]
    assert summary["refused"][name] in {"unreadable", "declined"}
    for other in others:
        site = four.hospitals[other].site
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        started = [entry.body["round"] for entry in ledger.entries() if entry.kind == "started"]
        assert [int(str(number)) for number in started] == [1, 2, 3]
    # What the run took of the disk is given back.
    database = four.place.state / "flower.sqlite"
    log = database.with_name(database.name + "-wal")
    wait_for(lambda: not log.exists() or log.stat().st_size < 1 << 20, 30, four.told)
    assert database.stat().st_size < 2 << 20
