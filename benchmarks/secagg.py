"""What secure aggregation costs: `secagg/v2` beside Flower's SecAgg+ and a plain sum.

    python benchmarks/secagg.py [--quick | --requests] [--millions D ...] [--sites N ...]

Flower's own code runs in the same process, on the same vectors: its client's
`_collect_masked_vectors` as it stands, and the primitives of its server's unmasking in the order
of its workflow. Times are CPU seconds of the process, the least of several runs, wall seconds
beside them. The last line is JSON: the worst ratios over D >= 11 million, and the
requests of 100 sites.

- client: stage 2, from the server's request to the signed reply: signatures and boxes checked,
  update encoded, masked, hashed, signed. Flower's: from its configuration to its reply.
- server unmask: stage 4 with one dropout, from the replies to the mean: secrets rebuilt and
  checked, masks taken away, sum decoded. n = 3 bears no dropout.
- server sum: the arriving vectors added up. Adding the masked vectors costs what a plain sum
  costs; the ratio counts both it and the unmasking.
- check: hashing the arriving vectors to verify who sent them. A plain sum does not, so it is
  shown beside the ratio.
- requests: of stage 2 to 100 sites, all of them built and encoded; bytes of the largest. No vector
  is in them.
- reply: what a vector costs on its way to the wire: bundled, put into Flower's records, and hashed
  for the audit log.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto import shamir as flower_shamir
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from cloister_fl.protocol.round_messages import Exchanged, described, octets, pack
from cloister_fl.secagg.messages.codec import Bundle, Masked
from support import secagg as kit

flower = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

RANGE = 1 << 32
LEVELS = 1 << 22
SITES = 100
"""Sites whose requests are built."""


@dataclass
class Time:
    cpu: float
    wall: float


def least(work: Callable[[], Any], repeats: int) -> Time:
    """CPU and wall seconds of the run that took least."""
    best = Time(float("inf"), float("inf"))
    for _ in range(repeats):
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        took = Time(time.process_time() - cpu, time.perf_counter() - wall)
        best = min(best, took, key=lambda t: t.cpu)
    return best


@dataclass
class FlowerClient:
    """One client of Flower's, ready for its stage 2."""

    state: Any
    boxes: dict[str, Any]
    parameters: Any

    def run(self) -> dict[str, Any]:
        return flower._collect_masked_vectors(self.state, self.boxes, 100, self.parameters)


def flower_client(n: int, update: np.ndarray) -> FlowerClient:
    key = flower.Key
    states = []
    for number in range(1, n + 1):
        state = flower.SecAggPlusState()
        state.nid = number
        settings = {
            key.SAMPLE_NUMBER: n,
            key.SHARE_NUMBER: n,
            key.THRESHOLD: 2 * n // 3 + 1,
            key.CLIPPING_RANGE: 8.0,
            key.TARGET_RANGE: LEVELS,
            key.MOD_RANGE: RANGE,
            key.MAX_WEIGHT: 1000.0,
        }
        flower._setup(state, settings)
        states.append(state)
    public = {str(state.nid): (state.pk1, state.pk2) for state in states}
    sources, boxes = [], []
    for state in states:
        out = flower._share_keys(state, dict(public))
        for receiver, box in zip(out[key.DESTINATION_LIST], out[key.CIPHERTEXT_LIST], strict=True):
            if receiver == 1:
                sources.append(state.nid)
                boxes.append(box)
    return FlowerClient(
        states[0],
        {key.CIPHERTEXT_LIST: boxes, key.SOURCE_LIST: sources},
        ndarrays_to_parameters([update]),
    )


def flower_unmask(n: int, dimension: int) -> Callable[[], Any]:
    """The primitives of `SecAggPlusWorkflow.unmask_stage`, one of n nodes dropped."""
    t = 2 * n // 3 + 1
    seeds = [flower_shamir.create_shares(bytes([i]) * 32, t, n)[:t] for i in range(n)]
    total = [np.zeros(1, np.int64), np.zeros(dimension, np.int64)]
    shapes = [array.shape for array in total]

    def run() -> Any:
        vector = total
        for shares in seeds[1:]:
            mask = pseudo_rand_gen(flower_shamir.combine_shares(shares), RANGE, shapes)
            vector = parameters_subtraction(vector, mask)
        flower_shamir.combine_shares(seeds[0])
        for number in range(1, n):
            mask = pseudo_rand_gen(bytes([number]) * 32, RANGE, shapes)
            vector = parameters_addition(vector, mask)
        return dequantize(parameters_mod(vector, RANGE)[1:], 8.0, LEVELS)

    return run


