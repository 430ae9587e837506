"""What a round costs beyond training: Cloister beside plain Flower, five sites on loopback.

    python benchmarks/round.py [--rounds N]

Both train nothing: a site answers at once with an update of the model's size (ResNet-18, 11.2
million parameters, 45 MB). Everything else is as deployed, with TLS, in processes of its own:

- Cloister: secure aggregation, the privacy ledger, the audit logs of both sides, the policy gate,
  client certificates; two round trips a round.
- Flower 1.41: FedAvg as its documentation has it, with the model as 60 arrays, no SuperNode
  authentication; one round trip a round. And, beside it, with the model as one array.

Seconds a round are the median over the rounds after the first, from the coordinator's clock;
CPU seconds are of all processes of the federation. The last line is JSON: ours over Flower's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import draw_federation
from cloister_fl.study.file import parse_study
from cloister_fl.study.initial_model import bind
from support import deployment
from support.coordinator_process import free_ports, reachable, wait_for

SITES = 5
PARAMETERS = 11_200_000
STUDY = """\
[study]
name = "round"
question = "What does a round cost?"

[input]
size = 32

[target]
column = "finding"
classes = ["normal", "nodule"]

[network]
name = "resnet18"

[training]
rounds = {rounds}
sampling_rate = 0.5

[privacy]
epsilon = 6.0
"""
POLICY = {"max_epsilon_study": "8.0", "max_epsilon_lifetime": "30.0"}

FLOWER = """\
[project]
name = "plain"
version = "1.0.0"
description = ""
license = "Apache-2.0"

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "plain.server:app"
clientapp = "plain.client:app"
"""
FLOWER_CLIENT = """\
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    # Each site's update differs, as in earnest: Flower sends no array that it has seen before.
    change = np.float32(1e-3 * (context.node_id % 997 + 1))
    arrays = {
        name: Array(array.numpy() + change) for name, array in message.content["arrays"].items()
    }
    content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content=content, reply_to=message)
"""
FLOWER_SERVER = """\
import time

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        made = super().aggregate_train(server_round, replies)
        with open({log!r}, "a") as file:
            file.write(f"{{time.time()}}\\n")
        return made


@app.main()
def main(grid, context):
    size = {parameters} // {arrays}
    random = np.random.default_rng(0)
    arrays = {{
        f"p{{i}}": Array(random.standard_normal(size, np.float32)) for i in range({arrays})
    }}
    strategy = Timed(
        fraction_evaluate=0.0, min_train_nodes={sites}, min_available_nodes={sites}
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds={rounds})
"""


@dataclass
class Cost:
    """Seconds a round, and CPU seconds of the whole federation a round."""

    wall: float
    cpu: float


def cpu_of(roots: list[int]) -> float:
    """CPU seconds of processes and all their children, those that ended included."""
    total = 0.0
    for root in roots:
        for pid in [root, *deployment.descendants(root)]:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def ours(base: Path, rounds: int) -> tuple[Cost, float]:
    """Cost of a round of Cloister's, and CPU seconds a second while nothing happens."""
    data = base / "data"
    small = [replace(hospital, patients=24, prevalence=0.5) for hospital in HOSPITALS]
    draw_federation(data, seed=1, hospitals=small, holdout_patients=10)
    sites = {path.name: path for path in sorted((data / "sites").iterdir())}
    text = STUDY.format(rounds=rounds)
    with _deployed(base / "ours", sites) as made:
        roots = [made.server.process.pid]
        roots += [each.process.pid for each in made.hospitals.values() if each.process]
        time.sleep(65)  # Past the minute in which a node still looks often.
        before = cpu_of(roots)
        time.sleep(20)
        idle = (cpu_of(roots) - before) / 20
        name = made.run(text)
        made.approve(bind(parse_study(text)))
        status = made.folder / "runs" / name / "status.json"
        ended, spent = [], []
        seen = 0
        while len(ended) < rounds:
            told = json.loads(status.read_text()) if status.exists() else {}
            assert told.get("state") != "failed", made.told()
            if told.get("state") in {"training", "done"} and told["round"] > seen:
                seen = told["round"]
                ended.append(time.monotonic())
                spent.append(cpu_of(roots))
            time.sleep(0.02)
        made.wait_for_end(name)
    return _cost(ended, spent), idle


