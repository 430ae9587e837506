"""Trace one private, masked train message at a warm site through the modules of Cloister.

A simulation of five small hospitals runs in this process. One of them has an app of its own, as in
a deployment; its third train message is watched with ``sys.setprofile``, in every thread. A
function is whatever Python calls as one: lambdas, comprehensions and generator expressions, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from flwr.app import Context, Message

import cloister_fl
from cloister_fl.client.app import SiteApp, app
from cloister_fl.protocol.round_messages import kind_of
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import study, write_federation

SITE, MESSAGE = "anker", 3
MOST_MODULES, MOST_FUNCTIONS = 40, 300
PACKAGES = tuple(cloister_fl.__path__)


class Trace:
    """The product's ClientApp, and the code of ours that one message runs."""

    def __init__(self) -> None:
        self.seen: dict[CodeType, None] = {}
        """What was called, in the order of the first call."""
        self._app = SiteApp()
        self._asked = 0
        self._on = False
        # Threads that are started earlier and wait for work are watched as well.
        threading.setprofile(self._profile)

    def __call__(self, message: Message, context: Context) -> Message:
        if Path(str(context.node_config["site"])).name != SITE:
            return app(message, context)
        train = kind_of(message.content) == "train"
        self._asked += train
        if not train or self._asked != MESSAGE:
            return self._app(message, context)
        self._on = True
        sys.setprofile(self._profile)
        try:
            return self._app(message, context)
        finally:
            sys.setprofile(None)
            self._on = False

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._on and event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            self.seen.setdefault(frame.f_code)

    def by_module(self) -> dict[str, list[str]]:
        """Names of functions by module, both in the order of the first call."""
        found = defaultdict(list)
        for code in self.seen:
            path = code.co_filename.rpartition("/cloister_fl/")[2]
            found[path.removesuffix(".py").replace("/", ".")].append(code.co_qualname)
        return dict(found)


def main() -> int:
    """Print the trace; 1 where it has more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", action="store_true", help="name the functions, too")
    options = parser.parse_args()
    trace = Trace()
    with tempfile.TemporaryDirectory() as work:
        sites = write_federation(Path(work) / "sites")
        run_simulation(Simulation(study(), sites, Path(work) / "run"), client_app=trace)
    print("Functions and module, in the order of the first call:")
    for module, functions in trace.by_module().items():
        print(f"{len(functions):>4}  {module}")
        if options.names:
            print("".join(f"        {name}\n" for name in functions), end="")
    modules, functions = len(trace.by_module()), len(trace.seen)
    print(f"{modules} modules (at most {MOST_MODULES}), {functions} functions ({MOST_FUNCTIONS})")
    return int(modules > MOST_MODULES or functions > MOST_FUNCTIONS)


if __name__ == "__main__":
    sys.exit(main())
