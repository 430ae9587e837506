"""Killed with -9 at any moment, a deployment comes back: its runs end, and no account is short.

One federation of real processes lives through seeded kills: of the coordinator's server, of the
process that executes the run, of a hospital's node, its executor or its whole service. The server
and the services are started again as systemd would; everything else must come back by itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from cloister_fl import audit_log
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of, path_of
from cloister_fl.client.training.local_training import train_round
from cloister_fl.networks import flat_parameters, registry
from cloister_fl.protocol import sessions
from cloister_fl.secagg.fixed_point import decode
from cloister_fl.server.rounds.strategies import OptimizerState, step
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import draw_federation
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support.coordinator_process import wait_for
from support.deployment import (
    Deployment,
    alive,
    children_of,
    cloister,
    deployed,
    descendants,
    study_text,
)
from support.federations import SEEN

POLICY = {
    "max_epsilon_study": "8.0",
    "max_epsilon_lifetime": "60.0",
    "allow_without_privacy": "true",
}
END_S = 600.0
"""Within this a run that was hit goes on or ends by itself, on the slowest machine."""
GONE_S = 5.0
"""Within this a killed process's children are gone."""
VICTIMS = ("server", "run_executor", "service", "node", "executor")
SERVICES = ("server", "service")
"""What systemd starts again."""


@dataclass(frozen=True)
class Kill:
    """One planned kill.

    Attributes:
        victim: server, run_executor, service, node or executor.
        entries: lines that the coordinator's audit log must grow by before it.
        delay: seconds after that.
        down: seconds until what systemd starts is started again.
        site: number of the hospital.
    """

    victim: str
    entries: int
    delay: float
    down: float
    site: int

    @classmethod
    def drawn(cls, victim: str, drawing: random.Random, latest: int = 22) -> Kill:
        return cls(
            victim,
            drawing.randint(1, latest),
            drawing.uniform(0, 0.6),
            drawing.uniform(0, 3),
            drawing.randrange(len(HOSPITALS)),
        )


@dataclass
class Ended:
    """A run that was hit, and how it ended."""

    name: str
    study: Study
    summary: dict[str, Any]
    how: str
    hits: list[str]
    seconds: float


@dataclass
class Battered:
    """A federation, and every process that was ever seen in it."""

    federation: Deployment
    data: Path
    seen: dict[int, str] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)

    def look(self) -> None:
        """Note which processes there are now."""
        roots = [self.federation.server.process.pid]
        roots += [each.process.pid for each in self._hospitals() if each.process is not None]
        for root in roots:
            for pid in (root, *descendants(root)):
                self.seen.setdefault(pid, born(pid))

    def left(self) -> list[str]:
        """What still runs of all that was ever seen, or that speaks of our folder."""
        found = [pid for pid, birth in self.seen.items() if alive(pid) and born(pid) == birth]
        mark = str(self.federation.base).encode()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = (path / "cmdline").read_bytes()
                with contextlib.suppress(OSError):
                    told += (path / "environ").read_bytes()
                if mark in told and alive(int(path.name)):
                    found.append(int(path.name))
        return [f"{pid} {command(pid)}" for pid in sorted({*found} - {os.getpid()})]

    def run(self, study: str, kills: list[Kill]) -> Ended:
        """Run a study, and kill while it runs; kills that it did not live to see are left."""
        federation, parsed = self.federation, parse_study(study)
        for hospital in self._hospitals():
            judge(hospital.site, parsed, Decision.APPROVED, data=SEEN)
        mark = self._entries()
        began = time.monotonic()
        name = federation.run(study)
        hits: list[str] = []
        how = "by itself"
        end = time.monotonic() + END_S
        while True:
            self.look()
            state = federation.status(name).get("state")
            if state in {"done", "failed", "stopped"}:
                break
            assert time.monotonic() < end, (hits, federation.status(name), federation.told())
            if kills and self._entries() - mark >= kills[0].entries:
                kill = kills.pop(0)
                time.sleep(kill.delay)
                before = federation.status(name)
                if before.get("state") in {"done", "failed", "stopped"}:
                    kills.insert(0, kill)
                    break
                where = f"round {before.get('round', 0)}, {before.get('told')}"
                hits.append(f"{self._strike(kill)} at {time.monotonic() - began:.0f} s ({where})")
                mark = self._entries()
                end = time.monotonic() + END_S
            time.sleep(0.05)
        status = federation.status(name)
        if status["state"] != "done":
            how = f"resumed after {status['code']}: {status['told']}"
            cloister("server", "resume", name, "--dir", federation.folder, "--no-follow")
        summary = federation.wait_for_end(name, END_S)
        ended = Ended(name, parsed, summary, how, hits, time.monotonic() - began)
        self.ended.append(ended)
        lost = summary["rounds_lost"]
        told = f"{name}: {how}, {ended.seconds:.0f} s, rounds lost {lost}"
        print(told, *hits, sep="\n   ")  # noqa: T201  # for who runs it with -s
        self.wait()
        return ended

    def wait(self) -> None:
        """Until every hospital serves again, by itself."""
        for hospital in self._hospitals():
            hospital.wait()
        self.look()

    def _strike(self, kill: Kill) -> str:
        federation = self.federation
        hospital = self._hospitals()[kill.site]
        if kill.victim == "server":
            pid, told = federation.server.process.pid, "server"
        elif kill.victim == "run_executor":
            pid, told = (
                self._child(lambda: federation.server.process.pid, "run_executor"),
                "run_executor",
            )
        else:
            assert hospital.process is not None
            service = hospital.process.pid
            told = f"{kill.victim} of {hospital.folder.name}"
            pid = service if kill.victim == "service" else self._child(lambda: service, kill.victim)
        below = {each: born(each) for each in descendants(pid)}
        self.look()
        os.kill(pid, signal.SIGKILL)
        wait_for(
            lambda: not any(alive(each) and born(each) == birth for each, birth in below.items()),
            GONE_S,
            lambda: f"{told}: {[command(each) for each in below if alive(each)]}",
        )
        if kill.victim in SERVICES:
            time.sleep(kill.down)
            if kill.victim == "server":
                federation.server.process.wait()
                federation.restart_server()
            else:
                hospital.process.wait()
                hospital.start(wait=False)
        return told

    def _child(self, parent: Any, name: str) -> int:
        wait_for(lambda: name in children_of(parent()), 60, lambda: f"no {name}")
        return children_of(parent())[name]

    def _hospitals(self) -> list[Any]:
        return list(self.federation.hospitals.values())

    def log(self) -> Path:
        return self.federation.place.keys / "audit.jsonl"

    def _entries(self) -> int:
        return self.log().read_bytes().count(b"\n") if self.log().exists() else 0