def our_client(n: int, update: np.ndarray, repeats: int) -> tuple[Time, int]:
    """Time of stage 2 at one site, and the length of its reply in bytes."""
    best, size = Time(float("inf"), float("inf")), 0
    for _ in range(repeats):
        federation = kit.Federation(n, colluders=0 if n == 3 else 1, dimension=1)
        federation.dimension = update.size
        server = federation.prepared()
        session = federation.session()
        server.start(session)
        name = federation.names[0]
        request, site = kit.over(server.mask_request(name)), federation.sites[name]

        def work() -> Masked:
            site.open(request, session)  # noqa: B023
            return site.mask(request.kid, update, saturate=True)  # noqa: B023

        took = least(work, 1)
        best = min(best, took, key=lambda t: t.cpu)
        size = len(site.mask(request.kid, update, saturate=True).encode())
    return best, size


@dataclass
class ServerCost:
    check: float
    add: Time
    unmask: Time
    peak: float


def our_server(n: int, update: np.ndarray, repeats: int) -> ServerCost:
    """Time to hash, add and unmask n - 1 vectors (n of 3), and peak memory in units of 4 D."""
    federation = kit.Federation(n, colluders=0 if n == 3 else 1, dimension=1)
    federation.dimension = update.size
    server = federation.prepared()
    session = federation.session()
    absent = set(federation.names[-1:]) if n > 3 else set()
    check = add_cpu = add_wall = 0.0
    tracemalloc.start()
    names = server.start(session)
    held = tracemalloc.get_traced_memory()[0]
    for name in names:
        if name in absent:
            continue
        request, site = server.mask_request(name), federation.sites[name]
        site.open(request, session)
        masked = site.mask(request.kid, update, saturate=True)
        cpu = time.process_time()
        assert masked.verified(federation.roster.public_key(name) or b"")
        check += (spent := time.process_time() - cpu)
        cpu, wall = time.process_time(), time.perf_counter()
        server.receive_masked(masked)
        # The second hashing inside is not counted twice.
        add_cpu += max(0.0, time.process_time() - cpu - spent)
        add_wall += max(0.0, time.perf_counter() - wall - spent)
        del masked
        site._epochs[request.kid]._replies.pop("mask")
    federation.consent(server)
    federation.unmask(server)
    masked_sum = server._total
    assert masked_sum is not None
    best = Time(float("inf"), float("inf"))
    peak = 0
    for _ in range(repeats):
        server._total = masked_sum.copy()
        server.phase = type(server.phase).UNMASKING
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        mean: list[np.ndarray] = []

        def work() -> None:
            mean.append(server.finish().mean())  # noqa: B023

        best = min(best, least(work, 1), key=lambda t: t.cpu)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
        worst = float(np.abs(mean[0] - update).max())
        assert worst < 2 * n / session.scale + 1e-7, worst
    tracemalloc.stop()
    del held
    # The accumulator itself was there before the peak was counted from.
    return ServerCost(check, Time(add_cpu, add_wall), best, 1 + peak / (4 * update.size))


def plain_sum(n: int, update: np.ndarray, repeats: int) -> Time:
    """FedAvg on the server without any protection: n float32 vectors, weighted and added."""
    weight = np.float32(1 / n)

    def work() -> np.ndarray:
        total = np.zeros(update.size, np.float32)
        for _ in range(n):
            total += update * weight
        return total

    return least(work, repeats)


def requests(n: int, repeats: int) -> tuple[Time, int]:
    """Time of building and encoding the stage-2 requests to all of n sites, and bytes of one."""
    sites = tuple(f"site-{number:03d}" for number in range(n))
    federation = kit.Federation(n, dimension=1, names=sites)
    server = federation.prepared()
    names = server.start(federation.session())
    sizes: list[int] = []

    def work() -> None:
        for shares in server._shares.values():
            # Kept for the epoch; a new one has none yet.
            vars(shares.dealing).pop("_paths", None)
        sizes.extend(len(server.mask_request(name).encode()) for name in names)

    return least(work, repeats), max(sizes)


