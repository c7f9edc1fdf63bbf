"""Runs work in other processes, so that a kernel that hangs or a device that is lost costs one piece of work, not all.

A worker tells what it does in lines of JSON, appended to a file: {"machine": ...}, {"plan": names}, {"begin": name},
{"result": {"name": ..., ...}}, and {"done": true} last. One that ends without its last line, or says nothing for too
long, is started again without what it had begun; what it died of becomes a result, too. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, str(Path(__file__).with_name("worker.py"))]
"""What starts a worker; the path of its job comes behind."""
POLL_SECONDS = 0.05
EXIT_SECONDS = 10
"""For a worker that has said that it is done."""
LOG_TAIL = 1500
"""Characters of a dead worker's output that are kept."""


class Worker:
    """One process at a time, until its job is done."""

    def __init__(self, job: dict[str, Any], folder: Path, name: str, command: list[str]) -> None:
        self.job = {**job, "finished": [], "lost": [], "out": str(folder / f"{name}.lines")}
        self.path, self.log = folder / f"{name}.json", folder / f"{name}.log"
        self.command = command
        self.done = False
        self._process: subprocess.Popen[bytes] | None = None
        self._begun: str | None = None
        self._offset, self._heard, self._fruitful = 0, 0.0, True

    def start(self) -> None:
        """A process for what is left of the job."""
        self.path.write_text(json.dumps(self.job))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.command, str(self.path)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._heard, self._begun, self._fruitful = time.monotonic(), None, False

    def poll(self, stall_seconds: float) -> list[dict[str, Any]]:
        """What it has said since the last time; starts it again where it died with work left."""
        assert self._process is not None
        status = self._process.poll()
        messages = self._read()  # after the status: nothing is said after the end
        if self.done:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS)
            self.stop()
            return messages
        how: str | None = None
        if status is not None:
            how = f"the process ended with status {status}"
        elif time.monotonic() - self._heard > stall_seconds:
            how = f"no sign of life for {stall_seconds:.0f} s"
            self.stop()
        if how is not None:
            messages += self._after_death(how)
        return messages

    def stop(self) -> None:
        """Ends the process and those that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> list[dict[str, Any]]:
        path = Path(self.job["out"])
        if not path.exists():
            return []
        with path.open("rb") as lines:
            lines.seek(self._offset)
            text = lines.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        messages = [json.loads(line) for line in whole.splitlines()]
        for message in messages:
            self._heard = time.monotonic()
            self.done = self.done or "done" in message
            if "begin" in message:
                self._begun, self._fruitful = message["begin"], True
            if "result" in message:
                self.job["finished"].append(message["result"]["name"])
                self._begun = None
        return messages

    def _after_death(self, how: str) -> list[dict[str, Any]]:
        tail = self.log.read_text(errors="replace")[-LOG_TAIL:]
        culprit = self._begun
        if culprit is not None:
            self.job["lost"].append(culprit)
        if self._fruitful:
            self.start()
        else:  # it could not even begin: it would not the next time either
            self.done = True
        if culprit is None:
            return [] if not self.done else [{"lost": "start", "how": how, "output": tail}]
        return [{"lost": culprit, "how": how, "output": tail}]


def supervise(
    jobs: list[dict[str, Any]],
    folder: Path,
    hear: Callable[[dict[str, Any]], None],
    *,
    deadline: float,
    stall_seconds: float,
    command: list[str] | None = None,
) -> bool:
    """Runs all jobs side by side, and hands on all that their workers say, until they are done or `deadline`
    (time.monotonic()). Whether they were done."""
    part = jobs[0]["part"] if jobs else ""
    workers = [Worker(job, folder, f"{part}-{number}", command or COMMAND) for number, job in enumerate(jobs)]
    try:
        for worker in workers:
            worker.start()
        left = list(workers)
        while left and time.monotonic() < deadline:
            for worker in list(left):
                for message in worker.poll(stall_seconds):
                    hear(message)
                if worker.done:
                    left.remove(worker)
            time.sleep(POLL_SECONDS)
        return not left
    finally:
        for worker in workers:
            worker.stop()
