"""Run a deployment of three small sites for many rounds, and hold its growth against bounds.

A coordinator and three hospitals, enrolled by the commands that a person uses, each process by
itself, TLS on, privacy and secure aggregation on; the network is tiny, so the rounds are quick. The
first rounds warm up; from then to the last round, resident memory of each process and the disk of
each folder are looked at. The exit status is 0 where all stay within the bounds.

Nothing is left behind: the federation lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CLOISTER_STATE"] = "none"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cloister_fl.server.rounds.kept_sums import SUMS_FOLDER
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import draw_federation
from cloister_fl.study.file import parse_study
from support.deployment import Deployment, children_of, deployed, study_text

WARM_UP = 50
"""Rounds after which nothing may grow any more; a third of all, where there are few."""
MOST_MEMORY = 0.05
"""Growth of a process's resident memory from the warm-up to the end, as a share."""
MOST_DISK = 10 * 1024
"""Growth of a folder in bytes, by round and process that writes to it."""
LOOK_S = 1.0
POLICY = {"max_epsilon_study": "8.0", "max_epsilon_lifetime": "100.0", "colluders": "0"}
POLICY |= {"min_sites": "3"}


@dataclass
class Looked:
    """What was seen of the federation, by round.

    Attributes:
        memory: resident bytes by process and round, of each look.
        disk: bytes of each folder by round, at the last look.
        cpu: CPU seconds of each process since its start, by round.
        pids: the processes that were seen under each name.
    """

    memory: dict[str, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    disk: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    cpu: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    pids: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def look(self, made: Deployment, number: int) -> None:
        """Note how things stand in a round."""
        for name, pid in processes(made).items():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It ended between the list and the look.
            rss = next((row for row in status.splitlines() if row.startswith("VmRSS")), "")
            if rss:
                self.memory[name].setdefault(number, []).append(int(rss.split()[1]) * 1024)
                self.cpu[name][number] = sum(map(int, times[11:13])) / os.sysconf("SC_CLK_TCK")
                self.pids[name].add(pid)
        for name, folder in folders(made).items():
            self.disk[name][number] = size_of(folder)


def processes(made: Deployment) -> dict[str, int]:
    """The process ids of the federation, by what they are."""
    server = made.server.process.pid
    found = {"coordinator/server": server}
    found |= {f"coordinator/{name}": pid for name, pid in children_of(server).items()}
    for site, hospital in made.hospitals.items():
        if hospital.process is not None:
            found[f"{site}/service"] = hospital.process.pid
            found |= {f"{site}/{name}": pid for name, pid in hospital.children().items()}
    return found


def folders(made: Deployment) -> dict[str, Path]:
    """The folder of each side."""
    sites = {name: hospital.folder for name, hospital in made.hospitals.items()}
    return {"coordinator": made.folder, **sites}


def size_of(folder: Path) -> int:
    """Bytes that the files of a folder hold."""
    total = 0
    for path in folder.rglob("*"):
        try:
            about = path.lstat()
        except OSError:
            continue  # A temporary file that got its name.
        total += about.st_size
    return total


def largest(folder: Path, count: int = 5) -> list[tuple[str, int]]:
    """The largest files of a folder, for whoever looks for what grows."""
    found = [(str(one.relative_to(folder)), one.lstat().st_size) for one in folder.rglob("*")]
    return sorted(found, key=lambda pair: -pair[1])[:count]


def run(made: Deployment, rounds: int) -> tuple[Looked, float]:
    """Run the study; what was seen, and how long it took in seconds."""
    text = study_text(
        "soak",
        training={
            "rounds": rounds, "steps": 1, "sampling_rate": 0.2, "expected_batch": 5,
            "learning_rate": 0.1, "seed": 3,
        },
        privacy={"epsilon": 8.0},
        evaluation={"site_fraction": 0.0},
        aggregation={"min_sites": 3, "colluders": 0},
    )  # fmt: skip
    name = made.run(text)
    made.approve(parse_study(text))
    looked, began, shown = Looked(), time.monotonic(), 0
    while True:
        status = made.status(name)
        number, state = int(status.get("round", 0)), status.get("state")
        if state in {"failed", "stopped"}:
            raise SystemExit(f"The run ended: {status}\n{made.told()}")
        if state == "done":
            return looked, time.monotonic() - began
        if number:
            looked.look(made, number)
        if number >= shown + max(1, rounds // 20):
            shown = number
            print(f"round {number} of {rounds}, {time.monotonic() - began:.0f} s", flush=True)
        time.sleep(LOOK_S)


def around(by_round: Mapping[int, list[int]], first: int, last: int) -> float:
    """The median over the looks in rounds ``first`` to ``last``."""
    seen = [one for number, some in by_round.items() if first <= number <= last for one in some]
    return median(seen) if seen else float("nan")


def judged(looked: Looked, rounds: int, warm: int) -> bool:
    """Print the table; whether all stay within the bounds."""
    width, sound = max(2, (rounds - warm) // 10), True
    heads = f"RSS, round {warm}", f"RSS, round {rounds}", "growth", "CPU s a round"
    print("\n" + "{:<28}{:>16}{:>16}{:>10}{:>16}".format("process", *heads))
    for name, memory in sorted(looked.memory.items()):
        before = around(memory, warm, warm + width)
        after = around(memory, rounds - width, rounds)
        growth, cpu = after / before - 1, looked.cpu[name]
        fits = growth < MOST_MEMORY and len(looked.pids[name]) == 1
        sound &= fits
        early, late = (min(cpu, key=lambda one, at=at: abs(one - at)) for at in (warm, rounds))
        spent = (cpu[late] - cpu[early]) / max(1, late - early)
        restarted = "" if len(looked.pids[name]) == 1 else "   it was restarted"
        print(
            f"{name:<28}{before / 2**20:>12.1f} MiB{after / 2**20:>12.1f} MiB{growth:>+10.1%}"
            f"{spent:>16.3f}{'' if fits else '   TOO MUCH'}{restarted}"
        )
    print("\n" + "{:<28}{:>16}{:>26}".format("folder", "at the end", "a round and process"))
    for name, disk in looked.disk.items():
        count = sum(one.startswith(f"{name}/") for one in looked.memory)
        early, late = (min(disk, key=lambda one, at=at: abs(one - at)) for at in (warm, rounds))
        each = (disk[late] - disk[early]) / max(1, late - early) / max(1, count)
        fits = each < MOST_DISK
        sound &= fits
        print(
            f"{name:<28}{disk[late] / 2**20:>12.1f} MiB{each / 1024:>22.2f} KiB"
            f"{'' if fits else '   TOO MUCH'}"
        )
    return sound


def main() -> int:
    """Print the table; 1 where something grew by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="rounds of the study; at least 10")
    rounds = parser.parse_args().rounds
    if rounds < 10:
        parser.error("--rounds must be at least 10")
    warm = min(WARM_UP, rounds // 3)
    with tempfile.TemporaryDirectory(prefix="cloister-soak-") as work:
        small = [replace(one, patients=24, prevalence=0.5) for one in HOSPITALS[:3]]
        draw_federation(Path(work) / "data", seed=5, hospitals=small, holdout_patients=20)
        data = {one.name: one for one in sorted((Path(work) / "data" / "sites").iterdir())}
        base = Path(work) / "federation"
        base.mkdir()
        with deployed(base, data, policy=POLICY) as made:
            looked, seconds = run(made, rounds)
            print(f"\n{rounds} rounds in {seconds / 60:.1f} minutes, {seconds / rounds:.1f} s each")
            sound = judged(looked, rounds, warm)
            print("\nlargest files at the end")
            sums = [one for one in made.folder.rglob(f"{SUMS_FOLDER}/*") if one.is_file()]
            kept = sum(one.stat().st_size for one in sums) / max(1, rounds) / 1024
            print(f"of the coordinator, sums that are kept for verify: {kept:.2f} KiB a round")
            for name, folder in folders(made).items():
                for path, size in largest(folder):
                    print(f"  {name:<14}{size / 1024:>10.1f} KiB  {path}")
    bounds = f"RSS +{MOST_MEMORY:.0%}, disk {MOST_DISK // 1024} KiB a round and process"
    print(f"\n{'All is' if sound else 'Not all is'} within the bounds ({bounds}).")
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
