"""How a process of a job ends by a thread other than the main one, which may be stuck in a collective or anywhere."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from .hub import Verdict

LONGEST_SECONDS = 5.0
"""From the call of `Ending.end` until the process is gone."""

_TELLING_SECONDS = 4.0
_SAYING_SECONDS = LONGEST_SECONDS - _TELLING_SECONDS


class Ending:
    """Ends this process: stack traces where the verdict asks for them, `on_end`, one line on stderr, exit status.

    No further clean-up: no `finally` of the main thread runs. The line, whose end is there where there are stacks:

        harness: rank 0 on nodeA: ended: lost rank 2 on nodeB (its connection closed); stack traces in runs/x/ranks
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_end: Callable[[Verdict], None] | None = None
        """Told why, on another thread, and waited for at most 4 s: to write the reason into a log."""
        self.stacks_file: Path | None = None
        """Where the stack traces of this process are appended; None: they are not written."""
        self.progress: Callable[[], str] | None = None
        """What to say above them of how far this process had come."""
        self._first = threading.Lock()

    def end(self, verdict: Verdict, *, say: bool, others_told: threading.Event | None = None) -> NoReturn:
        """End this process by `verdict`, within LONGEST_SECONDS; `say`: with a line on stderr.

        `others_told`: where other processes learn the verdict from this one, wait for that, but not for long.
        """
        self._first.acquire()  # for ever: who comes second is ended by the first
        start = time.monotonic()
        telling = threading.Thread(target=self._tell, args=(verdict,), daemon=True)
        telling.start()
        if others_told is not None:
            others_told.wait(_TELLING_SECONDS / 2)
        telling.join(max(0.0, start + _TELLING_SECONDS - time.monotonic()))
        stacks = f"; stack traces in {self.stacks_file.parent}" if verdict.wants_stacks and self.stacks_file else ""
        self.leave(verdict.exit_status, verdict.text + stacks if say else None)

    def leave(self, exit_status: int, text: str | None = None) -> NoReturn:
        """End this process at once, with a line where there is a `text`."""
        if text is not None:  # in a thread, as a pipe that nobody reads would hold it for ever
            line = f"harness: {self.name}: ended: {' '.join(text.split())}\n".encode(errors="replace")
            saying = threading.Thread(target=os.write, args=(2, line), daemon=True)
            saying.start()
            saying.join(_SAYING_SECONDS)
        os._exit(exit_status)

    def _tell(self, verdict: Verdict) -> None:
        if verdict.wants_stacks and self.stacks_file is not None:
            progress = f"{self.progress()}\n" if self.progress is not None else ""
            dump_stacks(self.stacks_file, f"{self.name}: ended: {verdict.text}\n{progress}")
        if self.on_end is not None:
            with suppress(Exception):
                self.on_end(verdict)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()


def dump_stacks(path: Path, header: str = "") -> None:
    """Append the stack traces of all threads of this process to `path`, under the time and `header`, and below them the
    threads' names. Never raises: what cannot be written is not."""
    with suppress(Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n{header}\n".encode(errors="replace"))
            faulthandler.dump_traceback(file, all_threads=True)
            names = [f"0x{thread.ident or 0:016x} is {thread.name}\n" for thread in threading.enumerate()]
            file.write(("".join(names) + "\n").encode(errors="replace"))
