"""The hub alone, with ranks and strangers played by the test."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.parallel.hub import EXIT_FAILED, Connection, Hub, Verdict
from harness.stop import EXIT_RESUME


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Player:
    """A connection to a hub, as a rank or a stranger has it."""

    def __init__(self, hub: Hub, rank: Any = None, token: int = 77) -> None:
        self.socket = socket.create_connection(("127.0.0.1", hub.port))
        self.connection = Connection(self.socket)
        self.heard: list[dict[str, Any]] = []
        if rank is not None:
            self.connection.send("hello", rank=rank, token=token, host=f"node{rank}")

    def dismissed(self) -> bool:
        return not self.connection.receive() and self.connection.closed

    def until(self, kind: str) -> dict[str, Any]:
        def found() -> bool:
            self.connection.send("beat")
            self.heard += self.connection.receive()
            return any(message["kind"] == kind for message in self.heard)

        wait_until(found)
        return next(message for message in self.heard if message["kind"] == kind)


def test_hub_ignores_strangers() -> None:
    hub = Hub(2, 77, lost_after_seconds=30, interval_seconds=0.05)
    players = [Player(hub, rank) for rank in range(2)]
    for text in (
        b"\xff\xfe\x00\n",
        b"[1]\n",
        b"{}\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"[" * 100_000 + b"\n",
        b"x" * 2_000_000,
    ):
        stranger = Player(hub)
        stranger.socket.setblocking(True)
        try:
            stranger.socket.sendall(text)
            stranger.socket.close()
        except OSError:
            pass  # thrown out while it spoke
    for rank, token in ((0, 78), (5, 77), (-1, 77), ("1", 77), (1.0, 77), (None, 77)):
        stranger = Player(hub)
        stranger.connection.send("hello", rank=rank, token=token, host="elsewhere")
        stranger.connection.send("failed", text="nonsense")
        wait_until(stranger.dismissed)
    players[1].connection.send("done")
    assert players[1].until("bye")
    players[0].connection.send("done")
    assert players[0].until("bye")
    assert not any(message["kind"] == "verdict" for player in players for message in player.heard)
    assert hub.told.wait(10)


def test_hub_names_ranks_that_never_came() -> None:
    hub = Hub(12, 77, lost_after_seconds=0.5, interval_seconds=0.05)
    verdict = Player(hub, 0).until("verdict")
    assert verdict["reason"] == "lost"
    assert re.match(
        r"lost rank 1 on a host that never answered \(no sign of life for [01] s\), rank 2 on", verdict["text"]
    )
    assert verdict["text"].endswith(" and 3 more")
    assert verdict["text"].count("rank") == 8
    assert hub.told.wait(10)


def test_hub_names_all_ranks_of_a_host_that_fell_silent() -> None:
    hub = Hub(4, 77, lost_after_seconds=1.0, interval_seconds=0.1)
    player = Player(hub, 0)
    silent = [Player(hub, 1)]
    time.sleep(0.09)  # the last beats of a host's ranks lie up to an interval apart
    silent.append(Player(hub, 2))
    time.sleep(0.5)
    silent.append(Player(hub, 3))  # this one spoke a moment ago
    verdict = player.until("verdict")
    assert re.fullmatch(r"lost rank 1 on node1 \(.*1 s\), rank 2 on node2 \(.*1 s\)", verdict["text"])


def test_hub_stands_by_the_first_verdict() -> None:
    hub = Hub(3, 77, lost_after_seconds=30, interval_seconds=0.05)
    players = [Player(hub, rank) for rank in range(2)]
    line = json.dumps({"kind": "failed", "text": "ein Fehler: 'ü'"}).encode() + b"\n"
    for start in range(0, len(line), 7):  # in pieces
        players[1].socket.send(line[start : start + 7])
        time.sleep(0.005)
    verdict = players[0].until("verdict")
    assert (verdict["reason"], verdict["rank"], verdict["host"]) == ("failed", 1, "node1")
    assert verdict["text"] == "rank 1 on node1: ein Fehler: 'ü'"
    players[0].connection.send("failed", text="later")
    players[1].connection.close()
    assert Player(hub, 2).until("verdict") == verdict  # who comes late learns it too
    assert [message for message in players[0].heard if message["kind"] == "verdict"] == [verdict]


@pytest.mark.parametrize(
    ("reason", "status", "stacks"), [("failed", EXIT_FAILED, False), ("stopped", 75, False), ("hung", 75, True)]
)
def test_hub_passes_on_why(reason: str, status: int, stacks: bool) -> None:
    assert EXIT_RESUME == 75
    hub = Hub(3, 77, lost_after_seconds=30, interval_seconds=0.05)
    players = [Player(hub, rank) for rank in range(3)]
    players[2].connection.send("nonsense", text="no kind of verdict")
    players[2].connection.send(reason, text="stopped by SIGTERM")
    for player in players:
        message = player.until("verdict")
        del message["kind"]
        verdict = Verdict(**message)
        assert verdict == Verdict(reason, 2, "node2", "rank 2 on node2: stopped by SIGTERM")
        assert (verdict.exit_status, verdict.wants_stacks) == (status, stacks)
