"""Jobs of three ranks that lose some of them in every way, and end within the stated bound."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness.parallel.hub import EXIT_FAILED, Verdict
from harness.parallel.watch import Watch, is_collective_failure
from harness.stop import EXIT_RESUME
from tests.parallel.jobs import HERE, Job, redirect_stderr, wait_until
from tests.parallel.namespaces import Hosts, why_not

LOST_AFTER_SECONDS = 2.0
BOUND_SECONDS = LOST_AFTER_SECONDS + 2 * LOST_AFTER_SECONDS / 10 + 5
SLACK_SECONDS = 10.0  # on top of the bound, for a busy machine


# ---- what a rank does ---------------------------------------------------------------------------------------------


def run_rank(rank: int, world_size: int, address: str, port: int, folder: str, scenario: str) -> None:
    """One rank's process: its stderr goes to a file, and so does what on_end is told."""
    place = Path(folder)
    redirect_stderr(place, rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=600),
    )

    def on_end(verdict: Verdict) -> None:
        (place / f"end-{rank}").write_text(verdict.text)
        if scenario == "slow end":
            time.sleep(600)
        raise OSError("no space left on device")

    watch = Watch(rank, world_size, address, lost_after_seconds=LOST_AFTER_SECONDS)
    watch.ending.on_end = on_end
    if scenario == "collective with stacks":
        watch.ending.stacks_file = place / "stacks" / f"rank-{rank}"
    watch.start(dist.distributed_c10d._get_default_store())
    dist.barrier()
    (place / f"ready-{rank}").touch()
    try:
        _act(scenario, rank, watch, place)
    except Exception as error:
        if is_collective_failure(error):
            (place / f"collective-{rank}").write_text(str(error))
            watch.wait_for_verdict()
        if watch.report(f"{type(error).__name__}: {error}"):
            os.write(2, f"rank {rank} on {socket.gethostname()}: {error}\n".encode())
        if scenario == "overdue":
            time.sleep(600)
        os._exit(3)
    (place / f"finished-{rank}").touch()
    watch.stop()
    (place / f"stopped-{rank}").touch()


def _act(scenario: str, rank: int, watch: Watch, place: Path) -> None:
    if scenario == "finish":
        time.sleep(1.3 * LOST_AFTER_SECONDS * rank)
    elif scenario == "one fails late" and rank == 2:
        time.sleep(1.0)
        raise ValueError("a bad number")
    elif scenario == "one fails late":
        pass
    elif scenario == f"error of {rank}" or (scenario == "overdue" and rank == 2):
        time.sleep(0.5)
        raise ValueError("a bad number\nin two lines")
    elif scenario == "all fail":
        time.sleep(0.5)
        raise ValueError(f"the same everywhere, and on rank {rank}")
    elif scenario == "short":
        for _ in range(20):
            time.sleep(0.05)
            dist.all_reduce(torch.ones(10))
    elif scenario == "sleep":
        time.sleep(600)
    elif rank == 2:
        time.sleep(600)  # the others wait for it
    else:
        dist.all_reduce(torch.ones(1000))


# ---- jobs of such ranks -------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def begin(scenario: str) -> Job:
        jobs.append(Job(tmp_path, run_rank, 3, scenario, BOUND_SECONDS + SLACK_SECONDS))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def test_killed_rank_is_named(start: Callable[[str], Job]) -> None:
    job = start("collective")
    job.signal(signal.SIGKILL, 2)
    assert job.join(0, 1) == [EXIT_RESUME, EXIT_RESUME]
    text = f"lost rank 2 on {HERE} (its connection closed)"
    assert job.lines() == [f"harness: rank 0 on {HERE}: ended: {text}"]
    assert [job.text("end-0"), job.text("end-1")] == [text, text]


def test_ranks_killed_together_are_all_named(start: Callable[[str], Job]) -> None:
    job = start("sleep")
    job.signal(signal.SIGKILL, 1, 2)
    assert job.join(0) == [EXIT_RESUME]
    closed = "(its connection closed)"
    assert job.lines() == [
        f"harness: rank 0 on {HERE}: ended: lost rank 1 on {HERE} {closed}, rank 2 on {HERE} {closed}"
    ]


def test_killed_rank_0_is_named_even_where_the_log_hangs(start: Callable[[str], Job]) -> None:
    job = start("slow end")
    job.signal(signal.SIGKILL, 0)
    assert job.join(1, 2) == [EXIT_RESUME, EXIT_RESUME]
    text = f"lost rank 0 on {HERE} (its connection closed)"
    assert job.lines() == [f"harness: rank {rank} on {HERE}: ended: {text}" for rank in (1, 2)]


@pytest.mark.parametrize("victim", [0, 2])
def test_hanging_rank_is_named(start: Callable[[str], Job], victim: int) -> None:
    job = start("collective")
    others = [rank for rank in range(3) if rank != victim]
    job.signal(signal.SIGSTOP, victim)
    assert job.join(*others) == [EXIT_RESUME, EXIT_RESUME]
    if victim == 0:
        text = rf"lost contact with rank 0 on {HERE} \(no sign of life for \d s\)"
        expected = [rf"harness: rank {rank} on {HERE}: ended: {text}" for rank in others]
    else:
        expected = [rf"harness: rank 0 on {HERE}: ended: lost rank 2 on {HERE} \(no sign of life for \d s\)"]
    assert len(job.lines()) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, job.lines(), strict=True))


