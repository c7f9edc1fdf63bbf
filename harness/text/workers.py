"""Work on batches in processes of their own; results come in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from harness.config import HarnessError

BYTES_PER_WORKER = 32 << 20
"""Text that keeps a process busy for longer than it takes to start."""

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(asked: int | None, total_bytes: int) -> int:
    """Number of processes for `total_bytes` of text; 1 means no extra process."""
    return asked if asked is not None else max(1, min(available_cores(), total_bytes // BYTES_PER_WORKER))


def map_in_processes(
    batches: Iterable[tuple[Batch, Any]],
    work: Callable[[Any], Result],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    setting: str,
) -> Iterator[tuple[Batch, Result]]:
    """For each (batch, argument): the batch, which stays in this process, with work(argument), in order.

    `start(*arguments)` runs first in each process, which is a new interpreter and inherits nothing else. The arguments
    must be small: what a pipe does not hold (64 KiB) would be written for ever to a process that died at its start.
    `setting` is how messages name the number of workers. What `work` raises is raised here; HarnessError where a
    process died.
    """
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (start, arguments))

    def finish() -> tuple[Batch, Result]:
        batch, future = waiting.popleft()
        return batch, future.result()

    try:
        for batch, argument in batches:
            waiting.append((batch, pool.submit(work, argument)))
            if len(waiting) > 3 * workers:  # bounds the memory
                yield finish()
        while waiting:
            yield finish()
    except BrokenProcessPool:  # which shows at a result, or as the next batch is handed over
        raise HarnessError(
            f"a worker process ended early (out of memory, or started from a script without "
            f"`if __name__ == '__main__':`); set {setting} lower, 1 for none"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    start(*arguments)


def _die_with_parent() -> None:
    """A killed parent closes no pool, and its workers would wait for work for ever."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
