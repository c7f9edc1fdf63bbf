"""launch/slurm/requeue.sbatch under a real slurmctld and two slurmd: what ends a start of a job, and what comes then.

Skipped, with the reason, where no SLURM can be started. HARNESS_KEEP_LOGS=FOLDER keeps the log of the requeued job.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import cluster as slurm
from tests.launch.jobs import LOCAL, REQUEUE, ROOT, START_SECONDS, Quickstart, Series
from tests.launch.logs import keep_log

STEPS = 60
SLOW = "every_steps: 1\n  batch_size: 1"
"""Validation in every step: the steps stay the same, and take their time."""
SLURMD_TIMEOUT_SECONDS = 15


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm.Cluster(slurmd_timeout_seconds=SLURMD_TIMEOUT_SECONDS, kill_wait_seconds=30) as cluster:
        yield cluster


@dataclass
class Job:
    """One run by requeue.sbatch, on 2 nodes x 1 process; slow until `hurry`."""

    cluster: slurm.Cluster
    quickstart: Quickstart
    name: str
    number: str = ""

    @property
    def folder(self) -> Path:
        return self.quickstart.folder / "jobs" / self.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def run(self) -> Path:
        return self.quickstart.folder / "runs" / self.name

    def command(self, *options: str) -> list[str]:
        arguments = self.quickstart.arguments(self.name, f"train.steps={STEPS}", "checkpoint.every_steps=3")
        kept = [argument for argument in arguments[1:] if not argument.startswith("validation.")]
        return ["sbatch", "--parsable", *options, str(REQUEUE.relative_to(ROOT)), str(self.config), *kept]

    def submit(self, *options: str) -> None:
        self.folder.mkdir(parents=True)
        quickstart = (ROOT / "configs/quickstart.yaml").read_text()
        self.config.write_text(quickstart.replace("every_steps: 400", SLOW))
        environment = self.quickstart.environment(NPROC_PER_NODE="1", GLOO_SOCKET_IFNAME="lo")
        options = (f"--output={self.log}", "--cpus-per-task=2", *options)
        self.number = self.cluster.run(*self.command(*options), env=environment, cwd=ROOT).strip()

    def limit(self, seconds: int) -> None:
        """Let the time limit be at least so far away, and less than a minute more: it counts in minutes, and a machine
        under load takes its time to start. SLURM looks at it every 30 s, and then sends what comes 30 s later."""
        minutes, rest = map(int, self.cluster.show(self.number)["RunTime"].split(":")[1:])
        limit = -(-(60 * minutes + rest + seconds) // 60)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={limit}")

    def hurry(self) -> None:
        """From the next start on."""
        self.config.write_text(self.config.read_text().replace(SLOW, "every_steps: null"))

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def newest(self) -> int:
        """The newest checkpoint, 0 without one."""
        names = [path.name for path in self.run.glob("checkpoints/step-*")]
        return max((int(name.removeprefix("step-")) for name in names if name[5:].isdigit()), default=0)

    def until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait. Fails, with what the job wrote, where the job ends or the time does before the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            shown = self.cluster.show(self.number)
            over = shown["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
            if over or time.monotonic() > deadline:
                pytest.fail(f"{shown['JobState']}, Restarts={shown['Restarts']}:\n{self.output()}")
            time.sleep(0.3)

    def starts_again(self, restarts: int, seconds: float = START_SECONDS) -> None:
        """Wait for the next start, and in it for a checkpoint."""
        self.until(lambda: self.cluster.show(self.number)["Restarts"] == str(restarts), seconds)
        before = self.newest()
        self.until(lambda: self.newest() > before)

    def steps(self) -> list[int]:
        """Of metrics.jsonl, every line."""
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def events(self) -> list[tuple[str, int, str]]:
        """Event, step and reason."""
        events = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [(event["event"], event.get("step", 0), str(event.get("reason", ""))) for event in events]


@pytest.fixture(scope="module")
def undisturbed(quickstart: Quickstart, one_process: Series) -> Series:
    """Two processes on this machine. `one_process` has prepared the data."""
    command = [str(LOCAL), *quickstart.arguments("undisturbed", f"train.steps={STEPS}")]
    quickstart.run(command, START_SECONDS, NPROC_PER_NODE="2")
    return quickstart.series("undisturbed")


def test_a_job_goes_on_after_whatever_ended_its_starts(
    cluster: slurm.Cluster, quickstart: Quickstart, undisturbed: Series
) -> None:
    """The time limit, then a killed worker, then a failed node; the losses are those of an undisturbed run."""
    job = Job(cluster, quickstart, "requeued")
    try:
        options = ("--time=10", "--signal=USR1@90")
        job.submit(*options)
        job.until(lambda: job.newest() > 0)
        job.limit(60)
        job.until(lambda: cluster.show(job.number)["Restarts"] == "1")
        saved = job.newest()
        assert job.steps()[-1] in (saved - 1, saved)  # the record of a step whose validation was cut short comes later
        assert job.events()[-1][:2] == ("stopped", saved)
        assert "SIGUSR1" in job.events()[-1][2]
        assert f"job {job.number}: ended with status 75, step {saved} is saved: requeued" in job.output()
        job.limit(600)

        job.starts_again(1)
        assert f"job {job.number} start 1 from step {saved}\n" in job.output()
        os.kill(quickstart.rank(1), signal.SIGKILL)
        job.until(lambda: cluster.show(job.number)["Restarts"] == "2")
        assert "harness.launcher on " in job.output()
        assert "rank 1 killed by SIGKILL: exit status 75, worth another start" in job.output()

        job.starts_again(2)
        cluster.kill_node(cluster.nodes[1])
        # Both nodes are needed, so the next start waits for the slurmd. What ran on its node has ended by then.
        job.until(lambda: cluster.show(job.number)["Restarts"] == "3", SLURMD_TIMEOUT_SECONDS + 60)
        job.hurry()
        job.until(lambda: not quickstart.processes())
        cluster.start_node(cluster.nodes[1])
        assert cluster.wait(job.number, START_SECONDS) == ("COMPLETED", 0), job.output()
    finally:
        quickstart.kill()

    output = job.output()
    assert output.count(": requeued\n") == 2  # the third time it was SLURM
    assert "lost rank 1 on" in output
    assert job.steps() == list(range(1, STEPS + 1))
    assert quickstart.series("requeued") == undisturbed  # the same ranks on the same machine: bit for bit
    record = (job.run / "slurm-starts.txt").read_text().splitlines()
    assert [line.rpartition(" from ")[0] for line in record] == [f"job {job.number} start {n}" for n in range(4)]
    steps = [line.rpartition(" from ")[2] for line in record]
    assert steps[0] == "none"
    assert len(set(steps)) == 4

    rows = [
        f"{step:4}  {undisturbed[step][0]:.8f}  {loss:.8f}" for step, (loss, _) in quickstart.series("requeued").items()
    ]
    parts = [
        f"$ NPROC_PER_NODE=1 GLOO_SOCKET_IFNAME=lo {shlex.join(job.command(*options))}",
        "Start 0 comes near its time limit, shortened to let that happen soon; in start 1, rank 1 is killed (-9);\n"
        f"in start 2, the slurmd of {cluster.nodes[1]} is, and started again when SLURM has noticed.\n\n{output}",
        "$ cat runs/requeued/slurm-starts.txt\n" + "\n".join(record),
        "$ cat runs/requeued/events.jsonl\n" + (job.run / "events.jsonl").read_text(),
        "step  loss undisturbed, and requeued (equal, as is the gradient norm)\n" + "\n".join(rows),
    ]
    title = "launch/slurm/requeue.sbatch under slurmctld and two slurmd on one machine; tests/launch/test_requeue.py"
    keep_log("requeue_sbatch.log", title, parts, cluster, quickstart)


def test_scancel_saves_and_ends(cluster: slurm.Cluster, quickstart: Quickstart, one_process: Series) -> None:
    job = Job(cluster, quickstart, "cancelled")
    try:
        job.submit("--time=30")  # well above the 300 s before the limit at which it is asked to save
        job.until(lambda: bool(quickstart.series("cancelled")))
        cluster.run("scancel", job.number)
        state, _ = cluster.wait(job.number, START_SECONDS)
        time.sleep(2)  # what could requeue it is over
        shown = cluster.show(job.number)
    finally:
        quickstart.kill()
    assert state == "CANCELLED", job.output()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    assert job.steps()[-1] in (job.newest() - 1, job.newest())
    assert job.events()[-1][:2] == ("stopped", job.newest())
    assert ": requeued" not in job.output()