@contextlib.contextmanager
def _deployed(base: Path, sites: dict[str, Path]) -> Iterator[deployment.Deployment]:
    real = subprocess.Popen
    site = str(Path(__file__).with_name("round_site.py"))

    def ours_instead(arguments: list[str], **more: object) -> object:
        if "client" in arguments and "start" in arguments:
            arguments = [sys.executable, site, arguments[-1]]
        return real(arguments, **more)  # type: ignore[call-overload]

    base.mkdir(parents=True)
    deployment.subprocess.Popen = ours_instead  # type: ignore[assignment,misc]
    try:
        with deployment.deployed(base, sites, policy=POLICY) as made:
            yield made
    finally:
        deployment.subprocess.Popen = real  # type: ignore[misc]


def flowers(base: Path, rounds: int, arrays: int) -> Cost:
    """Cost of a round of Flower's own, the model in so many arrays."""
    from cloister_fl.membership.ec_keys import Purpose, generate_pem, load_private
    from cloister_fl.server.coordinator.certificate_authority import Authority, pem

    base.mkdir(parents=True)
    keys = base / "keys"
    keys.mkdir(mode=0o700)
    authority = Authority.create(keys, "bench")
    key = generate_pem(Purpose.TLS)
    certificate = authority.server_certificate(
        load_private(key, Purpose.TLS).public_key(), ("127.0.0.1",)
    )
    (base / "server.key").write_bytes(key)
    (base / "server.pem").write_bytes(pem(certificate) + pem(authority.certificate))
    (base / "ca.pem").write_bytes(pem(authority.certificate))
    log = base / "rounds.log"
    app = base / "app"
    (app / "plain").mkdir(parents=True)
    (app / "pyproject.toml").write_text(FLOWER)
    (app / "plain" / "__init__.py").write_text("")
    (app / "plain" / "client.py").write_text(FLOWER_CLIENT)
    (app / "plain" / "server.py").write_text(
        FLOWER_SERVER.format(
            log=str(log), parameters=PARAMETERS, arrays=arrays, sites=SITES, rounds=rounds
        )
    )
    port, *nodes = free_ports(1 + SITES)
    env = {
        **deployment.environment(),
        "FLWR_HOME": str(base / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    commands = [
        ["flower-superlink", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key",
         "--ssl-ca-certfile", "ca.pem", "--host", "127.0.0.1", "--port", str(port),
         "--database", "flower.sqlite", "--disable-runtime-dependency-installation"],
        *(
            ["flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates",
             "ca.pem", "--host", "127.0.0.1", "--port", str(node)]
            for node in nodes
        ),
    ]  # fmt: skip
    started = []
    try:
        for number, command in enumerate(commands):
            with (base / f"{number}.log").open("wb") as out:
                started.append(subprocess.Popen(command, cwd=base, env=env, stdout=out, stderr=out))
            if number == 0:
                wait_for(lambda: reachable(("127.0.0.1", port)), 120, lambda: "no superlink")
        _submit(app, f"127.0.0.1:{port}", base / "ca.pem")
        roots = [process.pid for process in started]
        spent: list[float] = []

        def done() -> bool:
            count = len(log.read_text().splitlines()) if log.exists() else 0
            while len(spent) < count:
                spent.append(cpu_of(roots))
            return count >= rounds

        wait_for(done, 900, lambda: (base / "0.log").read_text()[-3000:])
        return _cost([float(line) for line in log.read_text().splitlines()], spent)
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            deployment.end(process)


def _submit(app: Path, address: str, ca: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
    )
    fab = Fab("", build_fab_from_disk(app), {})
    assert client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).HasField("run_id")


def _cost(ended: list[float], spent: list[float]) -> Cost:
    walls = [b - a for a, b in itertools.pairwise(ended)]
    cpus = [b - a for a, b in itertools.pairwise(spent)]
    return Cost(statistics.median(walls), statistics.median(cpus))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        print(f"{'':28} {'s/round':>8} {'CPU s':>8}")
        cloister, idle = ours(base, rounds)
        print(f"{'Cloister, all on':28} {cloister.wall:>8.1f} {cloister.cpu:>8.1f}", flush=True)
        sixty = flowers(base / "sixty", rounds, 60)
        print(f"{'Flower, 60 arrays':28} {sixty.wall:>8.1f} {sixty.cpu:>8.1f}", flush=True)
        one = flowers(base / "one", rounds, 1)
        print(f"{'Flower, one array':28} {one.wall:>8.1f} {one.cpu:>8.1f}", flush=True)
        print(f"Cloister while nothing happens: {100 * idle:.1f} % of a core, all 16 processes")
        told = {
            "round_vs_flower": cloister.wall / sixty.wall,
            "cpu_vs_flower": cloister.cpu / sixty.cpu,
            "round_vs_flower_one_array": cloister.wall / one.wall,
            "idle_cores": idle,
        }
        print(json.dumps({name: round(value, 4) for name, value in told.items()}))


if __name__ == "__main__":
    main()
