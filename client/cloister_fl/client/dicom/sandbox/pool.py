"""Pool of worker processes that read files, kept alive between them.

Each worker has a thread here that starts it, hands it one file at a time, waits no longer than a
file may take, and replaces it when it dies, dawdles or says what no sound worker says. A file on
which that happens is turned away; the next one meets a fresh worker. What a worker says is
checked (``ipc``), and nothing of it is shown or logged.

A thread for each worker is more than convenience: the system ends a worker with the thread that
started it, so none outlives this process, whatever happens to it.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.sandbox.worker_process import (
    SEGMENTATION_WORKER,
    WORKER,
    NotAsked,
    NotStarted,
    Worker,
)
from cloister_fl.client.dicom.size_limits import ADDRESS_SPACE_BYTES
from cloister_fl.errors import DecoderUnfit
from cloister_fl.study.schema import Input
from cloister_fl.system.installation import install_command

IDLE_SECONDS = 20.0
"""After so long without a file a worker ends, and training has its memory."""
_ATTEMPTS = 2

Reading = tuple[Facts, NDArray[np.uint16]]


@dataclass(frozen=True, eq=False)
class _Job:
    data: bytes = field(repr=False)
    spec: Input
    released: bool
    segment: str
    future: Future[Reading]


class Pool:
    """Reads files in worker processes, which start when there is something to read.

    Args:
        workers: how many; else ``default_workers``.
        module: whose ``main`` the processes run.
    """

    def __init__(self, workers: int | None = None, *, module: str = WORKER) -> None:
        self.workers = workers or default_workers()
        self._module = module
        self._owner = os.getpid()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._running: set[Worker] = set()
        self._closed = False
        self._open = 0

    def submit(
        self, data: bytes, spec: Input, *, released: bool = False, segment: str = ""
    ) -> Future[Reading]:
        """Queue one file; the future gives what ``Worker.ask`` returns.

        The future raises ``RejectedFile`` for a file that is turned away and ``DecoderUnfit``
        where a decoder fails its known-answer test or no worker can be started.
        """
        future: Future[Reading] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._jobs.put(_Job(data, spec, released, segment, future))
            self._open += 1
            if len(self._threads) < min(self._open, self.workers):
                thread = threading.Thread(target=self._keep, name="dicom-reader", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """End all workers, busy or not, and wait until they are gone."""
        with self._lock:
            self._closed = True
            threads, running = list(self._threads), list(self._running)
        # After a fork, threads and workers are the other process's.
        if self._owner != os.getpid():
            return
        for worker in running:
            worker.kill()
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()

    def _keep(self) -> None:
        """Work of one thread: a worker, and the files that it reads."""
        worker: Worker | None = None
        try:
            while True:
                try:
                    job = self._jobs.get(timeout=IDLE_SECONDS if worker is not None else None)
                except queue.Empty:
                    self._retire(worker)
                    worker = None
                    continue
                if job is None:
                    return
                if self._closed or not job.future.set_running_or_notify_cancel():
                    job.future.cancel()
                else:
                    worker = self._serve(job, worker)
                # A reference would keep the last file in memory until the next.
                del job
                with self._lock:
                    self._open -= 1
        finally:
            self._retire(worker)

    def _serve(self, job: _Job, worker: Worker | None) -> Worker | None:
        """Answer one job; return the worker for the next, if there is one still."""
        for _ in range(_ATTEMPTS):
            try:
                if worker is None and not self._closed:
                    worker = self._start()
                if worker is None:
                    raise NotStarted
                read = worker.ask(job.data, job.spec, released=job.released, segment=job.segment)
                job.future.set_result(read)
                break
            except (NotStarted, NotAsked):
                self._retire(worker)
                worker = None
            except BaseException as error:
                job.future.set_exception(error)
                break
        else:
            job.future.set_exception(_not_started())
        if worker is not None and (worker.worn or not worker.alive):
            self._retire(worker)
            return None
        return worker

    def _start(self) -> Worker:
        worker = Worker(self._module)
        with self._lock:
            self._running.add(worker)
            closed = self._closed
        if closed:
            worker.kill()
        return worker

    def _retire(self, worker: Worker | None) -> None:
        if worker is None:
            return
        with self._lock:
            self._running.discard(worker)
        if worker.alive:
            worker.stop()


def _not_started() -> DecoderUnfit:
    return DecoderUnfit(
        "The process that decodes images cannot be started.",
        why="It ended, or did not answer for a minute, before it was given a file.",
        remedy="Allow a process 2 GB of memory, and install the pinned versions: "
        + install_command("client"),
    )


def default_workers() -> int:
    """One a processor core that this process may use, as far as memory goes; at least one.

    Hostile files can make every worker take all that it may at once.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // ADDRESS_SPACE_BYTES))


_lock = threading.Lock()
_shared: dict[str, Pool] = {}
_of_the_parent: list[Pool] = []


def shared_pool(*, segmentations: bool = False) -> Pool:
    """Return the pool of this process; it is closed when the process ends.

    Args:
        segmentations: whether its workers read segmentations, too.
    """
    module = SEGMENTATION_WORKER if segmentations else WORKER
    with _lock:
        if module not in _shared:
            _shared[module] = Pool(module=module)
        return _shared[module]


def close_shared_pool() -> None:
    """End the workers of ``shared_pool``; the next call of it starts anew."""
    with _lock:
        pools = list(_shared.values())
        _shared.clear()
    for pool in pools:
        pool.close()


def _after_fork() -> None:
    """A forked process has none of the threads; it gets a pool of its own."""
    global _lock  # noqa: PLW0603 - one a process
    _lock = threading.Lock()
    # Kept, so that nothing of them is torn down here.
    _of_the_parent.extend(_shared.values())
    _shared.clear()


atexit.register(close_shared_pool)
os.register_at_fork(after_in_child=_after_fork)
