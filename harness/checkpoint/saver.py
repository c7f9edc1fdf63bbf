"""Saving while training goes on: a copy of the state is taken, and a thread of its own writes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from harness.parallel import Fragment, Staging

from .store import CheckpointStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on all writers."""

    step: int
    error: Exception | None
    """None: it is committed."""
    stall_seconds: float
    """How long the loop was held up by it."""
    seconds: float
    """From its beginning to its end."""


class Saver:
    """Saves one checkpoint at a time, on a thread. All writers call `start` and `wait` in the same order.

    `after_commit` runs on the thread of every writer, once a checkpoint is committed: the place to delete older ones.
    `on_written` hears of bytes that were written, from the thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        asynchronous: bool = True,
        after_commit: Callable[[int], None] = lambda step: None,
        on_written: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Without `asynchronous` no copy is taken, and `start` returns when all is written."""
        self._store = store
        self._staging = Staging() if asynchronous else None
        self._after_commit, self._on_written = after_commit, on_written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._running: Future[Saved] | None = None

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Take the memory for copies now: a machine without it is found before the first step, and not at a save."""
        if self._staging is not None:
            self._staging.copy(fragments)

    def start(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Begin to save; the fragments may change as soon as this returns. How the last save ended must have been
        taken (`wait`)."""
        assert self._running is None, "two saves must not overlap"
        began = time.perf_counter()
        fragments = list(fragments) if self._staging is None else self._staging.copy(fragments)
        stall = time.perf_counter() - began
        self._running = self._thread.submit(self._save, step, fragments, state, began, stall)
        if self._staging is None:
            self._running.result()

    def ended(self) -> bool:
        """Whether a save has ended and `wait` would return it at once."""
        return self._running is not None and self._running.done()

    def failed(self) -> bool:
        """Whether it has ended without a checkpoint."""
        return self.ended() and self._running is not None and self._running.result().error is not None

    def wait(self) -> Saved | None:
        """How the last save ended, when it has; None where there is none, or its end was taken already."""
        if self._running is None:
            return None
        saved, self._running = self._running.result(), None
        return saved

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._thread.shutdown(wait=True)

    def _save(self, step: int, fragments: list[Fragment], state: dict[str, Any], began: float, stall: float) -> Saved:
        error: Exception | None = None
        try:
            self._store.save(step, fragments, state, self._on_written)
        except Exception as raised:
            error = raised
        else:
            try:
                self._after_commit(step)
            except Exception:  # the checkpoint is committed on every rank, whatever came after it here
                logger.exception("after the checkpoint of step %d", step)
        seconds = time.perf_counter() - began
        return Saved(step, error, stall if self._staging is not None else seconds, seconds)
