"""Importing a module of ours changes nothing of the program that imports it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process


ROOT = Path(__file__).parents[2]

# Libraries do set things up when they are imported: flwr and torch give themselves log handlers
# and levels, flwr sets a variable of the environment, several add filters of warnings. So all
# that our modules import of others comes first, and what is different after is our own doing.
SCRIPT = """
import ast, contextlib, importlib, json, logging, os, pkgutil, signal, sys, warnings
from pathlib import Path

def imports(body):
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from imports(node.body)

def is_ours(name):
    return name.split(".")[0].startswith("cloister")

def loggers():
    known = logging.root.manager.loggerDict.items()
    found = {name: log for name, log in known if isinstance(log, logging.Logger)}
    return {"": logging.root, **found}

def logs():
    return {
        name: [log.level, log.propagate, log.disabled, [repr(one) for one in log.handlers]]
        for name, log in loggers().items()
    }

def state():
    return {
        "environment": dict(os.environ),
        "warnings": [repr(one) for one in warnings.filters],
        "logging off": logging.root.manager.disable,
        "signals": {str(one): repr(signal.getsignal(one)) for one in signal.valid_signals()},
        "hooks": [repr(sys.excepthook), repr(sys.unraisablehook), repr(warnings.showwarning)],
    }

names, others = [], set()
for folder in sys.argv[1:]:
    package = Path(folder) / "cloister_fl"
    names += [one.name for one in pkgutil.walk_packages([str(package)], package.name + ".")]
    for path in package.rglob("*.py"):
        others |= {name for name in imports(ast.parse(path.read_text("utf-8")).body)}
for name in sorted(others):
    if not is_ours(name):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
before, before_logs = state(), logs()
for name in names:
    importlib.import_module(name)
after, after_logs = state(), logs()
untouched = [logging.NOTSET, True, False, []]
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
changed |= {
    f"log of {name}": [before_logs.get(name), now]
    for name, now in after_logs.items()
    if before_logs.get(name, untouched) != now
}
print(json.dumps({"modules": names, "changed": changed}))
"""


def test_it_leaves_logging_warnings_and_the_environment_alone() -> None:
    folders = [str(ROOT / side) for side in ("common", "server", "client")]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, check=True, cwd="/"
    )
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert len(told["modules"]) > 150
    assert told["changed"] == {}


MAINS = {
    "cli": (
        "from cloister_fl.cli.main import main\ntry:\n main(['--version'])\nexcept SystemExit: pass"
    ),
    "worker": (
        "import os, socket, sys\n"
        "from cloister_fl.client.dicom.sandbox import worker\n"
        "worker.confine = lambda parent: None\n"
        "ours, theirs = socket.socketpair()\n"
        "sys.argv = ['worker', str(theirs.detach()), '0', '0', str(os.getppid())]\n"
        "worker.enter()"
    ),
}


def _levels(program: str) -> dict[str, list[Any]]:
    show = (
        "\nimport json, logging\n"
        "names = ('pydicom', 'pynetdicom', 'httpx', 'httpcore')\n"
        "logs = [logging.getLogger(name) for name in names]\n"
        "print(json.dumps({log.name: [log.level, log.propagate] for log in logs}))"
    )
    ended = subprocess.run([sys.executable, "-c", program + show], capture_output=True, check=True)
    levels: dict[str, list[Any]] = json.loads(ended.stdout.splitlines()[-1])
    return levels


def test_the_processes_that_meet_patients_data_silence_the_libraries() -> None:
    for program in MAINS.values():
        assert set(map(str, _levels(program).values())) == {"[51, False]"}
