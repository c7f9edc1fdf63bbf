"""How a process is asked to stop: SIGTERM and SIGUSR1, which schedulers send ahead of a time limit or a preemption.

The first of them is noted; the loop looks at `requested()` when it has finished a step, saves and ends. Work that no
loop looks after, such as building data, runs inside `raising()`. SIGINT stays what Python makes of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

EXIT_RESUME: Final = 75
"""Exit status of a run that was asked to stop, or that lost a rank: started again, it goes on. EX_TEMPFAIL of
sysexits.h."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)

_requested: str | None = None
_raise_at_once = False
_at_fork = False


class StopRequested(BaseException):
    """This process was asked to stop, and stops; not an Exception, so that no handler of errors takes it for one."""


def install() -> None:
    """From now on SIGTERM and SIGUSR1 ask instead of killing. In the main thread; forked children die of SIGTERM."""
    global _at_fork
    for number in SIGNALS:
        signal.signal(number, _note)
    if not _at_fork:  # which cannot be undone, and does nothing where the handlers are others
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
        _at_fork = True


def ignore() -> None:
    """From now on neither signal does anything, to the very end of this process: Python's own end would let them kill
    it again, and torchrun sends SIGTERM to the ranks that leave after the first."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the signal that came, "SIGTERM"; None where none did."""
    return _requested


@contextmanager
def raising() -> Iterator[None]:
    """Within the block a request raises StopRequested in the main thread, once; one that came before it, at once."""
    global _raise_at_once
    try:
        _raise_at_once = True  # before the look: a signal that comes between the two must not be lost
        if _requested is not None:
            raise StopRequested(_requested)
        yield
    finally:
        _raise_at_once = False


def _note(number: int, frame: FrameType | None) -> None:
    global _requested, _raise_at_once
    _requested = _requested or signal.Signals(number).name
    if _raise_at_once:
        _raise_at_once = False  # a second signal must not break into the cleaning up after the first
        raise StopRequested(_requested)


def _hold() -> None:
    """A signal that comes while a process forks must find the child's own handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget() -> None:
    """A forked child, a data worker, is ended by SIGTERM as any process. SIGUSR1, which SLURM sends to every process of
    a step, is its parent's to answer."""
    global _requested, _raise_at_once
    _requested, _raise_at_once = None, False
    for number in SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _let_go()
