"""What patient-level privacy costs a training step: our engines beside plain SGD and Opacus.

    python benchmarks/dp_step.py [--quick] [--rounds N] [--threads N]

A batch is 64 units: 64 images, or 64 patients of four images. Plain SGD and Opacus take images, 64
at a time, as many in all as our step beside them. Each contestant is a process of its own; they
take turns, one batch each a round, and a speed is the median over the rounds of (images a CPU
second of the contestant) over (images a CPU second of plain SGD in the same round), so that what
else runs on the machine falls on all of them. A first batch of each is not counted.

Every process has the same environment, the one that programs start with. With --keep-memory glibc
keeps freed memory for all of them (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 16 GiB): a
setting for those who know of it, which speeds up Opacus' hooks most and our steps least.

- plain: cross entropy, backward, SGD.
- hooks, ghost: Opacus' DPOptimizer with GradSampleModule, and its fast gradient clipping; noise
  from torch's generator in float32, as Opacus comes.
- loop, image: a whole step of ours: gradient, clipping, integer grid, noise from AES-256-CTR,
  division, SGD; patients of four images, and of one.
- gradient alone: the same without grid, noise and SGD; a float32 sum of clipped gradients.

Memory is the peak of the resident set (VmHWM) less what the process held before the network was
built. The last line is JSON: speeds over plain, and for memory the loop's peak over plain's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for part in ("common", "client"):
    sys.path.insert(0, str(ROOT / part))

UNITS = 64
KEEP = str(16 << 30)


@dataclass(frozen=True)
class Setting:
    network: str
    size: int
    contestants: tuple[str, ...]


SETTINGS = (
    Setting(
        "resnet18", 128,
        ("plain", "hooks", "ghost", "loop", "loop-alone", "image", "image-alone"),
    ),
    Setting("densenet121", 224, ("plain", "loop", "loop-alone", "hooks", "ghost")),
)  # fmt: skip


def memory(key: str) -> int:
    """A figure of ``/proc/self/status``, in kilobytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise SystemExit(f"the kernel does not tell {key}")


# In the child.


def serve(name: str, network: str, size: int, threads: int) -> None:
    """Build one contestant, then run a batch for each line that comes in."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    work, images = contestant(name, network, size)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu / images, "wall": wall / images}), flush=True)
    print(json.dumps({"memory": memory("VmHWM") - BASE}), flush=True)


BASE = 0


def contestant(name: str, network: str, size: int) -> tuple[Callable[[], Any], int]:
    """What one batch of a contestant does, and the images in it."""
    global BASE  # noqa: PLW0603 - what the process holds before there is a network
    import numpy as np
    import opacus.optimizers  # noqa: F401 - part of every process, so that memory compares
    import torch
    import torch.nn.functional as F

    from cloister_fl.client.training import dp_optimizer, per_patient_gradients, sampling
    from cloister_fl.client.training.csprng import SecureRandom
    from cloister_fl.networks.registry import build
    from cloister_fl.study.schema import Network
    from cloister_fl.tasks.classification import Classification

    pixels = np.random.default_rng(0).integers(0, 65536, (4 * UNITS, size, size), dtype=np.uint16)
    torch.nn.Conv2d(1, 1, 3)(torch.zeros(1, 1, 8, 8)).sum().backward()
    BASE = memory("VmRSS")
    module = build(Network(name=network), 2, 1, size=size, seed=0)

    @dataclass(frozen=True)
    class Images:
        images: Any
        targets: Any
        patients: tuple[Any, ...] = ()

    task = Classification("finding", ("no", "yes"))
    each = 4 if name.startswith("loop") else 1
    cohort = Images(pixels, np.arange(len(pixels)) // each % 2)
    bags = [sampling.Bag(np.arange(u * each, (u + 1) * each)) for u in range(UNITS)]
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    sgd = torch.optim.SGD(weights, lr=1e-3)
    labels = torch.arange(UNITS) % 2

    if name == "plain":

        def plain() -> None:
            sgd.zero_grad()
            torch.autograd.backward(
                F.cross_entropy(module(sampling.pixels_of(cohort, bags)), labels)
            )
            sgd.step()

        return plain, UNITS
    if name in ("hooks", "ghost"):
        return opacus_step(name, module, sgd, lambda: sampling.pixels_of(cohort, bags), labels)

    patients = per_patient_gradients.PatientGradSampleModule(module, task)
    optimizer = dp_optimizer.PatientDPOptimizer(
        sgd,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=UNITS,
        random=SecureRandom(),
    )
    size_of_gradient = sum(weight.numel() for weight in weights)

    def step() -> None:
        optimizer.step_on(patients.blocks(cohort, bags))

    def alone() -> torch.Tensor:
        total = torch.zeros(size_of_gradient)
        for block in patients.blocks(cohort, bags):
            single = not isinstance(block, torch.Tensor)
            rows = [torch.cat([part.reshape(-1) for part in block])] if single else list(block)
            for row in rows:
                total.add_(row, alpha=min(1.0, 1.0 / float(row.norm())))
        return total

    return (alone if name.endswith("-alone") else step), UNITS * each


def opacus_step(
    name: str, module: Any, sgd: Any, pixels: Callable[[], Any], labels: Any
) -> tuple[Callable[[], Any], int]:
    """A step as Opacus makes it."""
    import warnings

    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore")
    given = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": UNITS,
        "loss_reduction": "mean",
    }
    criterion: Any = torch.nn.CrossEntropyLoss()
    if name == "hooks":
        wrapped: Any = GradSampleModule(module)
        optimizer: Any = DPOptimizer(sgd, **given)
    else:
        wrapped = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=1.0, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(sgd, **given)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(pixels()), labels).backward()
        optimizer.step()

    return step, UNITS


# In the parent.


class ContestantDiedError(Exception):
    """It ended early; Opacus' hooks at 224 px need more memory than many machines have."""


