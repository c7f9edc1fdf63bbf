"""Jobs of several real processes, and what became of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

HERE = socket.gethostname()


class Job:
    """Processes of `run_rank(rank, world_size, address, port, folder, scenario)`, which redirects its stderr by
    `redirect_stderr` and touches ready-RANK in the folder."""

    def __init__(
        self, folder: Path, run_rank: Callable[..., None], world_size: int, scenario: str, seconds: float
    ) -> None:
        """`seconds`: how long `join` may take."""
        context = multiprocessing.get_context("forkserver")  # one process imports torch, for all jobs
        context.set_forkserver_preload(["harness.parallel"])
        self.folder, self.world_size, self.seconds = folder, world_size, seconds
        port = free_port()
        self.processes = [
            context.Process(target=run_rank, args=(rank, world_size, "127.0.0.1", port, str(folder), scenario))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()
        wait_until(lambda: self.is_ready() or not all(process.is_alive() for process in self.processes))
        assert self.is_ready(), self.lines()

    def is_ready(self) -> bool:
        return len([*self.folder.glob("ready-*")]) == self.world_size

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def join(self, *ranks: int) -> list[int | None]:
        """The exit statuses of `ranks`, which are to end within the job's seconds from now."""
        deadline = time.monotonic() + self.seconds
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def lines(self) -> list[str]:
        """All that the ranks wrote to stderr."""
        return "".join(self.text(f"stderr-{rank}") for rank in range(self.world_size)).splitlines()

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(30)


def redirect_stderr(folder: Path, rank: int) -> None:
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
