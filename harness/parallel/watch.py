"""How a job of many ranks ends when one of them dies, hangs or fails alone, or when the link between hosts is cut.

A collective cannot be relied on for this: gloo waits for a hanging rank, and for one behind a cut link, until the
process group's timeout, and its error does not say which rank that was. So each rank runs a daemon thread that
exchanges signs of life with rank 0's `Hub` (hub.py), and that ends the process when the hub says why the job ends, or
when the hub itself is not heard any more.

The stated bound: from the death of a rank, its hanging, or the cut of a link, until every other process has ended, at
most `bound_seconds` = lost_after_seconds + 2 * interval_seconds + 5 seconds, where the interval is a tenth of
lost_after_seconds and at most 5. A process that dies is found at once, by its closed connection; only hanging ones and
cut links take that long. A process that hangs is not ended from here: its launcher does that when the others have gone.

The thread needs Python's interpreter lock once in `lost_after_seconds`. Measured with torch 2.13: waiting in a gloo
collective, products, autograd, sorting, saving, importing megatron-core or transformers, and sentencepiece from 0.2.2
on hold it for less than 0.5 s at a time. What holds it longer: Tensor.tolist (3 s for 20 million numbers), a regular
expression over tens of MB, and SentencePieceTrainer.train before 0.2.2, which holds it from beginning to end.

Why not through torch's TCPStore: when its host is out of reach its check, get, compare_set and even its constructor
block for ever (2.13), the loss of the connection prints a C++ stack, torchrun's restarts meet the keys of the attempt
before, and nobody learns from a store that a process died.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from harness.config import HarnessError

from .hub import EXIT_FAILED, EXIT_LOST, Connection, Hub, Verdict

_PATIENCE_SECONDS = 4.0  # with on_end, and with a rank that has failed and is to leave by itself
_LONGEST_TEXT = 4000

_COLLECTIVE_FAILURES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "No route to host",
    "Connection timed out",
    "Socket Timeout",
    "NCCL",
)


class Watch:
    """One rank's part in the watch. For jobs of two ranks or more.

    `on_end(text)` is called, in the watch's thread and for at most 4 s, before this process is ended: set it to
    write the reason into a log. Then the process ends without further clean-up, as its main thread may be stuck in a
    collective: with EXIT_LOST where ranks were lost, with EXIT_FAILED where another rank failed. One line goes to
    stderr, from rank 0 (unless a rank on its own host has said itself that it failed) and from ranks that don't hear
    rank 0:

        harness: rank 0 on nodeA: ended: lost rank 2 on nodeB (its connection closed)
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        host: str,
        *,
        lost_after_seconds: float = 30.0,
        join_seconds: float = 600.0,
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        """`host` is where rank 0 runs, as the other ranks reach it: MASTER_ADDR. A rank that has not begun to watch
        `join_seconds` after rank 0 did is lost: imports may take long on some machines."""
        self.rank, self.world_size, self.host = rank, world_size, host
        self.lost_after_seconds, self._join_seconds = lost_after_seconds, join_seconds
        self.interval_seconds = min(5.0, lost_after_seconds / 10)
        self.bound_seconds = lost_after_seconds + 2 * self.interval_seconds + 5.0
        self.on_end = on_end
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._place = f"rank 0 at {host}"
        self._hub: Hub | None = None
        self._connection: Connection | None = None
        self._verdict: Verdict | None = None
        self._leaving = False  # the main thread ends this process by itself
        self._over = threading.Event()  # no more word will come from the hub

    def start(self, store: dist.Store) -> None:
        """Begin to watch. `store` is where the ranks of this start of the job meet before they form a process group, so
        that a rank which fails at that is heard of too.

        Raises HarnessError where rank 0 cannot be reached, and what the store raises where rank 0 does not come.
        """
        if self.rank == 0:
            # A number that only this start of the job knows: neither strangers nor an earlier start's ranks get in.
            token = secrets.randbits(62)
            self._hub = Hub(self.world_size, token, self.lost_after_seconds, self.interval_seconds, self._join_seconds)
            store.set("watch", f"{self._hub.port} {token}")
        port, token = map(int, store.get("watch").split())
        host = "localhost" if self.rank == 0 else self.host
        try:
            sock = socket.create_connection((host, port), timeout=self.lost_after_seconds)
        except OSError as error:
            raise HarnessError(
                f"cannot reach rank 0 at {host}:{port} ({error}); MASTER_ADDR must name the host of "
                f"rank 0, and the hosts of a job must reach each other on every TCP port"
            ) from None
        self._connection = Connection(sock)
        self._connection.send("hello", token=token, rank=self.rank, host=socket.gethostname())
        threading.Thread(target=self._run, args=(self._connection,), name="harness-watch", daemon=True).start()

    def stop(self) -> None:
        """This rank has finished its work. Returns at once; on rank 0, when all ranks have finished."""
        if self._connection is None or self._over.is_set():
            return
        if self.rank == 0:
            self._connection.send("done")
            self._over.wait()  # or a verdict ends this process
        else:
            self._leaving = True
            self._connection.send("done")
            self._over.wait(self.lost_after_seconds)

    def report(self, text: str) -> bool:
        """Tell all ranks that this one has failed; they end with "rank 3 on nodeB: <text>".

        True where this is the job's first failure, so that this rank is to say it on its terminal. The caller ends the
        process in its own way; should it not have managed that within 4 s, the watch does it.
        """
        self._leaving = True
        if self._connection is None or self._over.is_set():
            return True
        self._connection.send("failed", text=text[:_LONGEST_TEXT])
        threading.Thread(target=self._end_overdue, name="harness-overdue", daemon=True).start()
        self._over.wait(_PATIENCE_SECONDS / 2)
        if self._hub is not None:
            self._hub.told.wait(_PATIENCE_SECONDS / 4)
        return self._verdict is None or self._verdict.rank == self.rank

    def wait_for_verdict(self, seconds: float | None = None) -> None:
        """Wait, at most `bound_seconds` where nothing else is said, to be ended by a verdict.

        For a rank whose collective failed, to be called before `report`: it returns only if no other rank was found
        lost or failed, so that this one's error is the first that is known.
        """
        self._over.wait(self.bound_seconds if seconds is None else seconds)

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self, connection: Connection) -> None:
        now = heard_at = next_beat = time.monotonic()
        while True:
            select.select([connection], [], [], max(0.0, next_beat - now))
            before, now = now, time.monotonic()
            heard_at += max(0.0, now - before - 2 * self.interval_seconds)  # held up itself: that was not silence
            if now >= next_beat:
                next_beat = now + self.interval_seconds
                connection.send("beat")
            for message in connection.receive():
                heard_at = now
                if message.get("kind") == "welcome":
                    self._place = f"rank 0 on {message.get('host')}"
                elif message.get("kind") == "verdict":
                    return self._obey(connection, message)
                elif message.get("kind") == "bye":
                    connection.close()
                    return self._over.set()
            if connection.closed:
                return self._end(f"lost {self._place} (its connection closed)", EXIT_LOST, say=True)
            if now - heard_at >= self.lost_after_seconds:
                text = f"lost contact with {self._place} (no sign of life for {now - heard_at:.0f} s)"
                return self._end(text, EXIT_LOST, say=True)

    def _obey(self, connection: Connection, message: dict[str, Any]) -> None:
        verdict = self._verdict = Verdict(
            str(message.get("reason")), int(message.get("rank", -1)), str(message.get("host")), str(message.get("text"))
        )
        connection.close()  # which tells the hub that the verdict has arrived
        # A rank that fails says so itself on its own host's terminal.
        said = verdict.reason == "failed" and verdict.host == socket.gethostname()
        self._end(verdict.text, verdict.exit_status, say=self.rank == 0 and not said)

    def _end(self, text: str, exit_status: int, say: bool) -> None:
        """End this process, unless its main thread is about to."""
        if self._leaving:
            return self._over.set()
        start = time.monotonic()
        telling = threading.Thread(target=self._tell, args=(text,), daemon=True)
        telling.start()
        if self._hub is not None:
            self._hub.told.wait(_PATIENCE_SECONDS / 2)
        telling.join(max(0.0, start + _PATIENCE_SECONDS - time.monotonic()))
        self._exit(text if say else None, exit_status)
        return None

    def _tell(self, text: str) -> None:
        if self.on_end is not None:
            with suppress(Exception):
                self.on_end(text)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    def _end_overdue(self) -> None:
        time.sleep(_PATIENCE_SECONDS)
        self._exit(f"did not leave by itself within {_PATIENCE_SECONDS:.0f} s of its own error", EXIT_FAILED)

    def _exit(self, text: str | None, exit_status: int) -> None:
        if text is not None:  # in a thread, as a pipe that nobody reads would hold it for ever
            line = f"harness: {self._name}: ended: {' '.join(text.split())}\n".encode(errors="replace")
            saying = threading.Thread(target=os.write, args=(2, line), daemon=True)
            saying.start()
            saying.join(1.0)
        os._exit(exit_status)


def is_collective_failure(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that a collective failed because of another rank.

    torch's DistError family (NCCL, stores, sockets), and the RuntimeErrors of gloo, which only their texts tell apart.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError):
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _COLLECTIVE_FAILURES):
            return True
        cause = cause.__cause__
    return False
