"""Runs whose processes live and whose work does not go on: they end within the stated bound, and no others do."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness.parallel import Identity, ParallelLayout, ParallelSection, Verdict
from harness.parallel.ending import dump_stacks
from harness.parallel.watchdog import bound_seconds
from harness.stop import EXIT_RESUME
from tests.parallel.jobs import HERE, Job, redirect_stderr

HUNG_AFTER_SECONDS = 1.5
SLACK_SECONDS = 10.0  # on top of the bound, for a busy machine
LOST_AFTER_SECONDS = 3.0


# ---- what a rank does ---------------------------------------------------------------------------------------------


def run_rank(rank: int, world_size: int, address: str, port: int, folder: str, scenario: str) -> None:
    place = Path(folder)
    redirect_stderr(place, rank)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    lost_after = 600 if scenario == "no hub" else LOST_AFTER_SECONDS
    section = ParallelSection(device="cpu", threads=1, timeout_seconds=600, lost_after_seconds=lost_after)
    with ParallelLayout(section, Identity(rank, world_size, local_rank=rank)) as layout:
        ranks = place / "ranks"
        layout.watchdog.stacks_file = ranks / f"rank-{rank}.stacks"
        if scenario == "stacks that cannot be written":
            ranks.mkdir(exist_ok=True)
            os.mkfifo(layout.watchdog.stacks_file)  # nobody reads: opening it never returns

        def on_end(verdict: Verdict) -> None:
            (place / f"end-{rank}").write_text(f"{verdict.reason}: {verdict.text}")

        layout.on_end(on_end)
        layout.all_max([0])
        (place / f"ready-{rank}").touch()
        if scenario == "fine":
            go_on(layout)
        else:
            layout.watchdog.arm(HUNG_AFTER_SECONDS)
            try:
                get_stuck(layout, scenario)
            except RuntimeError as error:  # of a collective, where another rank ends first
                layout.await_verdict(error)
                raise
    (place / f"finished-{rank}").touch()


def go_on(layout: ParallelLayout) -> None:
    """Be silent for longer than the watchdog waits, in every way that is none of its business."""
    layout.watchdog.arm(HUNG_AFTER_SECONDS)
    for _ in range(12):  # the process is stopped meanwhile
        time.sleep(0.05 * HUNG_AFTER_SECONDS)
    for step in range(24):
        layout.watchdog.alive(f"step {step}")
        layout.all_max([0])
        time.sleep(0.05 * HUNG_AFTER_SECONDS)
    with layout.watchdog.suspended():
        with layout.watchdog.suspended():
            time.sleep(0.1 * HUNG_AFTER_SECONDS)
        time.sleep(1.2 * HUNG_AFTER_SECONDS)
    time.sleep(0.3 * HUNG_AFTER_SECONDS)
    layout.watchdog.arm(10 * HUNG_AFTER_SECONDS)  # in place of the first
    time.sleep(1.2 * HUNG_AFTER_SECONDS)
    layout.watchdog.arm(HUNG_AFTER_SECONDS)
    layout.watchdog.disarm()
    time.sleep(1.2 * HUNG_AFTER_SECONDS)
    if layout.rank == 0:
        layout.watchdog.arm(HUNG_AFTER_SECONDS)  # and waits for the other, armed no more, where the layout is left
    time.sleep(1.2 * HUNG_AFTER_SECONDS * layout.rank)


def get_stuck(layout: ParallelLayout, scenario: str) -> None:
    """Stop making progress, for good."""
    with layout.watchdog.suspended():
        pass
    layout.watchdog.alive("step 3")
    if scenario == "deadlock":
        groups = [dist.new_group([0, 1]) for _ in range(2)]
        dist.all_reduce(torch.ones(3), group=groups[layout.rank])
    elif layout.rank < layout.world_size - 1:
        time.sleep(0.3 * HUNG_AFTER_SECONDS)
        layout.watchdog.alive("sums of step 4")
        dist.all_reduce(torch.ones(3))
    elif scenario == "busy":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # hours, without the interpreter lock
    elif scenario == "interpreter lock":
        re.match("(a+)+$", "a" * 60 + "b")  # years, with it
    else:
        time.sleep(600)


# ---- jobs of such ranks -------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int, str], Job]]:
    jobs: list[Job] = []

    def begin(world_size: int, scenario: str) -> Job:
        seconds = bound_seconds(HUNG_AFTER_SECONDS) + SLACK_SECONDS
        jobs.append(Job(tmp_path, run_rank, world_size, scenario, seconds))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def test_bound() -> None:
    assert bound_seconds(1800) == 1800 + 2 * 5 + 10
    assert bound_seconds(2) == pytest.approx(2 + 2 * 0.2 + 10)


@pytest.mark.parametrize("scenario", ["sleep", "busy"])
def test_stuck_rank_ends_all_with_their_stacks(start: Callable[[int, str], Job], scenario: str) -> None:
    job = start(3, scenario)
    assert job.join(0, 1, 2) == [EXIT_RESUME] * 3
    [line] = job.lines()
    reason = rf"(rank (\d) on {HERE}: no progress for \d s, last: (.*))"
    found = re.fullmatch(rf"harness: rank 0 on {HERE}: ended: {reason}; stack traces in (.*)", line)
    assert found is not None, line
    assert found[3] == ("step 3" if found[2] == "2" else "sums of step 4")
    assert found[4] == str(job.folder / "ranks")
    for rank in range(3):
        assert job.text(f"end-{rank}") == f"hung: {found[1]}"
        stacks = job.text(f"ranks/rank-{rank}.stacks")
        assert f"rank {rank} on {HERE}: ended: {found[1]}\n" in stacks
        assert ("last sign of progress here: " + ("step 3," if rank == 2 else "sums of step 4,")) in stacks
        assert ("in all_reduce" in stacks) == (rank != 2)
        assert re.search(r'test_watchdog\.py", line \d+ in get_stuck', stacks)


def test_deadlock(start: Callable[[int, str], Job]) -> None:
    job = start(2, "deadlock")
    assert job.join(0, 1) == [EXIT_RESUME] * 2
    [line] = job.lines()
    assert re.search(r": ended: rank \d on .*: no progress for \d s, last: step 3; stack traces in ", line)
    assert all("in all_reduce" in job.text(f"ranks/rank-{rank}.stacks") for rank in range(2))


def test_single_process(start: Callable[[int, str], Job]) -> None:
    job = start(1, "sleep")
    assert job.join(0) == [EXIT_RESUME]
    [line] = job.lines()
    place = re.escape(str(job.folder / "ranks"))
    assert re.fullmatch(
        rf"harness: rank 0 on {HERE}: ended: no progress for \d s, last: step 3; stack traces in {place}", line
    )
    assert job.text("end-0").startswith("hung: no progress for ")
    assert "in get_stuck" in job.text("ranks/rank-0.stacks")


def test_stacks_that_cannot_be_written_hold_nobody(start: Callable[[int, str], Job]) -> None:
    job = start(2, "stacks that cannot be written")
    assert job.join(0, 1) == [EXIT_RESUME] * 2
    assert len(job.lines()) == 1


def test_rank_that_does_not_reach_the_hub_ends_itself(start: Callable[[int, str], Job]) -> None:
    job = start(2, "no hub")
    job.signal(signal.SIGSTOP, 0)
    assert job.join(1) == [EXIT_RESUME]
    [line] = job.lines()
    assert line.startswith(f"harness: rank 1 on {HERE}: ended: rank 1 on {HERE}: no progress for ")
    assert "in get_stuck" in job.text("ranks/rank-1.stacks")


def test_rank_that_holds_the_interpreter_lock_is_lost(start: Callable[[int, str], Job]) -> None:
    job = start(2, "interpreter lock")
    assert job.join(0) == [EXIT_RESUME]
    assert "in all_reduce" in job.text("ranks/rank-0.stacks")
    assert re.match(f"(hung: rank 0 on {HERE}: no progress|lost: lost rank 1) ", job.text("end-0"))


def test_no_false_alarm(start: Callable[[int, str], Job]) -> None:
    job = start(2, "fine")
    time.sleep(0.2 * HUNG_AFTER_SECONDS)
    job.signal(signal.SIGSTOP, 0, 1)  # as a whole, and shorter than what loses a rank
    time.sleep(1.2 * HUNG_AFTER_SECONDS)
    job.signal(signal.SIGCONT, 0, 1)
    job.seconds += 8 * HUNG_AFTER_SECONDS
    assert job.join(0, 1) == [0, 0]
    assert job.lines() == []
    assert not (job.folder / "ranks").exists()


# ---- the stack traces ---------------------------------------------------------------------------------------------


def test_stacks_are_added_to_those_of_before(tmp_path: Path) -> None:
    for header in ("the first\n", "the second\n"):
        dump_stacks(tmp_path / "ranks" / "rank-00000.stacks", header)
    text = (tmp_path / "ranks" / "rank-00000.stacks").read_text()
    assert text.index("the first") < text.index("the second")
    assert text.count("in test_stacks_are_added_to_those_of_before") == 2


def test_stacks_that_cannot_be_written_raise_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dump_stacks(tmp_path / "file" / "rank-00000.stacks")
    dump_stacks(tmp_path)
    dump_stacks(Path("/dev/full"))
    assert (tmp_path / "file").read_text() == ""
    assert sys.exc_info() == (None, None, None)