def reply_path(dimension: int, repeats: int) -> dict[str, float]:
    """CPU seconds of a masked vector between its signature and Flower's serialization."""
    vector = np.zeros(dimension, np.uint32).data.cast("B")
    masked = Masked(bytes(32), "site-01", bytes(32), vector, bytes(64), bytes(64))
    data = Bundle((masked,)).encode()
    answer = Exchanged("site-01", 1, octets(data))
    records = pack(answer)
    return {
        "bundle": least(lambda: Bundle((masked,)).encode(), repeats).cpu,
        "records": least(lambda: pack(answer), repeats).cpu,
        "log": least(lambda: described(records), repeats).cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, two federations")
    parser.add_argument("--requests", action="store_true", help="requests and reply alone")
    parser.add_argument("--millions", type=int, nargs="+", help="sizes, in million parameters")
    parser.add_argument("--sites", type=int, nargs="+", help="federations")
    options = parser.parse_args()
    took, size = requests(SITES, 3)
    print(f"requests to {SITES} sites: {size} bytes each, {took.cpu:.3f} CPU seconds for all")
    path = reply_path(11_000_000, 5)
    print("reply of 11M: " + ", ".join(f"{name} {cost:.3f}" for name, cost in path.items()))
    of_requests = {"mask_request_bytes": size, "mask_request_seconds": took.cpu}
    if options.requests:
        print(json.dumps({name: round(value, 4) for name, value in of_requests.items()}))
        return
    millions = options.millions or ((1, 11) if options.quick else (1, 11, 25))
    counts = options.sites or ((5, 10) if options.quick else (3, 5, 10, 20))
    repeats = 3
    generator = np.random.default_rng(1)
    head = (
        f"{'D':>4} {'n':>3} | {'client Flower':>15} {'ours':>15} {'ratio':>6} | "
        f"{'unmask Flower':>13} {'ours':>15} {'add':>6} {'plain sum':>9} {'ratio':>6} | "
        f"{'check':>6} | {'B/par':>6} | {'memory / 4 D':>12}"
    )
    print("CPU seconds (wall seconds)")
    print(head)
    worst = {"client_vs_flower": float("inf"), "server_vs_sum": 0.0, "bytes_per_parameter": 0.0}
    for dimension in (1_000_000 * size for size in millions):
        update = generator.normal(0, 0.01, dimension).astype(np.float32)
        for n in counts:
            theirs = least(flower_client(n, update).run, repeats)
            ours, size = our_client(n, update, repeats + 1)
            flower_server = least(flower_unmask(n, dimension), 1)
            server = our_server(n, update, repeats)
            plain = plain_sum(n if n == 3 else n - 1, update, repeats)
            client_ratio = theirs.cpu / ours.cpu
            server_ratio = (server.add.cpu + server.unmask.cpu) / plain.cpu
            per_parameter = size / dimension
            print(
                f"{dimension // 1_000_000:>3}M {n:>3} | "
                f"{theirs.cpu:>7.3f} ({theirs.wall:.3f}) {ours.cpu:>7.3f} ({ours.wall:.3f}) "
                f"{client_ratio:>5.1f}x | {flower_server.cpu:>13.3f} "
                f"{server.unmask.cpu:>7.3f} ({server.unmask.wall:.3f}) {server.add.cpu:>6.3f} "
                f"{plain.cpu:>9.3f} {server_ratio:>5.2f}x | {server.check:>6.3f} | "
                f"{per_parameter:>6.3f} | {server.peak:>12.2f}",
                flush=True,
            )
            if dimension >= 11_000_000:
                worst["client_vs_flower"] = min(worst["client_vs_flower"], client_ratio)
                worst["server_vs_sum"] = max(worst["server_vs_sum"], server_ratio)
                worst["bytes_per_parameter"] = max(worst["bytes_per_parameter"], per_parameter)
    print(json.dumps({name: round(value, 4) for name, value in {**worst, **of_requests}.items()}))


if __name__ == "__main__":
    main()
