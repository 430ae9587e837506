"""Findings of the checks before a run, numbered, each with its remedy.

A finding is judged from what was seen and touches nothing, so it can be repeated at will. The
numbers are stable: a guide or a ticket can name them. ``network_check`` judges the way to the
coordinator (2 to 10), this module the machine, the folder and the data.
"""

from __future__ import annotations

import enum
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.client.site.folder import Site
from cloister_fl.errors import (
    CloisterError,
    FileUnreadable,
    OutputInTheWay,
    PolicyRefused,
    all_errors,
)

if TYPE_CHECKING:
    from cloister_fl.client.preflight.data_check import DataReport

GIB = 1 << 30
DISK_WARN, DISK_FAIL = 5 * GIB, 1 * GIB
MEMORY_WARN = 4 * GIB
"""Bytes free below which it is told."""

_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA, AMD, and NVIDIA in WSL; without one there is no use in loading torch."""
_PRIVATE = ("site.toml", "coordinator.json", "coordinator.pem", "roster.pin", "ledger.sqlite")


class State(enum.Enum):
    """How a finding ended; ``SKIP`` was not looked at, and the finding says why."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(enum.IntEnum):
    """What is looked at, by its number."""

    FEDERATION = 1
    NAME = 2
    PROXY = 3
    CONNECTION = 4
    TLS = 5
    CERTIFICATE = 6
    ADMISSION = 7
    CLOCK = 8
    VERSION = 9
    ROSTER = 10
    DISK = 11
    MEMORY = 12
    GPU = 13
    FOLDER = 14
    DATA = 15
    POLICY = 16


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        number: of the ``Check``; stable.
        name: of it, in lower case.
        state: how it ended.
        what: what was found, in words; no path and nothing of a patient.
        remedy: what to do; empty where nothing is to be done.
        code: of the error that a failure is, as in ``docs/errors``; else empty.
    """

    number: int
    name: str
    state: State
    what: str
    remedy: str = ""
    code: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What JSON says of it."""
        return {**vars(self), "state": self.state.value}


def found(check: Check, state: State, what: str, remedy: str = "") -> Finding:
    """Return a finding that is not a failure."""
    return Finding(int(check), check.name.lower(), state, what, remedy)


def failed(check: Check, error: CloisterError) -> Finding:
    """A failure, in the words of the error that a command would end with."""
    what = f"{error.what} {error.why}".strip()
    return Finding(int(check), check.name.lower(), State.FAIL, what, error.remedy, error.code)


def skipped(checks: Iterable[Check], why: str) -> list[Finding]:
    """Return findings of checks that were not run."""
    return [found(check, State.SKIP, why) for check in checks]


def machine(site: Site) -> list[Finding]:
    """Disk, memory, GPU, and who can read the site folder."""
    return [
        disk(shutil.disk_usage(site.root).free),
        memory(available_memory()),
        gpu(any(Path(node).exists() for node in _GPU_NODES), _cuda),
        folder(site),
    ]


def disk(free: int) -> Finding:
    """Judge the bytes free where the site folder lies."""
    what = f"{free / GIB:.1f} GiB are free on the disk of the site folder."
    remedy = "Make room: the cache of preprocessed images and the logs grow there."
    if free < DISK_FAIL:
        return failed(Check.DISK, OutputInTheWay(what, remedy=remedy))
    if free < DISK_WARN:
        return found(Check.DISK, State.WARN, what, remedy)
    return found(Check.DISK, State.OK, what)