def born(pid: int) -> str:
    """When a process began, in the kernel's own count; tells it from another with its number."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:300]
    return ""


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battered]:
    data = tmp_path_factory.mktemp("data") / "drawn"
    small = [replace(hospital, patients=24, prevalence=0.5) for hospital in HOSPITALS]
    draw_federation(data, seed=5, hospitals=small, holdout_patients=20)
    sites = {path.name: path for path in sorted((data / "sites").iterdir())}
    with deployed(tmp_path_factory.mktemp("battered"), sites, policy=POLICY) as made:
        started = Battered(made, data)
        started.look()
        yield started
        started.look()
    wait_for(lambda: not started.left(), GONE_S, lambda: f"left behind: {started.left()}")


def _asked(name: str, seed: int, rounds: int, rate: float, privacy: Mapping[str, Any]) -> str:
    training = {
        "rounds": rounds,
        "steps": 2,
        "sampling_rate": rate,
        "expected_batch": 24,
        "images_per_patient": 2,
        "seed": seed,
    }
    evaluation = {"site_fraction": 0.0}
    return study_text(name, training=training, privacy=privacy, evaluation=evaluation)


def plain(name: str, seed: int, rounds: int = 3) -> str:
    """Without privacy: the same model whenever the same sites are in the sums."""
    return _asked(name, seed, rounds, rate=1.0, privacy={"enabled": False})


def private(name: str, seed: int, rounds: int = 3) -> str:
    """With privacy, which hospitals pay for."""
    return _asked(name, seed, rounds, rate=0.5, privacy={"epsilon": 6.0})


def summed(battered: Battered, ended: Ended) -> dict[int, tuple[str, ...]]:
    """Which sites are in the model, by round, as the coordinator's audit log says.

    A round that was summed and not saved is done again, or lost; its last note counts.
    """
    lost, found = set(ended.summary["rounds_lost"]), {}
    for entry in audit_log.read(battered.log()):
        if entry.kind == "summed" and entry.body["run"] == ended.summary["run"]:
            found[int(str(entry.body["round"]))] = tuple(str(entry.body["sites"]).split())
    rounds = range(1, ended.study.training.rounds + 1)
    assert ended.summary["rounds"] == len(rounds)
    kept = {number: sites for number, sites in found.items() if number not in lost}
    assert sorted({*kept, *lost}) == list(rounds)
    return kept


def model_of(folder: Path) -> np.ndarray:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return np.concatenate([file.get_tensor(name).reshape(-1) for name in sorted(file.keys())])


def recomputed(battered: Battered, ended: Ended, kept: dict[int, tuple[str, ...]]) -> np.ndarray:
    """The model that sums over just these sites give, in whole numbers, by the product's parts."""
    study, federation = ended.study, battered.federation
    cohorts = {
        name: load_cohort(hospital.site, study) for name, hospital in federation.hospitals.items()
    }
    module = registry.build(
        study.network, outputs=study.task.outputs, size=study.input.size, seed=study.training.seed
    )
    model = flat_parameters.flatten(module)
    state = OptimizerState.fresh(model.size, study.aggregation)
    for number, sites in sorted(kept.items()):
        flat_parameters.load(module, model)
        session = sessions.update_session(
            study, sorted(cohorts), round_number=number, attempt=0, model=model
        )
        weights = {site: study.aggregation.weight(site) for site in sites}
        total = np.zeros(model.size, np.int64)
        for site in sites:
            update = train_round(
                module, cohorts[site], study, noise_multiplier=0.0, random=None,
                round_number=number, steps=study.training.steps_per_round, site=site,
            )  # fmt: skip
            total += np.rint(update * np.float32(weights[site] * session.scale)).astype(np.int64)
        mean = decode(
            total.astype(np.int32).view(np.uint32), divisor=session.scale * sum(weights.values())
        )
        model, state = step(model, mean, state, study.aggregation)
    flat_parameters.load(module, model)
    tensors = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def assert_right_model(battered: Battered, ended: Ended, out: Path) -> None:
    """Without privacy: the model is the one that the audit log says it is, to the last bit."""
    kept = summed(battered, ended)
    folder = battered.federation.folder / "runs" / ended.name
    ours = model_of(folder)
    assert np.array_equal(ours, recomputed(battered, ended, kept))
    if all(len(sites) == len(HOSPITALS) for sites in kept.values()) and len(kept) == (
        ended.study.training.rounds
    ):
        run_simulation(Simulation(ended.study, battered.data / "sites", out / ended.name))
        assert np.array_equal(ours, model_of(out / ended.name))


