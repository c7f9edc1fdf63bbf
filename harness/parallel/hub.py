"""Rank 0's side of the watch over a job's ranks: who is alive, who has finished, and the verdict that ends the job.

Every rank holds one TCP connection to the hub and says `beat` over it at a steady interval; the hub says `beat` back.
Messages are JSON objects, one a line; nothing but numbers and text is ever read from them. A connection that closes
means that its process is gone; one that falls silent, that its process hangs or its host is out of reach (or that its
process is gone, and a forked child of it holds the connection open).
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from harness.stop import EXIT_RESUME

EXIT_FAILED = 1
"""Exit status of a rank that ends because another rank failed with an error of its own: what Python itself gives."""

_LONGEST_LINE = 1 << 16
_SETTLING_SECONDS = 0.05  # processes that are killed together close their connections within this time
_NAMED_AT_MOST = 8

Told = Literal["failed", "stopped", "hung"]
"""What a rank may say of itself that ends the job: an error of its own, that it was asked to stop, that its work does
not go on."""


@dataclass(frozen=True)
class Verdict:
    """Why a job ends: what a rank told, or "lost", of ranks that are heard no more.

    `rank` and `host` are those of the rank that told, or of the first lost one; `text` names all.
    """

    reason: str
    rank: int
    host: str
    text: str

    @property
    def exit_status(self) -> int:
        """Of the ranks that end by it. All but an error is worth another start."""
        return EXIT_FAILED if self.reason == "failed" else EXIT_RESUME

    @property
    def wants_stacks(self) -> bool:
        """Whether where each rank stood tells more than the text does."""
        return self.reason in ("lost", "hung")


class Connection:
    """JSON objects over a socket, without ever waiting: what cannot be sent now goes with the next message."""

    def __init__(self, sock: socket.socket) -> None:
        self.closed = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = sock, threading.Lock()
        self._unsent, self._unread = b"", b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: str, **values: Any) -> None:
        """Send one message, from any thread. That a connection is broken is found by `receive`."""
        with self._lock, suppress(OSError):  # BlockingIOError is one, too
            self._unsent += json.dumps({"kind": kind, **values}).encode() + b"\n"
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; sets `closed` at the end of the connection, and where it talks nonsense."""
        try:
            while data := self._socket.recv(_LONGEST_LINE):
                self._unread += data
                if len(self._unread) > 16 * _LONGEST_LINE:
                    break
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._unread = self._unread.split(b"\n")
        messages: list[Any] = []
        try:
            messages += [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            self.closed = True
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        self.closed = True
        self._socket.close()


@dataclass(eq=False)
class _Member:
    """A rank as the hub knows it; times are those of time.monotonic."""

    rank: int
    heard_at: float
    host: str = "a host that never answered"
    connection: Connection | None = None
    done: bool = False
    gone_at: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Hub:
    """Listens on a free port of every interface, in a daemon thread of rank 0's process.

    `told` is set when nobody needs the hub any more: every rank has finished, or all that can be reached know the
    verdict.
    """

    def __init__(
        self,
        world_size: int,
        token: int,
        lost_after_seconds: float,
        interval_seconds: float,
        join_seconds: float | None = None,
    ) -> None:
        """`join_seconds`: how long a rank may take to say hello; None: as long as it may be silent later."""
        self.told = threading.Event()
        self._token, self._lost_after, self._interval = token, lost_after_seconds, interval_seconds
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=max(128, world_size))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        grace = max(0.0, join_seconds - lost_after_seconds) if join_seconds is not None else 0.0
        self._members = [_Member(rank, time.monotonic() + grace) for rank in range(world_size)]
        self._speakers: dict[Connection, _Member] = {}
        self._verdict: Verdict | None = None
        self._next_round = time.monotonic()
        threading.Thread(target=self._run, name="harness-hub", daemon=True).start()

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        now = time.monotonic()
        while True:
            ready = self._selector.select(max(0.0, self._next_round - now))
            before, now = now, time.monotonic()
            stood_still = now - before - 2 * self._interval
            if stood_still > 0:  # this process itself was held up: what it could not hear was not silence
                for member in self._members:
                    member.heard_at += stood_still
            for key, _ in ready:
                if isinstance(key.fileobj, Connection):
                    self._listen(key.fileobj, now)
                else:
                    self._accept()
            if now >= self._next_round:
                self._next_round = now + self._interval
                for connection in self._speakers:
                    connection.send("beat")
                self._judge(now)
            self._let_go(now)

    def _accept(self) -> None:
        with suppress(OSError):
            sock, _ = self._listener.accept()
            self._selector.register(Connection(sock), selectors.EVENT_READ)

    def _listen(self, connection: Connection, now: float) -> None:
        """Take in what a connection has to say."""
        for message in connection.receive():
            member = self._speakers.get(connection) or self._greet(connection, message)
            if member is None:
                connection.closed = True
                break
            member.heard_at = now
            if message.get("kind") == "done":
                member.done = True
                if member.rank != 0:
                    connection.send("bye")
            elif message.get("kind") in get_args(Told) and self._verdict is None:
                text = f"{member}: {message.get('text')}"
                self._pronounce(Verdict(message["kind"], member.rank, member.host, text))
        if connection.closed:
            self._selector.unregister(connection)
            connection.close()
            member = self._speakers.pop(connection, None)
            if member is not None and member.connection is connection:
                member.connection = None
                if not member.done:
                    member.gone_at = now
                    self._next_round = min(self._next_round, now + _SETTLING_SECONDS)

    def _greet(self, connection: Connection, message: dict[str, Any]) -> _Member | None:
        """The member that says hello, if it knows the job's token."""
        rank = message.get("rank")
        knows = message.get("kind") == "hello" and message.get("token") == self._token
        if not knows or not isinstance(rank, int) or not 0 <= rank < len(self._members):
            return None
        member = self._speakers[connection] = self._members[rank]
        member.host, member.connection = str(message.get("host")), connection
        connection.send("welcome", host=socket.gethostname())
        if self._verdict is not None:
            connection.send("verdict", **vars(self._verdict))
        return member

    # ---- verdicts --------------------------------------------------------------------------------------------------

    def _judge(self, now: float) -> None:
        """Declare lost whoever's connection closed before it had finished, and whoever has been silent for too long."""
        working = [member for member in self._members if not member.done]
        reasons = {member: "its connection closed" for member in working if member.gone_at is not None}
        silence = {member: now - member.heard_at for member in working if member not in reasons}
        if self._verdict is None and (reasons or max(silence.values(), default=0.0) >= self._lost_after):
            # The ranks of a host fall silent together, but their last beats lie up to an interval apart.
            for member, seconds in silence.items():
                if seconds >= self._lost_after - 2 * self._interval:
                    reasons[member] = f"no sign of life for {seconds:.0f} s"
            lost = sorted(reasons, key=lambda member: member.rank)
            named = ", ".join(f"{member} ({reasons[member]})" for member in lost[:_NAMED_AT_MOST])
            more = f" and {len(lost) - _NAMED_AT_MOST} more" if len(lost) > _NAMED_AT_MOST else ""
            self._pronounce(Verdict("lost", lost[0].rank, lost[0].host, f"lost {named}{more}"))

    def _pronounce(self, verdict: Verdict) -> None:
        self._verdict = verdict
        for connection in self._speakers:
            connection.send("verdict", **vars(verdict))

    def _let_go(self, now: float) -> None:
        """Let rank 0 go, and the hub with it, when nobody else needs it."""
        first = self._members[0]
        if self.told.is_set() or (self._verdict is None and not first.done):
            return
        if self._verdict is not None:
            silent_since = now - self._lost_after + 2 * self._interval
            speaking = [member for member in self._speakers.values() if member.heard_at > silent_since]
            if all(member is first for member in speaking):
                self.told.set()
        elif all(member.done for member in self._members):
            self.told.set()
            if first.connection is not None:
                first.connection.send("bye")
