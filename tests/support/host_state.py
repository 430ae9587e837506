"""Everything of a process that a library which it calls could leave changed.

``changes_of`` takes it before and after a piece of code, in a process that has imported nothing
yet, and says what is different.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

UNTOUCHED: list[Any] = [logging.NOTSET, True, []]
"""Level, propagation and handlers of a logger that nobody has set up."""

WARNED = "import numpy, torch, matplotlib\n"  # their own filters of warnings are theirs


_LOOPBACK = {
    *("0100007F", "00000000000000000000000001000000"),
    "0000000000000000FFFF00000100007F",  # 127.0.0.1 as an address of IPv6
}


def listening() -> set[str]:
    """Addresses and ports that this machine listens on, as the kernel writes them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(fields[1])
    return found


def beyond_loopback(places: set[str]) -> set[str]:
    """Those of ``listening`` that other machines may reach."""
    return {place for place in places if place.rpartition(":")[0] not in _LOOPBACK}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def logs() -> dict[str, list[Any]]:
    """Level, propagation and handlers of each logger that is set up; the root has the name ''."""
    known = {"": logging.root, **logging.root.manager.loggerDict}
    found = {name: log for name, log in known.items() if isinstance(log, logging.Logger)}
    states = {
        name: [log.level, log.propagate, [repr(one) for one in log.handlers]]
        for name, log in found.items()
    }
    return {name: state for name, state in states.items() if state != UNTOUCHED}


def children() -> list[str]:
    """Command lines of the processes that this one has started and that live."""
    mine = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                mine.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return sorted(mine)


def state() -> dict[str, Any]:
    """Return it, by name; what needs numpy, torch or matplotlib only where that is imported."""
    mask = os.umask(0)
    os.umask(mask)
    found: dict[str, Any] = {
        "environment": dict(os.environ),
        "logging": logs(),
        "logging off": logging.root.manager.disable,
        "signals": {str(one): repr(signal.getsignal(one)) for one in signal.valid_signals()},
        "working folder": str(Path.cwd()),
        "umask": mask,
        "module path": list(sys.path),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(warnings.showwarning)],
        "random": _digest(repr(random.getstate()).encode()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": children(),
        "start method": multiprocessing.get_start_method(allow_none=True),
    }
    if "numpy" in sys.modules:
        import numpy as np

        found["numpy random"] = _digest(repr(np.random.get_state(legacy=False)).encode())
        found["numpy errors"] = np.geterr()
    if "torch" in sys.modules:
        import torch

        found["torch threads"] = torch.get_num_threads()
        found["torch random"] = _digest(torch.get_rng_state().numpy().tobytes())
        found["torch gradients"] = torch.is_grad_enabled()
        found["torch type"] = str(torch.get_default_dtype())
        found["torch deterministic"] = torch.are_deterministic_algorithms_enabled()
    if "matplotlib" in sys.modules:
        import matplotlib as mpl

        found["matplotlib"] = _digest(repr(sorted(mpl.rcParams.items(), key=str)).encode())
    if "flwr.supercore.telemetry" in sys.modules:
        found["telemetry"] = sys.modules["flwr.supercore.telemetry"].FLWR_TELEMETRY_ENABLED  # type: ignore[attr-defined]
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    """What changed, by name: before and after."""
    told = {}
    for name in sorted(before.keys() & after.keys()):
        one, other = before[name], after[name]
        if isinstance(one, dict):
            keys = one.keys() | other.keys()
            for key in sorted(key for key in keys if one.get(key) != other.get(key)):
                told[f"{name}: {key}"] = [one.get(key), other.get(key)]
        elif one != other:
            told[name] = [one, other]
    return told


def changes_of(code: str, *, first: str = "", folder: Path) -> dict[str, list[Any]]:
    """Run ``code`` in a process of its own and return what it left changed.

    Args:
        code: Python source.
        first: source that runs before the state is taken, such as imports of the host.
        folder: the working folder.
    """
    changes: dict[str, list[Any]] = _run(
        "before = host_state.state()\n"
        "exec(compile(code, '<code>', 'exec'), space)\n"
        "told = host_state.differences(before, host_state.state())\n",
        [first, code],
        folder,
    )
    return changes


def modules_after(code: str, *, folder: Path) -> set[str]:
    """Run ``code`` in a process of its own and return the modules that are imported then."""
    names = _run(
        "exec(compile(code, '<code>', 'exec'), space)\ntold = sorted(sys.modules)\n",
        ["", code],
        folder,
    )
    return set(names)


def _run(program: str, sources: list[str], folder: Path) -> Any:
    """Run ``program``, which leaves in ``told`` what is returned."""
    known = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    path = os.pathsep.join([str(Path(__file__).parents[1]), *known])
    environment = {**os.environ, "PYTHONPATH": path}
    for name in ("OMP_NUM_THREADS", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        environment.pop(name, None)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, sys\nfrom support import host_state\n"
            "first, code = json.load(sys.stdin)\n"
            "exec(compile(first, '<first>', 'exec'), space := {'__name__': 'host'})\n"
            f"{program}print(json.dumps(told))\n",
        ],
        input=json.dumps(sources),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
