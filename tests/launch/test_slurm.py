"""launch/slurm/train.sbatch under a real slurmctld and two slurmd: the quickstart on 2 nodes x 2 processes.

Skipped, with the reason, where no SLURM can be started. HARNESS_KEEP_LOGS=FOLDER keeps the log of the run.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import harness
from tests.launch import cluster as slurm
from tests.launch.jobs import RELATIVE, ROOT, START_SECONDS, STEPS, Quickstart, Series, largest_difference

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
    if "HARNESS_KEEP_LOGS" in os.environ:
        keep_log(Path(os.environ["HARNESS_KEEP_LOGS"]), cluster, quickstart, log, (one_process, one_host, series))


def test_a_job_that_cannot_start_fails(cluster: slurm.Cluster, quickstart: Quickstart, tmp_path: Path) -> None:
    """With the status of the script, and of the tasks behind srun."""
    state, status, log = submit(cluster, tmp_path / "empty.log", quickstart.environment())
    assert (state, status) == ("FAILED", 2)
    assert log.startswith("launch/slurm/train.sbatch: error: no configuration; usage: ")
    state, status, log = submit(cluster, tmp_path / "wrong.log", quickstart.environment(VENV="/absent"), "quickstart")
    assert state == "FAILED"
    assert status in (2, 143)  # 143: a second task that SLURM ended because the first had failed
    assert "launch/torchrun.sh: error: VENV=/absent: has no bin/python" in log


def keep_log(
    folder: Path, cluster: slurm.Cluster, quickstart: Quickstart, log: str, runs: tuple[Series, Series, Series]
) -> None:
    """What a reader needs to believe the comparison, without this machine's paths."""
    single, host, nodes = runs
    rows = [
        f"{step:4}  {single[step][0]:.8f}  {host[step][0]:.8f}  {nodes[step][0]:.8f}   "
        f"{single[step][1]:.8f}  {host[step][1]:.8f}  {nodes[step][1]:.8f}"
        for step in single
    ]
    versions = {
        "slurm": cluster.run("sinfo", "--version").split()[-1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "harness": harness.__version__,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    command = "NPROC_PER_NODE=2 GLOO_SOCKET_IFNAME=lo " + shlex.join([*SBATCH, *quickstart.arguments("slurm")])
    parts = [
        "launch/slurm/train.sbatch under slurmctld and two slurmd on one machine; from tests/launch/test_slurm.py",
        "\n".join(f"{name}: {version}" for name, version in versions.items()),
        "$ sinfo --Node --long\n" + cluster.run("sinfo", "--Node", "--long"),
        f"$ {command}\n{log}",
        "step  loss of one process, of 4 on one host, of 2 nodes x 2   gradient norm of the same\n" + "\n".join(rows),
        f"largest relative difference: {largest_difference(nodes, host):.1e} from one host, "
        f"{largest_difference(nodes, single):.1e} from one process (bound {RELATIVE:g})",
    ]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    for path, name in ((str(quickstart.folder), "TMP"), (sys.prefix, "VENV"), (str(ROOT), "HARNESS_ROOT")):
        text = text.replace(path, f"${name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_sbatch.log").write_text(text.replace(platform.node(), "HOST"))
