"""`python -m harness.launcher ARGS`: torchrun that passes requests to stop on to its workers and ends as they ended.

ARGS are those of torchrun (torch.distributed.run), which runs in this process. By itself it would, on SIGTERM, kill the
workers 30 s later; die of SIGUSR1 and leave them behind; and end with status 1 whatever theirs were. Here both signals
go on to the workers, which save and end in their own time: whoever sent the signal sends SIGKILL when time is over.
Before there are workers they end the launcher with 75. SIGINT, SIGHUP and SIGQUIT are torchrun's as before.

Exit status: see `exit_status`; 130 for SIGINT and so on; 1 where the machines did not meet.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from harness.stop import EXIT_RESUME, SIGNALS

LOOK_AGAIN_SECONDS: Final = 1.0
"""After a signal: between two looks for workers that had not been started when it came."""
SAID_ANYWAY: Final = ("Sending process", "failed (exitcode")
"""Beginnings of torchrun's log lines on how workers end."""


class Forwarding:
    """Passes SIGTERM and SIGUSR1 on to the workers, or ends the process with EXIT_RESUME where there are none yet.

    From a thread that the interpreter's own signal handler wakes: the main thread may be waiting in C++, for minutes,
    for other machines, and runs no Python meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = False  # the first worker is being started, or has been
        self._arrived: set[int] = set()
        self._passed_on: set[tuple[int, int]] = set()  # signal and process

    def begin(self) -> None:
        """In the main thread, once."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
            signal.siginterrupt(number, False)
        sys.addaudithook(self._look_for_a_start)
        threading.Thread(target=self._run, args=(read,), name="harness-signals", daemon=True).start()

    def _look_for_a_start(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook: called in the starting thread before a process is made."""
        if not self._started and event == "subprocess.Popen":
            environment = arguments[3]
            if environment is not None and "TORCHELASTIC_RUN_ID" in environment:
                with self._lock:
                    self._started = True

    def _run(self, read: int) -> None:
        while True:
            if select.select([read], [], [], LOOK_AGAIN_SECONDS if self._arrived else None)[0]:
                arrived = set(os.read(read, 4096)) & set(SIGNALS)
                self._arrived |= arrived
                self._passed_on = {pair for pair in self._passed_on if pair[0] not in arrived}
            if self._arrived:
                self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:  # held to the end of this process, so that no worker is left behind
            workers = children(os.getpid())
            if not self._started and not workers:
                names = " and ".join(sorted(signal.Signals(number).name for number in self._arrived))
                say(f"{names} before any worker was started: exit status {EXIT_RESUME}, worth another start")
                os._exit(EXIT_RESUME)
        for pair in ((number, worker) for number in self._arrived for worker in workers):
            if pair not in self._passed_on:
                self._passed_on.add(pair)
                with suppress(ProcessLookupError):
                    os.kill(pair[1], pair[0])


def children(parent: int) -> list[int]:
    """Ids of the processes that `parent` has started and not yet waited for: torchrun keeps those of its workers to
    itself."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            after_name = (process / "stat").read_text(errors="replace").rpartition(")")[2]
            if int(after_name.split()[1]) == parent:
                found.append(int(process.name))
    return found


def exit_status(statuses: Sequence[int]) -> int:
    """The launcher's, from those of the workers that failed, in order of time; a negative one is the signal it died of.

    The first error of a worker's own (neither 75 nor a signal) counts; without one EXIT_RESUME: a job that was stopped
    or that lost a worker is worth another start.
    """
    return next((status for status in statuses if status > 0 and status != EXIT_RESUME), EXIT_RESUME)


def describe(statuses: dict[int, int]) -> str:
    """Of the failed workers, by rank: "rank 3 was killed by SIGKILL; ranks 0, 1 ended with status 75"."""
    ranks: dict[str, list[int]] = {}
    for rank, status in statuses.items():
        how = f"ended with status {status}"
        if status < 0:
            known = -status in set(signal.Signals)
            how = f"killed by {signal.Signals(-status).name if known else f'signal {-status}'}"
        ranks.setdefault(how, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(which) > 1 else ''} {', '.join(map(str, sorted(which)))} {how}"
        for how, which in ranks.items()
    )


def say(text: str) -> None:
    """One line on stderr."""
    with suppress(OSError):
        print(f"harness.launcher on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun to its end; the exit status."""
    Forwarding().begin()
    try:
        return run_workers(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before torchrun handles SIGINT
        return 128 + signal.SIGINT


def run_workers(arguments: Sequence[str]) -> int:
    """What `main` does once the signals are in hand."""
    from torch.distributed import run  # takes seconds, in which a signal may come
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    log.addFilter(lambda record: not str(record.msg).startswith(SAID_ANYWAY))
    try:
        run.main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:  # each has said why itself
        in_order = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        statuses = {rank: failure.exitcode for rank, failure in in_order}
        status = exit_status(list(statuses.values()))
        worth = ", worth another start" if status == EXIT_RESUME else ""
        say(f"{describe(statuses)}: exit status {status}{worth}")
        return status
    except SignalException as error:
        say(f"ended by {signal.Signals(error.sigval).name}, and its workers with it")
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
