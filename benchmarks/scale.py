"""What an image of a site costs in memory, and what streaming costs in time.

    python benchmarks/scale.py [--quick] [--sizes N ...]

Sites of drawn radiographs of 224 x 224, one image a patient, are checked, frozen and trained on
twice by one service, as the commands and the service do it, each phase in a process of its own but
for the two runs, which share one. Memory is RssAnon, summed over the process and its workers,
looked at fifty times a second; a phase's figure is the most that was seen in it. The slope between
the smallest and the largest site is what an image costs.

The last line is JSON:

- bytes_per_image: the largest slope of all phases.
- second_run_over_first: the most memory in the second run over that in the first, at the largest.
- data_wait: the share of a private epoch of a small network, at the smallest site, in which its
  threads read images.
- cpu_ms_per_file: of the first check of 2,048 files of 64 x 64, in this and the workers' CPU time.

Disk is asked for about 0.25 MB an image: 16 GB for the whole, 2.5 GB with --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["CLOISTER_STATE"] = "none"
ROOT = Path(__file__).resolve().parents[1]
for part in ("common", "client", "server", "tests"):
    sys.path.insert(0, str(ROOT / part))

import numpy as np  # noqa: E402

SIZES = (5_000, 20_000, 60_000)
QUICK = (2_000, 8_000)
SMALL_FILES = 2_048
SIDE = 224
LOOK_S = 0.02
PHASES = ("check", "freeze", "first run", "second run")
EPSILON = 3.0


def study_of(size: int = SIDE) -> Any:
    """A private study of a small network."""
    from support import studies

    return studies.bound(
        input={"size": size, "modalities": ["DX"]},
        target={"column": "finding", "classes": ["no", "yes"]},
        network={"name": "small-cnn", "arguments": {"width": 4}},
        training={
            "rounds": 2, "steps": 1, "sampling_rate": 0.05, "expected_batch": 100,
            "learning_rate": 0.1,
        },
        privacy={"epsilon": EPSILON, "delta": 1e-7},
        aggregation={"secure": False},
    )  # fmt: skip


def draw(site: Path, images: int, side: int) -> None:
    """Write a site's files: one drawn DICOM file, with other names, numbers and a band of pixels
    each, so that no two are the same."""
    from support.dicom import make_dicom

    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(2000, 400, (side, side)), 0, 4095).astype(np.uint16)
    number, instance = "P0000000", "1.2.826.0.1.3680043.8.498.10000000"
    data = make_dicom(
        pixels, bits_stored=12, patient_id=number, elements={"SOPInstanceUID": instance}
    )
    (site / "dicom").mkdir(parents=True)
    band = pixels[: side // 8].tobytes()
    at = data.index(band)
    rows = ["PatientID,finding"]
    for place in range(images):
        name, uid = f"P{place:07d}", f"{instance[:-8]}{10000000 + place}"
        one = data.replace(number.encode(), name.encode()).replace(instance.encode(), uid.encode())
        noise = rng.integers(0, 4096, len(band) // 2).astype("<u2").tobytes()
        folder = site / "dicom" / f"{place // 1000:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{place:07d}.dcm").write_bytes(one[:at] + noise + one[at + len(band) :])
        rows.append(f"{name},{('no', 'yes')[place % 2]}")
    (site / "labels.csv").write_text("\n".join(rows) + "\n")


def opened(site: Path) -> Any:
    """The site's folder, made where it is not there."""
    from cloister_fl.client.site.folder import init_site
    from cloister_fl.client.site.policy import Policy

    policy = Policy(
        patients_at_most=100_000,
        max_epsilon_study=EPSILON + 1,
        max_epsilon_lifetime=100.0,
        ledger_delta=1e-7,
        require_secure_aggregation=False,
    )
    return init_site(site, name="large", policy=policy)


# What a phase does; each in a process of its own.


def check(site: Path) -> dict[str, float]:
    """What `cloister client check --study` does with the data."""
    from cloister_fl.client.dicom.sandbox.pool import close_shared_pool
    from cloister_fl.client.preflight.data_check import inspect

    folder, study = opened(site), study_of(json.loads(os.environ["SIDE"]))
    began = time.process_time()
    report = inspect(folder, study)
    assert report.faults == (), report.faults
    own = time.process_time() - began
    close_shared_pool()
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": own + workers.ru_utime + workers.ru_stime}


def freeze(site: Path) -> dict[str, float]:
    """What `approve` does: look, freeze, decide."""
    from cloister_fl.client.data.loading import read_for_check
    from cloister_fl.client.steward.approval import approve

    folder, study = opened(site), study_of()
    approve(folder, study, read_for_check(folder, study))
    return {}


