"""How a job of many ranks ends when one of them dies, hangs or fails alone, or when the link between hosts is cut.

A collective cannot be relied on for this: gloo waits for a hanging rank, and for one behind a cut link, until the
process group's timeout, and its error does not say which rank that was. So each rank runs a daemon thread that
exchanges signs of life with rank 0's `Hub` (hub.py), and that ends the process when the hub says why the job ends, or
when the hub itself is not heard any more.

The stated bound: from the death of a rank, its hanging, or the cut of a link, until every other process has ended, at
most `bound_seconds` = lost_after_seconds + 2 * interval_seconds + 5 seconds, where the interval is a tenth of
lost_after_seconds and at most 5. A process that dies is found at once, by its closed connection; only hanging ones and
cut links take that long. A process that hangs is not ended from here: its launcher does that when the others have gone.

A main thread that is stuck while this one beats is found by its watchdog (watchdog.py), which reports here.

The thread needs Python's interpreter lock once in `lost_after_seconds`. Measured with torch 2.13: waiting in a gloo
collective, products, autograd, sorting, saving, importing megatron-core or transformers, and sentencepiece from 0.2.2
on hold it for less than 0.5 s at a time. What holds it longer: Tensor.tolist (3 s for 20 million numbers), a regular
expression over tens of MB, and SentencePieceTrainer.train before 0.2.2, which holds it from beginning to end.

Why not through torch's TCPStore: when its host is out of reach its check, get, compare_set and even its constructor
block for ever (2.13), the loss of the connection prints a C++ stack, torchrun's restarts meet the keys of the attempt
before, and nobody learns from a store that a process died.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from harness.config import HarnessError

from .ending import Ending
from .hub import Connection, Hub, Told, Verdict

_PATIENCE_SECONDS = 4.0  # with a rank that is to leave by itself, and with a hub that is to answer
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

    Where the hub says why the job ends, or is not heard, the process ends as `ending` does it: with EXIT_FAILED where
    another rank failed, with EXIT_RESUME where ranks were lost, were asked to stop, or hang. One line goes to stderr,
    from rank 0 (unless a rank on its own host says itself that it failed or was stopped) and from ranks that don't hear
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
    ) -> None:
        """`host` is where rank 0 runs, as the other ranks reach it: MASTER_ADDR. A rank that has not begun to watch
        `join_seconds` after rank 0 did is lost: imports may take long on some machines."""
        self.rank, self.world_size, self.host = rank, world_size, host
        self.lost_after_seconds, self._join_seconds = lost_after_seconds, join_seconds
        self.interval_seconds = min(5.0, lost_after_seconds / 10)
        self.bound_seconds = lost_after_seconds + 2 * self.interval_seconds + 5.0
        self.ending = Ending(f"rank {rank} on {socket.gethostname()}")
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

    def report(self, text: str, reason: Told = "failed") -> bool:
        """Tell all ranks that this one has failed, or was "stopped"; they end with "rank 3 on nodeB: <text>".

        True where this is the first thing that ends the job, so that this rank is to say it on its terminal. The caller
        ends the process in its own way; should it not have managed that within 4 s, the watch does it.
        """
        self._leaving = True
        if self._connection is None or self._over.is_set():
            return True
        self._connection.send(reason, text=text[:_LONGEST_TEXT])
        threading.Thread(target=self._end_overdue, args=(reason,), name="harness-overdue", daemon=True).start()
        self._over.wait(_PATIENCE_SECONDS / 2)
        if self._hub is not None:
            self._hub.told.wait(_PATIENCE_SECONDS / 4)
        return self._verdict is None or self._verdict.rank == self.rank

    def report_hung(self, text: str) -> None:
        """Tell all ranks that this one does not go on; they end, and so does this one, whether it hears from the hub or
        not. Returns only where the main thread is ending this process already."""
        if self._connection is not None:
            self._connection.send("hung", text=text[:_LONGEST_TEXT])
            self._over.wait(_PATIENCE_SECONDS)
        self._end(Verdict("hung", self.rank, socket.gethostname(), f"{self.ending.name}: {text}"), say=True)

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
                return self._end_without_hub(f"lost {self._place} (its connection closed)")
            if now - heard_at >= self.lost_after_seconds:
                silence = f"no sign of life for {now - heard_at:.0f} s"
                return self._end_without_hub(f"lost contact with {self._place} ({silence})")

    def _obey(self, connection: Connection, message: dict[str, Any]) -> None:
        verdict = self._verdict = Verdict(
            str(message.get("reason")), int(message.get("rank", -1)), str(message.get("host")), str(message.get("text"))
        )
        connection.close()  # which tells the hub that the verdict has arrived
        # A rank that fails or is stopped says so itself on its own host's terminal.
        said = verdict.reason in ("failed", "stopped") and verdict.host == socket.gethostname()
        self._end(verdict, say=self.rank == 0 and not said)

    def _end_without_hub(self, text: str) -> None:
        self._end(Verdict("lost", 0, self.host, text), say=True)

    def _end(self, verdict: Verdict, say: bool) -> None:
        """End this process, unless its main thread is about to."""
        if self._leaving:
            self._over.set()
        else:
            self.ending.end(verdict, say=say, others_told=self._hub.told if self._hub is not None else None)

    def _end_overdue(self, reason: Told) -> None:
        time.sleep(_PATIENCE_SECONDS)
        own = Verdict(reason, self.rank, socket.gethostname(), "")
        why = "its stop" if reason == "stopped" else "its own error"
        self.ending.leave(own.exit_status, f"did not leave by itself within {_PATIENCE_SECONDS:.0f} s of {why}")


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