def assert_accounts(battered: Battered, ended: Ended) -> None:
    """With privacy: no ledger says less than was spent, and no figure says less than a ledger."""
    kept = summed(battered, ended)
    ours = model_of(battered.federation.folder / "runs" / ended.name)
    assert np.isfinite(ours).all()
    asked = asked_rounds(battered, ended)
    for name, hospital in battered.federation.hospitals.items():
        ledger = Ledger.open(hospital.site.ledger, delta=hospital.site.policy.ledger_delta)
        ledger.verify()
        started = [
            int(entry.body["round"])
            for entry in ledger.entries()
            if entry.kind == "started" and entry.body["study"] == ended.study.digest
        ]
        assert len(started) == len(set(started))
        in_sums = {number for number, sites in kept.items() if name in sites}
        assert in_sums <= set(started), name
        # Whatever trained answered with a vector, in a sum or not.
        assert answered_rounds(hospital.site, asked, ours.size) <= set(started), name
        spent = ledger.epsilon_study(ended.study.digest, ended.study.privacy.delta)
        claimed = ended.summary["epsilon_per_site"].get(name, 0.0)
        assert claimed >= spent - 1e-9, (name, claimed, spent)
        assert claimed <= 6.0 + 1e-6


def asked_rounds(battered: Battered, ended: Ended) -> dict[str, int]:
    """The coordinator's orders to train in this run: round by hash of the log's entry."""
    began = 0
    found = {}
    for entry in audit_log.read(battered.log()):
        if entry.kind == "sent" and entry.body["message"] == "train":
            found[entry.hash] = (entry.seq, int(str(entry.body["round"])))
        if entry.kind == "began" and entry.body["run"] == ended.summary["run"]:
            began = began or entry.seq
    return {digest: number for digest, (seq, number) in found.items() if seq > began}


def answered_rounds(site: Any, asked: dict[str, int], size: int) -> set[int]:
    """Rounds for which a masked vector left a site, as its own audit log says."""
    found, number = set(), 0
    for entry in entries_of(site):
        if entry.kind == "asked":
            note = audit_log.parse_note(str(entry.body["peer_head"]))
            number = asked.get(note.hash, 0) if note and entry.body["message"] == "train" else 0
        elif entry.kind == "sent" and number and int(str(entry.body["bytes"])) >= 4 * size:
            found.add(number)
    return found


def assert_sound(battered: Battered) -> None:
    """Both sides' logs are whole, and fit each other."""
    coordinator = battered.log()
    for hospital in battered.federation.hospitals.values():
        theirs = path_of(hospital.site)
        assert audit_log.examine(theirs, peer=coordinator).findings == ()
        assert audit_log.examine(coordinator, peer=theirs).findings == ()


@pytest.mark.slow
def test_a_run_outlives_kills(battered: Battered, tmp_path: Path) -> None:
    drawing = random.Random(3)
    victims = ("executor", "server", "node")
    kills = [Kill.drawn(victim, drawing, latest=12) for victim in victims]
    ended = battered.run(plain("quick", 1, rounds=2), kills)
    assert not kills
    assert_right_model(battered, ended, tmp_path)
    assert_sound(battered)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("seed", "study"), [(11, plain), (12, private), (13, plain), (14, private), (15, plain)]
)
def test_a_run_outlives_the_kill_of_every_process(
    battered: Battered, tmp_path: Path, seed: int, study: Callable[..., str]
) -> None:
    drawing = random.Random(seed)
    kills = [Kill.drawn(victim, drawing) for victim in drawing.sample(VICTIMS, len(VICTIMS))]
    for number in range(1, 5):
        ended = battered.run(study(f"kills-{seed}-{number}", 10 * seed + number, rounds=4), kills)
        if ended.study.privacy.enabled:
            assert_accounts(battered, ended)
        else:
            assert_right_model(battered, ended, tmp_path)
        assert_sound(battered)
        if not kills:
            return
    pytest.fail(f"these kills came too late: {kills}")
