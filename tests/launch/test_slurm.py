"""launch/slurm/train.sbatch under a real slurmctld and two slurmd: the quickstart on 2 nodes x 2 processes.

Skipped, with the reason, where no SLURM can be started. HARNESS_KEEP_LOGS=FOLDER keeps the log of the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import cluster as slurm
from tests.launch.jobs import RELATIVE, ROOT, START_SECONDS, STEPS, Quickstart, Series, largest_difference
from tests.launch.logs import keep_log

SBATCH = [
    "sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", "--time=5", "launch/slurm/train.sbatch",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm.Cluster() as cluster:
        yield cluster


def submit(cluster: slurm.Cluster, log: Path, environment: dict[str, str], *arguments: str) -> tuple[str, int, str]:
    """State and exit status of the job, and what it wrote."""
    command = [*SBATCH[:-1], f"--output={log}", SBATCH[-1], *arguments]
    job = cluster.run(*command, env=environment, cwd=ROOT).strip()
    return *cluster.wait(job, START_SECONDS), log.read_text() if log.exists() else ""


def test_two_nodes_train_as_one_host_and_as_one_process(
    cluster: slurm.Cluster, quickstart: Quickstart, one_process: Series, one_host: Series, tmp_path: Path
) -> None:
    arguments = quickstart.arguments("slurm")
    environment = quickstart.environment(NPROC_PER_NODE="2", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="stray.invalid")
    state, status, log = submit(cluster, tmp_path / "job.log", environment, *arguments)
    assert (state, status) == ("COMPLETED", 0), log
    assert "2 machines (harness-node1 harness-node2), rendezvous at 127.0.0.1:" in log
    series = quickstart.series("slurm")
    assert list(series) == list(range(1, STEPS + 1))
    assert largest_difference(series, one_host) < RELATIVE
    assert largest_difference(series, one_process) < RELATIVE
    rows = [
        f"{step:4}  {one_process[step][0]:.8f}  {one_host[step][0]:.8f}  {series[step][0]:.8f}   "
        f"{one_process[step][1]:.8f}  {one_host[step][1]:.8f}  {series[step][1]:.8f}"
        for step in series
    ]
    parts = [
        f"$ NPROC_PER_NODE=2 GLOO_SOCKET_IFNAME=lo {shlex.join([*SBATCH, *arguments])}\n{log}",
        "step  loss of one process, of 4 on one host, of 2 nodes x 2   gradient norm of the same\n" + "\n".join(rows),
        f"largest relative difference: {largest_difference(series, one_host):.1e} from one host, "
        f"{largest_difference(series, one_process):.1e} from one process (bound {RELATIVE:g})",
    ]
    title = "launch/slurm/train.sbatch under slurmctld and two slurmd on one machine; from tests/launch/test_slurm.py"
    keep_log("train_sbatch.log", title, parts, cluster, quickstart)


def test_a_job_that_cannot_start_fails(cluster: slurm.Cluster, quickstart: Quickstart, tmp_path: Path) -> None:
    """With the status of the script, and of the tasks behind srun."""
    state, status, log = submit(cluster, tmp_path / "empty.log", quickstart.environment())
    assert (state, status) == ("FAILED", 2)
    assert log.startswith("launch/slurm/train.sbatch: error: no configuration; usage: ")
    state, status, log = submit(cluster, tmp_path / "wrong.log", quickstart.environment(VENV="/absent"), "quickstart")
    assert state == "FAILED"
    assert status in (2, 143)  # 143: a second task that SLURM ended because the first had failed
    assert "launch/torchrun.sh: error: VENV=/absent: has no bin/python" in log
