"""Thread pool, one patient a core: a patient's few images are too little to share between cores.

torch divides each operation over all cores, which pays for large batches. For the handful of
images of one patient it costs more than it brings: with ResNet-18 and four images of 128 pixels,
two cores lose a quarter of their speed. Side by side each core keeps all of it, and a result no
longer depends on how many cores there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``work(item)`` of each item, in order, computed by as many threads as torch has.

    While it runs, each thread computes with one core, the caller's included. At most one result
    more than there are threads is held besides the one that was yielded last.

    Args:
        work: safe to call from several threads; it must not add to gradients that they share.
        items: what to work on.
    """
    threads = _cores.enter()
    pool = ThreadPoolExecutor(threads, initializer=_one_core) if threads > 1 else None
    torch.set_num_threads(1)
    try:
        if pool is None:
            yield from map(work, items)
        else:
            yield from _ahead(pool, work, iter(items), threads + 1)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        _cores.leave(threads)


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch compute on one core in this thread, as ``side_by_side`` does in its own."""
    threads = _cores.enter()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _cores.leave(threads)


class _Cores:
    """How many threads torch had before anybody here changed it.

    torch keeps a number for each thread, and one for threads to come, whoever sets it. A second
    user, begun in a new thread while the first is at work, must not take the first's 1 for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._threads = 1

    def enter(self) -> int:
        """Return how many threads the caller may have."""
        with self._lock:
            if not self._users:
                self._threads = torch.get_num_threads()
            self._users += 1
            return self._threads

    def leave(self, threads: int) -> None:
        """Give the caller's thread its number back, and threads to come theirs."""
        with self._lock:
            self._users -= 1
            torch.set_num_threads(threads)


_cores = _Cores()


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterator[Item], most: int
) -> Iterator[Result]:
    begun: deque[Future[Result]] = deque()
    begun.extend(pool.submit(work, item) for item in islice(items, most))
    while begun:
        # Not held here any longer than by the caller: a result can be a whole gradient.
        result = begun.popleft().result()
        begun.extend(pool.submit(work, item) for item in islice(items, 1))
        yield result
        del result


def _one_core() -> None:
    # A thread takes over the process's number at its first question, and only then its own.
    torch.get_num_threads()
    torch.set_num_threads(1)
