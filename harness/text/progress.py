"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LINE_SECONDS = 10.0


class Progress:
    """Writes to `stream` (standard error where None); nothing at all with `quiet`."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar_in_use: Any = None

    def say(self, line: str) -> None:
        """One line of its own."""
        if self._quiet:
            return
        if self._bar_in_use is not None:  # above the bar
            self._bar_in_use.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    @contextmanager
    def work(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Shows how much of `total_bytes` is done; yields the function to call with each number of bytes done."""
        if self._quiet:
            yield lambda count: None
        elif self._stream.isatty():
            with self._bar(title, total_bytes) as advance:
                yield advance
        else:
            yield self._lines(title, total_bytes)

    @contextmanager
    def _bar(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(file=self._stream)) as bar:
            task = bar.add_task(title, total=total_bytes)
            self._bar_in_use = bar
            try:
                yield lambda count: bar.advance(task, count)
            finally:
                self._bar_in_use = None

    def _lines(self, title: str, total_bytes: int) -> Callable[[int], None]:
        done = 0
        last = time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.say(f"{title}: {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB")

        return advance