class Child:
    """A contestant in its own process."""

    def __init__(self, name: str, setting: Setting, threads: int, *, keep: bool) -> None:
        command = [sys.executable, __file__, "--child", name, setting.network]
        command += [str(setting.size), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if keep:
            environment |= {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP}
        self.name = name
        self.speeds: list[float] = []
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise ContestantDiedError(self.name)
        answer: dict[str, float] = json.loads(line)
        return answer

    def batch(self) -> dict[str, float]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ContestantDiedError(self.name) from None
        return self._read()

    def end(self) -> float:
        """Peak memory in GB."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._read()["memory"]
        self.process.wait()
        return peak / 1e6


def race(pair: list[Child], rounds: int) -> tuple[list[float], list[float], list[float], float]:
    """Ratios, wall and CPU seconds of the last of a pair, and its peak memory in GB."""
    for child in pair:
        child.batch()
    ratios, walls, cpus = [], [], []
    for _ in range(rounds):
        took = [child.batch() for child in pair]
        ratios.append(took[0]["cpu"] / took[-1]["cpu"])
        cpus.append(took[-1]["cpu"])
        walls.append(took[-1]["wall"])
    return ratios, walls, cpus, [child.end() for child in pair][-1]


def compare(
    setting: Setting, names: tuple[str, ...], rounds: int, threads: int, *, keep: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Speed of each contestant over plain, and its peak memory in GB."""
    speeds, peaks = {}, {}
    # Two at a time: all of them together would not fit into an ordinary machine's memory.
    for name in names:
        pair = [Child("plain", setting, threads, keep=keep)]
        if name != "plain":
            pair.append(Child(name, setting, threads, keep=keep))
        try:
            ratios, walls, cpus, peak = race(pair, rounds)
        except ContestantDiedError as died:
            for child in pair:
                child.process.kill()
                child.process.wait()
            print(f"{setting.network:>12} {setting.size:>4} {name:>12}  '{died}' ended early")
            continue
        speeds[name], peaks[name] = statistics.median(ratios), peak
        print(
            f"{setting.network:>12} {setting.size:>4} {name:>12} "
            f"{1 / statistics.median(cpus):>8.2f} {1 / statistics.median(walls):>8.2f} "
            f"{speeds[name]:>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f} {peak:>6.2f}",
            flush=True,
        )
    return speeds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone, one round")
    parser.add_argument("--rounds", type=int, default=0, help="batches that count; 5, or 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--network", choices=[one.network for one in SETTINGS], help="this alone")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps what is freed")
    parser.add_argument("--only", nargs="*", help="these contestants alone")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, network, size = given.child
        serve(name, network, int(size), given.threads)
        return
    rounds = given.rounds or (1 if given.quick else 5)
    print(
        f"{'network':>12} {'px':>4} {'contestant':>12} {'img/CPU-s':>8} {'img/s':>8} "
        f"{'ratio':>6} {'least':>6} {'most':>6} {'GB':>6}"
    )
    last: dict[str, float] = {}
    for setting in SETTINGS[:1] if given.quick else SETTINGS:
        if given.network not in (None, setting.network):
            continue
        names = tuple(n for n in setting.contestants if not given.only or n in given.only)
        # A batch at 224 px takes minutes.
        some = rounds if setting.size < 200 else (rounds + 1) // 2
        speeds, peaks = compare(setting, names, some, given.threads, keep=given.keep_memory)
        if "loop" in speeds:
            last[f"{setting.network}_patient4"] = speeds["loop"]
        if setting.network == "resnet18":
            if "image-alone" in speeds:
                last["resnet18_image"] = speeds["image-alone"]
            if "hooks" in speeds and "image" in speeds:
                last["resnet18_vs_hooks"] = speeds["image"] / speeds["hooks"]
            if "plain" in peaks and "loop" in peaks:
                last["resnet18_memory"] = peaks["loop"] / peaks["plain"]
    print(json.dumps({name: round(value, 4) for name, value in last.items()}))


if __name__ == "__main__":
    main()
