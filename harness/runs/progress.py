"""How far a run is: a bar on a terminal, plain lines in the log."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from . import log

logger = logging.getLogger(__name__)

_SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("learning_rate", lambda value: f"lr {value:.3g}"),
    ("grad_norm", lambda value: f"norm {value:.3g}"),
)
_WINDOW_STEPS = 50
"""Steps over which the speed for the time that is left is averaged."""


class Progress:
    """Says where a run of `total` steps is; `first` steps were done before it began here.

    Every `log_every`-th step, the first and the last are a line of the log; on a terminal the log's console leaves them
    out and a bar shows each step.
    """

    def __init__(
        self, total: int, first: int = 0, log_every: int = 10, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._log_every = log_every
        self._clock = clock
        self._started = False
        self._seconds = self._tokens = 0.0  # since the last line: one step's speed says little on a busy machine
        self._times: deque[tuple[int, float]] = deque([(first, clock())], maxlen=_WINDOW_STEPS + 1)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if log.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[summary]}"),
            )
            self._bar = RichProgress(*columns, console=log.console)
            first = self._times[0][0]
            self._task = self._bar.add_task(self._where(first), total=self._total, completed=first, summary="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, record: dict[str, Any]) -> None:
        """A step is done: `record` is what metrics.jsonl gets, "step" and whatever is known of _SHOWN."""
        step = int(record["step"])
        if step <= self._times[-1][0]:
            self._times.clear()  # the run was rolled back
        self._times.append((step, self._clock()))
        parts = [show(float(record[name])) for name, show in _SHOWN if record.get(name) is not None]
        if record.get("tokens_per_second") is not None:
            seconds = record.get("step_seconds") or 1.0
            self._seconds += seconds
            self._tokens += seconds * record["tokens_per_second"]
            parts.append(f"{_short(self._tokens / self._seconds)} tokens/s")
        summary = "  ".join([*parts, f"ETA {self._time_left(step)}"])
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=self._where(step), summary=summary)
        if step % self._log_every == 0 or step == self._total or not self._started:
            extra = log.FILE_ONLY if self._bar is not None else None
            logger.info("%s  %s", self._where(step), summary, extra=extra)
            self._seconds = self._tokens = 0.0
        self._started = True

    def _where(self, step: int) -> str:
        return f"step {step}/{self._total}"

    def _time_left(self, step: int) -> str:
        """Hours, minutes and seconds at the speed of the last steps."""
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step == first_step:
            return "unknown"
        seconds = round((last_time - first_time) / (last_step - first_step) * max(self._total - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _short(value: float) -> str:
    """Three digits or four, and k or M."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"
