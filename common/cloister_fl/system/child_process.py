"""Child processes of a service: they report lines of JSON, and never outlive it.

The service makes a ``Child``, which is started again when it ends; the child's own program runs
inside ``child()``. What a child tells is written to its standard output, one object a line, so no
library's print can be taken for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from cloister_fl.errors import CloisterError
from cloister_fl.system.module_path import environment_of_children

_PR_SET_PDEATHSIG = 1
_PARENT = "CLOISTER_PARENT"
_out: Any = None
_lock = threading.Lock()

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that no proxy can reach for us."""


def tell(event: str, **details: str | int | float) -> None:
    """Report an event to the parent; without one, on standard output."""
    line = json.dumps({"event": event, **details})
    with _lock, contextlib.suppress(OSError, ValueError):
        print(line, file=_out or sys.stdout, flush=True)


def tell_failed(error: CloisterError) -> None:
    """Report that this process cannot go on, and why."""
    tell("failed", code=error.code, what=error.what, why=error.why, remedy=error.remedy)


def failure_in_words(told: Mapping[str, Any]) -> str:
    """What an event ``failed`` or ``crashed`` says: type or code, what and why."""
    words = told.get("type"), told.get("code"), told.get("what"), told.get("why")
    return " ".join(str(word) for word in words if word)


@contextlib.contextmanager
def child() -> Iterator[None]:
    """Run a child's program: dies with its parent, and shows no exception's text.

    A library's exception can quote what it was given, a record number among it, and a service's
    standard error ends in the system's log. So what escapes is told by its type alone, and
    nothing that a library prints or warns of is shown.
    """
    global _out  # noqa: PLW0603  # the one channel of the process
    die_with_parent()
    signal.signal(signal.SIGTERM, _leave)
    _out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    sys.excepthook = _by_type
    threading.excepthook = lambda args: _by_type(args.exc_type, args.exc_value, args.exc_traceback)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(0)
    except SystemExit:
        raise
    except BaseException as error:
        tell("crashed", type=type(error).__name__)
        sys.exit(70)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent's thread ends, however it ends.

    Where the kernel has no such thing, a thread looks every second whether the parent is there.
    """
    parent = int(os.environ.get(_PARENT, "0")) or os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def environment(
    extra: Mapping[str, str] | None = None, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of a child: no telemetry, no proxy before loopback, no module from here.

    With ``HTTP_PROXY`` set and no ``NO_PROXY``, what a child asks of an archive at loopback would
    go to the hospital's proxy.
    """
    made = {
        **environment_of_children(base),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **(extra or {}),
        _PARENT: str(os.getpid()),
    }
    return local_environment(made)


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which loopback never goes through a proxy.

    Python reads ``no_proxy`` before ``NO_PROXY``, others the other way round; both are set to
    what both said. ``HTTPS_PROXY`` and the rest stay, for the way to the coordinator.
    """
    named = [
        host.strip()
        for key in ("NO_PROXY", "no_proxy")
        for host in environment.get(key, "").split(",")
        if host.strip()
    ]
    merged = ",".join(dict.fromkeys([*named, *LOCAL]))
    return {**environment, "NO_PROXY": merged, "no_proxy": merged}


@dataclass
class Child:
    """A process that is started again when it ends, after a wait that grows.

    Attributes:
        name: what it is called.
        arguments: of the Python interpreter; no secrets.
        env: its whole environment.
        events: where what it tells is put, as (name, line).
    """

    name: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    events: queue.Queue[tuple[str, dict[str, Any]]]
    _process: subprocess.Popen[str] | None = None
    _began: float = 0.0
    _wait: float = field(default=0.0)
    _next: float = 0.0

    SOONEST_S = 1.0
    LATEST_S = 30.0
    STABLE_S = 60.0

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def tend(self) -> None:
        """Start it, if it does not run and has waited; call this again and again.

        Only from the main thread: the kernel ends a child with the thread that started it.
        """
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            lived = time.monotonic() - self._began
            self._wait = (
                self.SOONEST_S
                if lived > self.STABLE_S
                else min(self.LATEST_S, max(self.SOONEST_S, 2 * self._wait))
            )
            self._next = time.monotonic() + (0 if status == 0 else self._wait)
            self.events.put((self.name, {"event": "ended", "status": status}))
        if time.monotonic() >= self._next:
            self._start()

    def _start(self) -> None:
        self._began = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  # our own modules
            # -P: a package that somebody put into the working directory is not ours; see also
            # ``environment``.
            [sys.executable, "-P", *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=dict(self.env),
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        self.events.put((self.name, {"event": "started", "pid": self._process.pid}))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    told = json.loads(line[:4096])
                    if isinstance(told, dict):
                        self.events.put((self.name, told))

    def stop(self, seconds: float = 10.0) -> None:
        """End it: SIGTERM, then SIGKILL."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _by_type(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    del error, trace
    tell("crashed", type=kind.__name__)


def _leave(*_: object) -> None:
    raise SystemExit(0)