def test_survivors_of_a_lost_rank_say_where_they_stood(start: Callable[[str], Job]) -> None:
    job = start("collective with stacks")
    job.signal(signal.SIGSTOP, 2)
    assert job.join(0, 1) == [EXIT_RESUME, EXIT_RESUME]
    [line] = job.lines()
    assert line.startswith(f"harness: rank 0 on {HERE}: ended: lost rank 2 on {HERE} (")
    assert line.endswith(f"; stack traces in {job.folder / 'stacks'}")
    for rank in (0, 1):
        stacks = job.text(f"stacks/rank-{rank}")
        assert f"UTC\nrank {rank} on {HERE}: ended: {job.text(f'end-{rank}')}\n" in stacks
        assert "in all_reduce" in stacks
        assert " is MainThread\n" in stacks


@pytest.mark.parametrize("culprit", [0, 2])
def test_error_of_one_rank_is_said_once_and_by_it(start: Callable[[str], Job], culprit: int) -> None:
    job = start(f"error of {culprit}")
    assert job.join(0, 1, 2) == [3 if rank == culprit else EXIT_FAILED for rank in range(3)]
    assert job.lines() == [f"rank {culprit} on {HERE}: a bad number", "in two lines"]
    text = f"rank {culprit} on {HERE}: ValueError: a bad number\nin two lines"
    assert [job.text(f"end-{rank}") for rank in range(3)] == ["" if rank == culprit else text for rank in range(3)]


def test_error_of_every_rank_is_said_once(start: Callable[[str], Job]) -> None:
    job = start("all fail")
    statuses = job.join(0, 1, 2)
    assert 3 in statuses
    assert set(statuses) <= {3, EXIT_FAILED}  # whom the first one's verdict reaches before its own error ends by that
    assert len(job.lines()) == 1
    assert "the same everywhere" in job.lines()[0]


def test_failed_rank_that_does_not_leave_is_ended(start: Callable[[str], Job]) -> None:
    job = start("overdue")
    assert job.join(0, 1, 2) == [EXIT_FAILED, EXIT_FAILED, EXIT_FAILED]
    assert job.lines()[-1] == f"harness: rank 2 on {HERE}: ended: did not leave by itself within 4 s of its own error"


def test_ranks_may_finish_at_different_times(start: Callable[[str], Job]) -> None:
    job = start("finish")
    assert job.join(0, 1, 2) == [0, 0, 0]
    assert job.lines() == []
    when = {path.name: path.stat().st_mtime for path in job.folder.iterdir()}
    assert when["stopped-1"] < when["finished-2"] <= when["stopped-0"]  # rank 0, where the hub is, goes last


def test_job_that_stood_still_as_a_whole_goes_on(start: Callable[[str], Job]) -> None:
    job = start("short")
    job.signal(signal.SIGSTOP, 0, 1, 2)
    time.sleep(1.5 * LOST_AFTER_SECONDS)
    job.signal(signal.SIGCONT, 2, 1)
    time.sleep(0.2 * LOST_AFTER_SECONDS)
    job.signal(signal.SIGCONT, 0)
    assert job.join(0, 1, 2) == [0, 0, 0]
    assert job.lines() == []


def test_error_after_others_have_finished(start: Callable[[str], Job]) -> None:
    job = start("one fails late")
    assert job.join(0, 1, 2) == [EXIT_FAILED, 0, 3]
    assert job.lines() == [f"rank 2 on {HERE}: a bad number"]


@pytest.mark.skipif(why_not() is not None, reason=f"two hosts: {why_not()}")
def test_cut_link_ends_both_sides(tmp_path: Path) -> None:
    with Hosts() as hosts:
        paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
        for host in range(2):
            hosts.run(host, [sys.executable, __file__, str(2 * host), hosts.addresses[0], str(tmp_path)], paths)
        wait_until(lambda: len([*tmp_path.glob("ready-*")]) == 4)
        time.sleep(0.5)
        hosts.cut()
        deadline = time.monotonic() + BOUND_SECONDS + SLACK_SECONDS
        statuses = [tmp_path / f"status-{rank}" for rank in range(4)]
        wait_until(lambda: all(path.exists() for path in statuses), deadline - time.monotonic())
    assert [path.read_text() for path in statuses] == [str(EXIT_RESUME)] * 4
    # Where an address has no name, torch warns of it on stderr.
    said = [re.sub(r"^\[W.*\n", "", (tmp_path / f"stderr-{rank}").read_text(), flags=re.M) for rank in range(4)]
    silent = r"\(no sign of life for \d s\)"
    lost = rf"harness: rank 0 on nodeA: ended: lost rank 2 on nodeB {silent}, rank 3 on nodeB {silent}\n"
    assert re.fullmatch(lost, said[0])
    assert said[1] == ""
    for rank in (2, 3):
        contact = rf"harness: rank {rank} on nodeB: ended: lost contact with rank 0 on nodeA {silent}\n"
        assert re.fullmatch(contact, said[rank])


def test_collective_failures_are_told_from_others() -> None:
    wrapped = ValueError("while reducing")
    wrapped.__cause__ = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:3")
    for failure in (
        wrapped,
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:123, remote process exited"),
        dist.DistNetworkError("Broken pipe"),
        RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4: Connection reset by peer"),
    ):
        assert is_collective_failure(failure), failure
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("Broken pipe"), OSError(32)):
        assert not is_collective_failure(other), other


def run_host(first_rank: int, address: str, folder: Path) -> None:
    """Two of four ranks, in processes of their own, whose exit statuses go to files."""
    context = multiprocessing.get_context("fork")
    processes = {
        rank: context.Process(target=run_rank, args=(rank, 4, address, 29500, str(folder), "collective"))
        for rank in (first_rank, first_rank + 1)
    }
    for process in processes.values():
        process.start()
    for rank, process in processes.items():
        process.join()
        (folder / f"status-{rank}.new").write_text(str(process.exitcode))
        (folder / f"status-{rank}.new").rename(folder / f"status-{rank}")


if __name__ == "__main__":
    run_host(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
