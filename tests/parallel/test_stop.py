"""Ranks that are asked to stop while no loop looks after them: all end, with the status that means "go on later"."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness import stop
from harness.parallel import Identity, ParallelLayout, ParallelSection, Verdict
from tests.parallel.jobs import HERE, Job, redirect_stderr

END_WITHIN_SECONDS = 20.0


# ---- what a rank does ---------------------------------------------------------------------------------------------


def run_rank(rank: int, world_size: int, address: str, port: int, folder: str, scenario: str) -> None:
    """As the command line does it: a line of its own unless another rank says it, and the exit status."""
    place = Path(folder)
    redirect_stderr(place, rank)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    stop.install()
    section = ParallelSection(device="cpu", threads=1, timeout_seconds=600, lost_after_seconds=600)
    try:
        with ParallelLayout(section, Identity(rank, world_size, local_rank=rank)) as layout:

            def on_end(verdict: Verdict) -> None:
                (place / f"end-{rank}").write_text(f"{verdict.reason}: {verdict.text}")

            layout.on_end(on_end)
            layout.watchdog.stacks_file = place / "ranks" / f"rank-{rank}.stacks"
            layout.all_max([0])
            (place / f"ready-{rank}").touch()
            try:
                with stop.raising():
                    if scenario == "tokenizing":
                        layout.first_decides(lambda: time.sleep(600))
                    elif rank == world_size - 1:
                        time.sleep(600)
                    else:
                        dist.all_reduce(torch.ones(3))  # which no signal interrupts
            except RuntimeError as error:
                layout.await_verdict(error)
                raise
    except stop.StopRequested as stopped:
        (place / f"stopped-{rank}").touch()
        if not getattr(stopped, "said_elsewhere", False):
            os.write(2, f"rank {rank}: stopped by {stopped}\n".encode())
        sys.exit(stop.EXIT_RESUME)


# ---- jobs of such ranks -------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int, str], Job]]:
    jobs: list[Job] = []

    def begin(world_size: int, scenario: str) -> Job:
        jobs.append(Job(tmp_path, run_rank, world_size, scenario, END_WITHIN_SECONDS))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.mark.parametrize(("world_size", "scenario"), [(1, "tokenizing"), (3, "tokenizing"), (3, "collective")])
def test_all_ranks_are_asked_at_once(start: Callable[[int, str], Job], world_size: int, scenario: str) -> None:
    job = start(world_size, scenario)
    job.signal(signal.SIGTERM, *range(world_size))
    assert job.join(*range(world_size)) == [stop.EXIT_RESUME] * world_size
    [line] = job.lines()
    assert line in [f"rank {rank}: stopped by SIGTERM" for rank in range(world_size)]


@pytest.mark.parametrize(("asked", "scenario"), [(0, "tokenizing"), (2, "tokenizing"), (2, "collective")])
def test_one_rank_is_asked(start: Callable[[int, str], Job], asked: int, scenario: str) -> None:
    job = start(3, scenario)
    job.signal(signal.SIGUSR1, asked)
    assert job.join(0, 1, 2) == [stop.EXIT_RESUME] * 3
    assert job.lines() == [f"rank {asked}: stopped by SIGUSR1"]
    others = [rank for rank in range(3) if rank != asked]
    assert [job.text(f"end-{rank}") for rank in others] == [f"stopped: rank {asked} on {HERE}: stopped by SIGUSR1"] * 2
    assert [path.name for path in job.folder.glob("stopped-*")] == [f"stopped-{asked}"]
    assert not (job.folder / "ranks").exists()


def test_stop_and_error_at_once(start: Callable[[int, str], Job]) -> None:
    """Whoever is first decides the status of the rest; nobody hangs."""
    job = start(3, "collective")
    job.signal(signal.SIGTERM, 2)
    job.signal(signal.SIGKILL, 1)
    assert job.join(0, 2) == [stop.EXIT_RESUME] * 2
