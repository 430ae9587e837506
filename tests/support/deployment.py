"""A federation of real processes on loopback, enrolled by its own commands, for tests.

A coordinator (server and run executor) and hospitals (service, node, executor), TLS on. Everything
is run as a person would run it; whatever was started is ended, by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.server.coordinator.folder import Coordinator
from cloister_fl.study.schema import Study
from support import studies
from support.coordinator_process import Running, new_coordinator, start, wait_for

CLOISTER = "from cloister_fl.cli.main import main; main()"


def environment() -> dict[str, str]:
    """What a child of the tests needs: our packages, and one thread a process."""
    path = os.pathsep.join(part for part in sys.path if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def cloister(*arguments: str | Path, stdin: str = "", status: int = 0) -> str:
    """Run a command to its end, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", CLOISTER, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout


@dataclass
class Hospital:
    """A site folder, and its service while it runs."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def site(self) -> Site:
        return open_site(self.folder)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, *, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLOISTER, "client", "start", "--dir", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        if wait:
            self.wait()

    def wait(self, within: float = 600.0) -> None:
        """Until it serves."""
        wait_for(lambda: self.standing().get("serving") is True, within, self.told)

    def standing(self) -> dict[str, Any]:
        from cloister_fl.client import service

        told = service.status(self.site)
        if told is None:
            return {}
        return {**told.__dict__, "serving": told.serving}

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def children(self) -> dict[str, int]:
        """Process ids of the node and the executor."""
        assert self.process is not None
        return children_of(self.process.pid)

    def stop(self) -> None:
        end(self.process)
        self.process = None


@dataclass
class Deployment:
    """A coordinator and its hospitals.

    Attributes:
        base: folder of everything.
        place: the coordinator's folder.
        server: its server, while it runs.
        hospitals: by name.
    """

    base: Path
    place: Coordinator
    server: Running
    hospitals: dict[str, Hospital] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.place.root

    def restart_server(self) -> None:
        self.server = start(self.place, self.base / "server.log")

    def run(self, study: str, *more: str) -> str:
        """Propose a study, and return the run's name."""
        path = self.base / "study.toml"
        path.write_text(study)
        command = ("server", "run", path, "--dir", self.folder, "--no-follow", "--json", *more)
        return str(json.loads(cloister(*command))["run"])

    def approve(self, study: Study, names: Sequence[str] = ()) -> None:
        """Approve a study at sites, once it was proposed there; else at all of them."""
        for name in names or self.hospitals:
            folder = self.hospitals[name].folder
            wait_for(
                lambda folder=folder: (
                    study.digest in (folder / "approvals.json").read_text()
                    if (folder / "approvals.json").exists()
                    else False
                ),
                240,
                lambda name=name: f"nothing was proposed to {name}: {self.told()}",
            )
            cloister("client", "approve", study.digest[:16], "--dir", folder)

    def status(self, name: str) -> dict[str, Any]:
        path = self.folder / "runs" / name / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def wait_for_state(self, name: str, *states: str, within: float = 600.0) -> dict[str, Any]:
        wait_for(lambda: self.status(name).get("state") in states, within, self.told)
        return self.status(name)

    def wait_for_end(self, name: str, within: float = 600.0) -> dict[str, Any]:
        """Until the run ends; its summary."""
        status = self.wait_for_state(name, "done", "failed", "stopped", within=within)
        assert status["state"] == "done", (status, self.told())
        return json.loads((self.folder / "runs" / name / "summary.json").read_text())

    def told(self) -> str:
        """Everything that was said, for a test that failed."""
        parts = [(self.base / "server.log").read_text()]
        parts += [f"-- {name}\n{each.told()}" for name, each in self.hospitals.items()]
        runs = self.folder / "runs"
        parts += [path.read_text() for path in runs.glob("*/status.json")] if runs.exists() else []
        return "\n".join(parts)

    def stop(self) -> None:
        for hospital in self.hospitals.values():
            if hospital.process is not None:
                hospital.process.send_signal(signal.SIGTERM)
        for hospital in self.hospitals.values():
            hospital.stop()
        self.server.stop()


@contextlib.contextmanager
def deployed(
    base: Path, data: Mapping[str, Path], *, policy: Mapping[str, str] | None = None
) -> Iterator[Deployment]:
    """Enrol hospitals by the commands that a person uses, and start all services.

    Args:
        base: an empty folder.
        data: folder with ``dicom/`` and ``labels.csv``, by site.
        policy: keys of ``[policy]`` that every hospital changes, as TOML.
    """
    place = new_coordinator(base / "coordinator")
    made = Deployment(base, place, start(place, base / "server.log"))
    try:
        _enrol(made, data, policy or {})
        with ThreadPoolExecutor(len(data)) as pool:
            list(pool.map(lambda each: each.start(), made.hospitals.values()))
        yield made
    finally:
        made.stop()


def _enrol(made: Deployment, data: Mapping[str, Path], policy: Mapping[str, str]) -> None:
    folder = made.folder
    cloister("server", "invite", *data, "--dir", folder)
    for name, source in data.items():
        site = made.base / name
        invite = folder / "invites" / f"{name}.invite"
        told = cloister(
            "client", "join", invite, "--dir", site,
            "--dicom", source / "dicom", "--labels", source / "labels.csv",
            "--patients-at-most", "1000",
        )  # fmt: skip
        mark = re.search(r"^  ([0-9a-f ]+)$", told, re.M)
        assert mark is not None, told
        cloister("server", "approve", name, "--fingerprint", mark[1], "--dir", folder)
        for key, value in policy.items():
            change_policy(site, key, value)
        made.hospitals[name] = Hospital(site)
    digest = made.place.federation().roster().digest.hex()
    for hospital in made.hospitals.values():
        told = cloister("client", "join", "--dir", hospital.folder, "--accept-roster", digest)
        assert "Accepted" in told


def change_policy(folder: Path, key: str, value: str) -> None:
    """Change a key of ``[policy]`` as a steward would, in the file."""
    path = folder / "site.toml"
    text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", path.read_text())
    assert count == 1, key
    path.write_text(text)


def study_text(name: str, **tables: studies.Table) -> str:
    """The text of a bound study that takes seconds: fixed filters, and one trained layer."""
    quick = {
        "study": {"name": name, "question": "Does the radiograph show a nodule?"},
        "network": {"name": "filter-bank"},
    }
    return studies.bound_text(**studies.merged(quick, tables))


def children_of(pid: int) -> dict[str, int]:
    """The Python children of a process, by the module that they run."""
    found = {}
    for child in descendants(pid, depth=1):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"-m" in words:
                module = words[words.index(b"-m") + 1].decode()
                found[module.rpartition(".")[2]] = child
    return found


def descendants(pid: int, depth: int = 10) -> list[int]:
    """Process ids of all children, their children, and so on."""
    found: list[int] = []
    if depth:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            for child in map(int, text.split()):
                found += [child, *descendants(child, depth - 1)]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def end(process: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM, then SIGKILL."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
