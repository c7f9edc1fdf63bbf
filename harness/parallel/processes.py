"""The processes of a job: who this one is, how it meets the others, what they say to each other outside of tensors."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from harness.config import HarnessError
from harness.stop import StopRequested

from .channel import Channel, poll
from .ending import Ending
from .hub import Verdict
from .watch import Watch
from .watchdog import Watchdog

WAIT_FOR_OTHERS_SECONDS = 5.0
"""Where this rank could not meet the others: they may fail for a reason of their own at the same moment."""


@dataclass(frozen=True)
class Identity:
    """What the launcher said in the environment."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Identity:
        """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; without them one process. Raises HarnessError."""
        rank, world_size, local_rank = (
            _read_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not 0 <= rank < world_size:
            raise HarnessError(
                f"environment: RANK {rank} with WORLD_SIZE {world_size}: ranks count from 0; use torchrun"
            )
        return cls(rank, world_size, local_rank)

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


class FirstRankError(HarnessError):
    """Rank 0's error, raised on another rank."""

    said_elsewhere = True


class Processes:
    """The running process group. `meet` starts it, `close` ends it; one a process at a time.

    Collectives take CPU tensors by gloo, and GPU tensors by NCCL where there is a GPU.
    """

    current: Processes | None = None

    def __init__(
        self, identity: Identity, store: dist.Store, watch: Watch | None, timeout: timedelta | None = None
    ) -> None:
        self.identity, self.watch, self._timeout = identity, watch, timeout
        self.ending = watch.ending if watch is not None else Ending(str(identity))
        self.watchdog = Watchdog(self.ending, self._end_hung)
        self._store = store
        self._groups: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        self._messages = self._channels = 0

    @classmethod
    def meet(
        cls, identity: Identity, device: torch.device, timeout_seconds: float, lost_after_seconds: float
    ) -> Processes:
        """Join the other ranks at MASTER_ADDR:MASTER_PORT, and begin to watch them.

        Raises HarnessError where they don't come.
        """
        timeout = timedelta(seconds=timeout_seconds)
        watch = None
        if identity.world_size == 1:
            store: dist.Store = dist.HashStore()  # needs no port
        else:
            address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            if not address or not port.isdecimal():
                raise HarnessError(
                    f"{identity.world_size} processes need MASTER_ADDR and MASTER_PORT, which are "
                    f"{address!r} and {port!r}; start with torchrun or the scripts in launch/"
                )
            try:
                store, _, _ = next(dist.rendezvous("env://", identity.rank, identity.world_size, timeout=timeout))
                watch = Watch(
                    identity.rank,
                    identity.world_size,
                    address,
                    lost_after_seconds=lost_after_seconds,
                    join_seconds=timeout_seconds,
                )
                watch.start(dist.PrefixStore("harness/watch", store))
            except (RuntimeError, ValueError, OSError) as error:
                raise _unmet(identity, f"{address}:{port}", timeout_seconds, error) from None
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("harness/group", store),
                rank=identity.rank,
                world_size=identity.world_size,
                timeout=timeout,
            )
        except StopRequested as stop:
            _report(watch, identity, stop)
            raise
        except (RuntimeError, ValueError) as error:
            if watch is None:
                raise
            watch.wait_for_verdict(WAIT_FOR_OTHERS_SECONDS)  # another rank may know better what is wrong
            unmet = _unmet(identity, "each other's addresses", timeout_seconds, error)
            unmet.said_elsewhere = not watch.report(str(unmet))  # type: ignore[attr-defined]
            raise unmet from None
        cls.current = cls(identity, dist.PrefixStore("harness/messages", store), watch, timeout)
        return cls.current

    def close(self, error: BaseException | None = None) -> None:
        """End this rank's part, all work done or with an `error`, of which the other ranks hear.

        An error, or a stop, that is another rank's to say is given `said_elsewhere`.
        """
        Processes.current = None
        self.watchdog.disarm()
        if self.watch is not None and error is not None and not isinstance(error, FirstRankError):
            _report(self.watch, self.identity, error)
            return  # the others may never come to where a process group is ended in order
        if self.watch is not None:
            self.watch.stop()
        if error is None or self.watch is None:
            dist.destroy_process_group()

    def _end_hung(self, text: str) -> None:
        """Called by the watchdog."""
        if self.watch is not None:
            self.watch.report_hung(text)
        else:
            self.ending.end(Verdict("hung", self.identity.rank, socket.gethostname(), text), say=True)

    def groups(self, tensor: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """This rank's tensor-parallel group, of neighbouring ranks, and its data-parallel group, of every `tensor`-th.

        Made once a size: making groups again and again slows a process down.
        """
        if tensor not in self._groups:
            world = self.identity.world_size
            tensor_group = data_group = None
            neighbours = [list(range(start, start + tensor)) for start in range(0, world, tensor)]
            for members in neighbours:
                group = self._new_group(members)
                tensor_group = group if self.identity.rank in members else tensor_group
            for members in map(list, zip(*neighbours, strict=True)):
                group = self._new_group(members)
                data_group = group if self.identity.rank in members else data_group
            assert tensor_group is not None
            assert data_group is not None
            self._groups[tensor] = tensor_group, data_group
        return self._groups[tensor]

    def channel(self) -> Channel:
        """A new way for all ranks to agree, from a thread other than the one that calls collectives. To be made by all
        ranks in the same order."""
        self._channels += 1
        store = dist.PrefixStore(f"channel/{self._channels}", self._store)
        return Channel(store, self.identity.rank, self.identity.world_size)

    def _new_group(self, members: list[int]) -> dist.ProcessGroup:
        return dist.new_group(members, timeout=self._timeout)  # left out, it would not be the default group's

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns on rank 0 (JSON), on all ranks; its HarnessError is raised on all.

        The others wait as long as it takes: tokenizing a corpus may take hours. A lost rank 0 ends the wait from
        outside (watch.py).
        """
        self._messages += 1
        key = f"decision/{self._messages}"
        if self.identity.world_size == 1:
            return decide()
        if self.identity.rank == 0:
            try:
                value = decide()
            except HarnessError as error:
                self._store.set(key, json.dumps({"error": str(error)}))
                raise
            self._store.set(key, json.dumps({"value": value}))
            return value
        poll(lambda: self._store.check([key]))  # rather than `wait`, which logs a warning at each of its timeouts
        message = json.loads(self._store.get(key))
        if "error" in message:
            raise FirstRankError(message["error"])
        return message["value"]


def _report(watch: Watch | None, identity: Identity, error: BaseException) -> None:
    """Let the other ranks hear of an error, or of a stop, that ends this one."""
    if watch is None:
        return
    if isinstance(error, StopRequested):
        first = watch.report(f"stopped by {error}", "stopped")
    else:
        first = watch.report(f"{type(error).__name__}: {error}")
    error.add_note(f"harness: this was {identity}")
    error.said_elsewhere = not first  # type: ignore[attr-defined]


def _unmet(identity: Identity, where: str, timeout_seconds: float, error: Exception) -> HarnessError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return HarnessError(
        f"did not meet all {identity.world_size} ranks at {where} (parallel.timeout_seconds is {timeout_seconds:g}): "
        f"{reason}; check that every machine reaches the others there, and see launch/README.md"
    )


def _read_number(variable: str, default: int) -> int:
    """A launcher's environment variable."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise HarnessError(
            f"environment variable {variable} is {text!r}, not a number; unset it, or start with torchrun"
        )
    return int(text)
