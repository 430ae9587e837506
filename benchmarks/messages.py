"""What a round's message costs a hospital beyond training, by how many rounds it was charged for.

    python benchmarks/messages.py [--rounds N] [--cold]

Five hospitals with 0, 1, 100, 1,000 and 5,000 charged rounds behind them take part in one run of a
simulation: the product's ClientApp and ServerApp, in this process, with secure aggregation and
patient-level privacy. Training is replaced by an update that is there already, and the network is
small, so what is measured is the message: admission, charge, masks, audit log, answer. The
hospitals take turns, so that what else runs on the machine falls on all of them.

The histories are written as the product writes them: studies of 20 rounds each with its own noise,
four entries a round in the ledger and five in the audit log. The rounds of the run itself come on
top; the first two are not counted.

CPU seconds are of the whole process, the least and the median over the rounds. The last line is
JSON: the least cost after 5,000 rounds over that after 1; ``sqlite3.connect`` and whole readings of
ledger or audit log in a train message, at most. With --cold, the cost of the first message of a
process that has verified nothing: it reads ledger and log whole; imports are not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from flwr.app import Context, Message

from cloister_fl.audit_log import log as audit_log
from cloister_fl.client import app as client
from cloister_fl.client.ledger import chain, ledger_file
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import path_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.protocol.round_messages import kind_of
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from support.federations import study, write_cohort

CHARGED = {"dorn": 0, "anker": 1, "birke": 100, "clara": 1000, "esche": 5000}
ROUNDS_A_STUDY = 20
STARTING = 2
"""Rounds of the run that are not counted."""


def write_history(site: Site, rounds: int) -> None:
    """Give a site so many charged rounds, in its ledger, its notes and its audit log."""
    Ledger.open(site.ledger, delta=site.policy.ledger_delta).shut()
    entries = _LogWriter(path_of(site))
    with ledger_file.transaction(site.ledger) as connection:
        for number in range(rounds):
            study_number, round_number = divmod(number, ROUNDS_A_STUDY)
            digest = hashlib.sha256(str(study_number).encode()).hexdigest()
            of_run = {"study": digest, "run": f"run-{study_number}"}
            if round_number == 0:
                ledger_file.append(connection, "reserved", {**of_run, **_terms(study_number)})
            epoch = hashlib.sha256(f"epoch {number}".encode()).hexdigest()
            ledger_file.append(connection, "epoch", {"study": digest, "epoch": epoch})
            of_sum = {"study": digest, "sum": 2 * (round_number + 1)}
            ledger_file.append(connection, "round", {**of_sum, "constants": epoch})
            started = ledger_file.append(
                connection, "started", {**of_run, "round": round_number + 1, "steps": 2}
            )
            ledger_file.append(connection, "answered", {**of_sum, "survivors": list(CHARGED)})
            entries.message("train", of_run["run"])
            entries.add("ledger", ledger_seq=started.seq, ledger_hash=started.hash)
            entries.answer(of_run["run"])
            entries.message("exchange", of_run["run"])
            entries.answer(of_run["run"])
    entries.close()
    session = SiteSession(site)
    session.note()
    session.close()


def _terms(number: int) -> dict[str, Any]:
    return {
        "noise_multiplier": 200.0 + number,
        "sampling_rate": 0.5,
        "steps": 2 * ROUNDS_A_STUDY,
        "delta": 1e-5,
        "limit_study": 6.0,
        "limit_lifetime": 1000.0,
        "release_noise_multiplier": None,
        "release_unstarted": False,
    }


class _LogWriter:
    """An audit log written in one go, as one message after the other would have."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._head = audit_log.EMPTY
        self._fsync = os.fsync
        os.fsync = lambda _: None  # type: ignore[assignment]  # Nothing here must outlive a power cut.

    def add(self, kind: str, **body: Any) -> None:
        self._head = audit_log.write(self._file, self._head, kind, body)

    def message(self, kind: str, run: str) -> None:
        self.add(
            "asked", message=kind, bytes=4096, sha256="5" * 64, peer_head=f"{run}:1:" + "a" * 64
        )

    def answer(self, run: str) -> None:
        self.add(
            "sent", message="exchanged", bytes=4096, sha256="6" * 64, to="coordinator",
            why="keys, sealed shares and masked vectors of secure aggregation", run=run,
        )  # fmt: skip

    def close(self) -> None:
        self._file.close()
        os.fsync = self._fsync


