"""How a run ends whose processes live and whose work does not go on: a deadlock, a file system that never answers.

The watch (watch.py) hears from a thread of each rank, which goes on beating while the main thread is stuck. So the main
thread says here what it has come to, and a thread looks whether it still does.

The stated bound: from the last sign of progress of the rank that falls silent until every process has ended, at most
`bound_seconds` = seconds + 2 * interval + 10 seconds, where the interval, between two looks, is a tenth of `seconds`
and at most 5. The 10: a rank that hears nothing from the hub does without after 4 s, and ending takes 5 s at most. A
process that is stopped, or whose main thread holds Python's interpreter lock, is out of reach from here: the other
ranks find it lost, within the watch's bound; a run of one process waits for whoever started it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .ending import Ending


class Watchdog:
    """Off until `arm`. The main thread's, but for `alive`, which costs two references and a look at the clock.

    Every rank then appends the stack traces of all its threads to its `stacks_file` and ends with EXIT_RESUME.
    """

    def __init__(self, ending: Ending, on_hung: Callable[[str], None]) -> None:
        """`on_hung` gets the reason, on a thread, and ends the run; it returns only where that is under way already."""
        self._ending, self._on_hung = ending, on_hung
        self._last = time.monotonic(), "nothing yet"
        self._suspensions = 0
        self._disarmed: threading.Event | None = None
        ending.progress = self._progress

    @property
    def stacks_file(self) -> Path | None:
        """Where the stack traces go, of a lost rank's survivors too; None: nowhere."""
        return self._ending.stacks_file

    @stacks_file.setter
    def stacks_file(self, path: Path | None) -> None:
        self._ending.stacks_file = path

    def arm(self, seconds: float) -> None:
        """From now on end the run where `alive` is not called for `seconds`."""
        self.disarm()
        self.alive(self._last[1])
        disarmed = self._disarmed = threading.Event()
        threading.Thread(target=self._run, args=(seconds, disarmed), name="harness-watchdog", daemon=True).start()

    def disarm(self) -> None:
        """No longer look."""
        if self._disarmed is not None:
            self._disarmed.set()

    def alive(self, what: str) -> None:
        """The work goes on; `what` has just been done, or begun: "step 120", "validation batch 7"."""
        self._last = time.monotonic(), what

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The block may take as long as it takes."""
        self._suspensions += 1
        try:
            yield
        finally:
            self.alive(self._last[1])  # before the next line, as the thread may look in between
            self._suspensions -= 1

    def _run(self, seconds: float, disarmed: threading.Event) -> None:
        interval = interval_seconds(seconds)
        now, last, excused = time.monotonic(), self._last, 0.0
        while not disarmed.wait(interval):
            before, now = now, time.monotonic()
            held_up = max(0.0, now - before - 2 * interval)  # as a whole, by Ctrl-Z or a debugger: that was not silence
            suspended = self._suspensions > 0  # looked at before `_last`, see there
            if self._last is not last:
                last = self._last
                excused = min(held_up, now - last[0])
            else:
                excused += held_up
            silent_seconds = now - last[0] - excused
            if silent_seconds >= seconds and not suspended:
                return self._on_hung(f"no progress for {silent_seconds:.0f} s, last: {last[1]}")
        return None

    def _progress(self) -> str:
        at, what = self._last
        return f"last sign of progress here: {what}, {time.monotonic() - at:.0f} s ago"


def interval_seconds(seconds: float) -> float:
    """Between two looks of a watchdog of so many seconds."""
    return min(5.0, seconds / 10)


def bound_seconds(seconds: float) -> float:
    """From the last sign of progress until every process has ended."""
    return seconds + 2 * interval_seconds(seconds) + 10