def memory(available: int | None) -> Finding:
    """Judge the bytes of memory that a training could take now; ``None``: not known."""
    if available is None:
        return found(Check.MEMORY, State.WARN, "The available memory is not known.")
    what = f"{available / GIB:.1f} GiB of memory are available."
    if available < MEMORY_WARN:
        return found(
            Check.MEMORY,
            State.WARN,
            what,
            "Free memory, or add some: with too little, training is killed.",
        )
    return found(Check.MEMORY, State.OK, what)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine, and the control group (v2) of this process, would still give."""
    told = [
        int(line.split()[1]) * 1024
        for line in _lines(root / "proc/meminfo")
        if line.startswith("MemAvailable:")
    ]
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::/"):
            group = root / "sys/fs/cgroup" / line[4:].strip()
            limit, used = (_lines(group / name) for name in ("memory.max", "memory.current"))
            if limit and used and limit[0].isdigit():
                # Cached files count as used, and are given up when memory is asked for.
                cached = sum(
                    int(line.split()[1])
                    for line in _lines(group / "memory.stat")
                    if line.startswith("inactive_file ")
                )
                told.append(max(0, int(limit[0]) - int(used[0]) + cached))
    return min(told) if told else None


def gpu(there: bool, usable: Callable[[], str | None]) -> Finding:
    """Find which processor trains; ``usable`` loads torch and is asked only where a GPU is."""
    if not there:
        return found(Check.GPU, State.OK, "None; the CPU is used.")
    name = usable()
    if name is None:
        return found(
            Check.GPU,
            State.WARN,
            "PyTorch cannot use the GPU; the CPU is used.",
            "Install PyTorch's build for this GPU, or train on the CPU, which takes longer.",
        )
    return found(Check.GPU, State.OK, f"{name}.")


def folder(site: Site) -> Finding:
    """Find what of the site other users could read or change."""
    keys = [site.keys, *sorted(site.keys.iterdir())]
    others = [site.root, site.cache, site.audit, *(site.root / name for name in _PRIVATE)]
    bad = [_shown(site, path) for path in keys if _is_open(path)]
    if bad:
        return failed(
            Check.FOLDER,
            FileUnreadable(
                f"Other users own {', '.join(bad)}, or can read or change it.",
                remedy="Restrict it: chmod 700 for a folder, 600 for a file. If others used this "
                "machine, treat the keys as known to them.",
            ),
        )
    if loose := [_shown(site, path) for path in others if _is_open(path)]:
        return found(
            Check.FOLDER,
            State.WARN,
            f"Other users own {', '.join(loose)}, or can read or change it.",
            "Restrict it: chmod 700 for a folder, 600 for a file.",
        )
    return found(Check.FOLDER, State.OK, "Only the owner can read the site's keys and files.")


def data(report: DataReport) -> list[Finding]:
    """The data, and what the site's policy says to the study, as ``data_check`` found them."""
    if report.faults:
        judged = failed(Check.DATA, report.faults[0])
    else:
        judged = found(
            Check.DATA,
            State.OK,
            f"{report.accepted} images of {report.patients} patients can be used.",
        )
    if report.study is None:
        return [
            judged,
            *skipped([Check.POLICY], "Not checked: no study was named (--study STUDY)."),
        ]
    if report.policy:
        why = " ".join(report.policy)
        remedy = "Change the study; or, if the steward agrees, [policy] in site.toml."
        return [judged, failed(Check.POLICY, PolicyRefused(why, remedy=remedy))]
    return [judged, found(Check.POLICY, State.OK, "It allows the study.")]


def exit_status(findings: Iterable[Finding]) -> int:
    """0 where nothing failed, else the status of the first failure's error."""
    codes = {kind.code: kind.exit_status for kind in all_errors()}
    return next((codes[one.code] for one in findings if one.state is State.FAIL), 0)


def render(findings: Sequence[Finding]) -> str:
    """The findings as text for a terminal; what was skipped for one reason is one line."""
    lines: list[str] = []
    for first, last in _runs(findings):
        span = f"{first.number}-{last.number}" if last is not first else str(first.number)
        name = first.name if last is first else f"{first.name} to {last.name}"
        lines.append(f"{span:>5}  {first.state.value:4}  {name}: {first.what}")
        if first.remedy:
            lines.append(f"{'':13}{first.remedy}" + (f" [{first.code}]" if first.code else ""))
    return "\n".join(lines)


def _runs(findings: Sequence[Finding]) -> Iterator[tuple[Finding, Finding]]:
    """First and last of each row of findings that were skipped for the same reason."""
    rest = list(findings)
    while rest:
        first = last = rest.pop(0)
        while (
            rest
            and rest[0].state is State.SKIP is first.state
            and (rest[0].what, rest[0].number) == (first.what, last.number + 1)
        ):
            last = rest.pop(0)
        yield first, last


def _cuda() -> str | None:
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _is_open(path: Path) -> bool:
    try:
        about = path.lstat()
    except OSError:
        return False
    return about.st_uid != os.geteuid() or bool(stat.S_IMODE(about.st_mode) & 0o077)


def _shown(site: Site, path: Path) -> str:
    return "the site folder" if path == site.root else str(path.relative_to(site.root))