class Counted:
    """Calls of what must not be called once a site is verified."""

    def __init__(self) -> None:
        self.connects = self.replays = 0
        self._count(sqlite3, "connect", "connects")
        self._count(chain, "read", "replays")
        self._count(audit_log, "chained", "replays")

    def _count(self, where: Any, name: str, what: str) -> None:
        honest = getattr(where, name)

        def counting(*given: Any, **named: Any) -> Any:
            setattr(self, what, getattr(self, what) + 1)
            return honest(*given, **named)

        setattr(where, name, counting)


class Meter:
    """The product's ClientApp, and what each train message costs."""

    def __init__(self, counted: Counted) -> None:
        self.costs: dict[str, list[float]] = {name: [] for name in CHARGED}
        self.last: dict[str, tuple[Message, Context]] = {}
        self.connects = self.replays = 0
        self._counted = counted
        self._seen: dict[str, int] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        if kind_of(message.content) != "train":
            return client.app(message, context)
        self.last[name] = (message, context)
        before = (self._counted.connects, self._counted.replays)
        started = time.process_time()
        reply = client.app(message, context)
        cost = time.process_time() - started
        self._seen[name] = self._seen.get(name, 0) + 1
        if self._seen[name] > STARTING:
            self.costs[name].append(cost)
            self.connects = max(self.connects, self._counted.connects - before[0])
            self.replays = max(self.replays, self._counted.replays - before[1])
        return reply


def untrained() -> Callable[..., Any]:
    """What stands for training: an update that is there already."""
    made: dict[int, Any] = {}

    def train_round(module: Any, *_: Any, **__: Any) -> Any:
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if size not in made:
            made[size] = np.random.default_rng(1).normal(0, 0.01, size).astype(np.float32)
        return made[size]

    return train_round


def prepared(folder: Path, asked: Study) -> None:
    """Write the hospitals, with their histories."""
    policy = Policy(
        patients_at_most=1_000,
        max_epsilon_study=6.0,
        max_epsilon_lifetime=1000.0,
        approve="listed",
        approved_hashes=(asked.digest,),
    )
    for number, (name, rounds) in enumerate(CHARGED.items()):
        write_cohort(folder / name, np.random.default_rng(number), name, images=1)
        write_history(init_site(folder / name, name=name, policy=policy), rounds)


def cold_cost(message: Message, context: Context) -> float:
    """CPU seconds of a message to an app that has verified nothing, as after a restart."""
    started = time.process_time()
    client.SiteApp()(message, context)
    return time.process_time() - started


def main() -> None:
    """Measure, and print one line for each hospital."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=22, help="rounds of the run")
    parser.add_argument("--cold", action="store_true", help="the first message of a process, too")
    options = parser.parse_args()
    asked = study(training=f"rounds = {options.rounds}")
    client.train_round = untrained()
    counted = Counted()
    meter = Meter(counted)
    with tempfile.TemporaryDirectory() as work:
        prepared(Path(work) / "sites", asked)
        run_simulation(
            Simulation(asked, Path(work) / "sites", Path(work) / "run"), client_app=meter
        )
        cold = {name: cold_cost(*meter.last[name]) for name in CHARGED} if options.cold else {}
    print(
        f"{'charged before':>14} {'least, ms':>10} {'median, ms':>11}" + "   cold, ms" * bool(cold)
    )
    for name, rounds in CHARGED.items():
        costs = meter.costs[name]
        row = f"{rounds:>14,} {1e3 * min(costs):>10.1f} {1e3 * statistics.median(costs):>11.1f}"
        print(row + (f" {1e3 * cold[name]:>10.0f}" if cold else ""))
    told = {
        "growth": round(min(meter.costs["esche"]) / min(meter.costs["anker"]), 3),
        "connects": meter.connects,
        "replays": meter.replays,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