def serve(site: Path) -> dict[str, float]:
    """Two runs of one study in one service: start, and a round each; then an epoch, timed."""
    from flwr.app import Message

    from cloister_fl.client.app import SiteApp
    from cloister_fl.client.data.images import SealedImages
    from cloister_fl.networks import flat_parameters
    from cloister_fl.protocol.round_messages import (
        SITE_KEY,
        Prepare,
        Prepared,
        Refusal,
        TrainTask,
        Update,
        octets,
        pack,
        unpack,
    )
    from cloister_fl.server.flower.engines import InProcessGrid
    from cloister_fl.server.rounds.messenger import TYPES
    from cloister_fl.study.study_network import build_for

    study = study_of()
    model = flat_parameters.flatten(build_for(study))
    app = SiteApp()
    grid = InProcessGrid(app, [{SITE_KEY: str(site)}])

    def asked(task: Any, kind: Any) -> None:
        sent = Message(content=pack(task), dst_node_id=2, message_type=TYPES[task.kind])
        (reply,) = grid.send_and_receive([sent])
        found = unpack(reply.content, kind, Refusal)
        if isinstance(found, Refusal):
            raise SystemExit(f"The site refused ({found.reason}): {site}/refusal.json")

    waited = 0.0
    lock = threading.Lock()
    honest = SealedImages.__getitem__

    def timed(self: SealedImages, place: Any) -> Any:
        nonlocal waited
        began = time.perf_counter()
        try:
            return honest(self, place)
        finally:
            with lock:
                waited += time.perf_counter() - began

    SealedImages.__getitem__ = timed  # type: ignore[method-assign]
    text = study.canonical()
    told: dict[str, float] = {}
    for number, phase in enumerate(PHASES[2:], start=1):
        print(json.dumps({"phase": phase}), flush=True)
        asked(Prepare(text, f"run-{number}", 5, "", b"", ""), Prepared)
        waited, began = 0.0, time.perf_counter()
        asked(TrainTask(text, f"run-{number}", number, 5, octets(), model), Update)
        seconds = time.perf_counter() - began
        told[phase] = waited / (seconds * min(2, os.cpu_count() or 1))
    return {"data_wait": min(told.values())}


WORK = {"check": check, "freeze": freeze, "serve": serve}


# The parent, which looks.


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        try:
            told = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in told.split()]
    return found


def anonymous(pid: int) -> int:
    """RssAnon of a process and all below it, in bytes."""
    total = 0
    for one in tree(pid):
        try:
            rows = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon"))
    return total


def run(what: str, site: Path, side: int = SIDE) -> tuple[dict[str, int], dict[str, float]]:
    """Most memory by phase, and what the process told."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", what, str(site)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SIDE": str(side)},
    )
    phase, most = what, dict[str, int]()
    lines: list[dict[str, Any]] = []

    def read() -> None:
        assert process.stdout is not None
        # One by one, as they come.
        lines.extend(json.loads(line) for line in process.stdout)

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        phase = next((one["phase"] for one in reversed(lines) if "phase" in one), what)
        most[phase] = max(most.get(phase, 0), anonymous(process.pid))
        time.sleep(LOOK_S)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{what} failed")
    return most, lines[-1]


def main(sizes: Sequence[int]) -> None:
    """Print the table, and the line of JSON."""
    memory: dict[int, dict[str, int]] = {}
    wait = float("nan")
    with tempfile.TemporaryDirectory(
        prefix="cloister-scale-", dir=os.environ.get("TMPDIR")
    ) as work:
        small = Path(work) / "small"
        draw(small, SMALL_FILES, 64)
        opened(small)
        _, told = run("check", small, 64)
        _, again = run("check", small, 64)
        milliseconds = told["cpu"] / SMALL_FILES * 1000
        print(
            f"ingest of {SMALL_FILES} small files: {milliseconds:.2f} CPU ms a file; a second "
            f"look {again['cpu'] / SMALL_FILES * 1000:.2f}"
        )
        for images in sizes:
            site = Path(work) / f"site{images}"
            draw(site, images, SIDE)
            opened(site)
            memory[images] = {}
            for what in ("check", "freeze", "serve"):
                began = time.monotonic()
                most, told = run(what, site)
                memory[images] |= {one: size for one, size in most.items() if one in PHASES}
                if what == "serve" and images == sizes[0]:
                    wait = told["data_wait"]
                print(
                    f"{images:>7} images, {what:<7}{time.monotonic() - began:>7.0f} s   "
                    + ", ".join(f"{one} {size / 2**20:.0f} MiB" for one, size in most.items()),
                    flush=True,
                )
    first, last = sizes[0], sizes[-1]
    slopes = {one: (memory[last][one] - memory[first][one]) / (last - first) for one in PHASES}
    for one, slope in slopes.items():
        print(f"{one:<12}{slope:>9.0f} bytes an image")
    figures = {
        "bytes_per_image": round(max(slopes.values())),
        "second_run_over_first": round(memory[last]["second run"] / memory[last]["first run"], 3),
        "data_wait": round(wait, 4),
        "cpu_ms_per_file": round(milliseconds, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 and 8,000 images")
    parser.add_argument("--sizes", type=int, nargs="+", help="images of each site, rising")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    asked_for = parser.parse_args()
    if asked_for.work:
        name, folder = asked_for.work
        print(json.dumps(WORK[name](Path(folder))), flush=True)
    else:
        main(asked_for.sizes or (QUICK if asked_for.quick else SIZES))
