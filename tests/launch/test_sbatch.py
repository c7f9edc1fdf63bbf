"""train.sbatch with stand-ins for scontrol and srun: what it finds out about the allocation, and what it starts.

What requeue.sbatch does besides is in test_requeue_script.py.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, SBATCH, environment
from tests.launch.test_scripts import JOB, PYTHON, executable

SRUN = """
printf '%s\\n' "$@" >"$0.arguments"
env >"$0.environment"
while [[ $1 == --* ]]; do shift; done
status=0
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" || status=$?
done
exit $status
"""
SCONTROL = """
case "$*" in
    "show hostnames machine[1-2]") printf 'machine1.invalid\\nmachine2.invalid\\n' ;;
    "show hostnames here") echo localhost ;;
    "--oneliner show node machine1.invalid") echo "NodeName=machine1.invalid NodeAddr=127.0.0.9 NodeHostName=y" ;;
    *) echo "scontrol: unknown: $*" >&2; exit 1 ;;
esac
"""


class Spool:
    """A copy of the script outside of the repository, as SLURM runs it, and the programs it calls."""

    def __init__(self, folder: Path, script: Path = SBATCH) -> None:
        self.script = shutil.copy(script, folder / "slurm_script")
        self.srun = executable(folder / "bin/srun", SRUN)
        self.scontrol = executable(folder / "bin/scontrol", SCONTROL)
        self.folder = folder

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        defaults = {
            "PATH": f"{self.folder}/bin:{environment()['PATH']}",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "NPROC_PER_NODE": "8",
            "SHOW_COMMAND": "1",
        }
        given = {key: value for key, value in {**defaults, **variables}.items() if value != "unset"}
        return subprocess.run(
            ["bash", self.script, *arguments],
            cwd=self.folder,
            env=environment(**given),
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


def test_one_torchrun_a_machine(spool: Spool) -> None:
    """What the submitting shell has of another start does not matter."""
    stray = {"MASTER_ADDR": "stray", "MASTER_PORT": "1", "NNODES": "9", "NODE_RANK": "5", "RDZV_ID": "stray"}
    stray |= {"RDZV_ENDPOINT": "stray:1", "RDZV_IS_HOST": "true", "RDZV_LOCAL_ADDR": "stray"}
    done = spool.run(*JOB, **stray, SLURM_CPUS_PER_TASK="6")
    assert (done.returncode, done.stderr) == (0, "")
    first, *commands = done.stdout.splitlines()
    port = 10000 + 1234567 % 20000
    said = f"2 machines (machine1.invalid machine2.invalid), rendezvous at 127.0.0.9:{port}"
    assert first == f"job 1234567: {said}"
    assert [shlex.split(line) for line in commands] == [
        [
            "OMP_NUM_THREADS=1", PYTHON, "-m", "harness.launcher", "--nnodes=2", "--nproc-per-node=8",
            f"--node-rank={rank}", "--master-addr=127.0.0.9", f"--master-port={port}", "--rdzv-id=1234567",
            "--rdzv-conf=timeout=600", "--max-restarts=0", "-m", "harness", "train", *JOB,
        ]
        for rank in range(2)
    ]  # fmt: skip
    arguments = Path(f"{spool.srun}.arguments").read_text().splitlines()
    assert arguments[:4] == ["--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "SRUN_CPUS_PER_TASK=6" in Path(f"{spool.srun}.environment").read_text().splitlines()


def test_a_name_that_resolves_is_taken(spool: Spool) -> None:
    done = spool.run(*JOB, SLURM_JOB_NODELIST="here", SLURM_SUBMIT_DIR="/", HARNESS_ROOT=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "--master-addr=localhost" in done.stdout


@pytest.mark.parametrize("status", [1, 75, 143])
def test_the_status_of_srun_is_the_jobs(spool: Spool, status: int) -> None:
    executable(spool.srun, f"exit {status}")
    assert spool.run(*JOB).returncode == status


@pytest.mark.parametrize(
    ("variables", "scontrol", "line"),
    [
        ({"SLURM_JOB_ID": "unset"}, SCONTROL, "not in a SLURM job; submit it: sbatch "),
        ({"SLURM_SUBMIT_DIR": "/"}, SCONTROL, "HARNESS_ROOT=/: is not the repository"),
        ({"SLURM_SUBMIT_DIR": "unset"}, SCONTROL, "HARNESS_ROOT=: is not the repository"),
        ({"SLURM_JOB_NODELIST": "unset"}, "exit 0", "no MASTER_ADDR: scontrol shows no machine"),
        ({}, "exit 1", "no MASTER_ADDR: scontrol shows no machine"),
        ({}, "exit 0", "no MASTER_ADDR: scontrol shows no machine"),
        ({}, '[[ $2 != hostnames ]] || echo a.invalid', "no MASTER_ADDR: the name a.invalid does not resolve"),
        ({}, '[[ $2 == hostnames ]] && echo a.invalid', "no MASTER_ADDR: the name a.invalid does not resolve"),
        ({}, 'echo "a.invalid NodeAddr=a.invalid x"', "no MASTER_ADDR: the name a.invalid"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_anything_starts(
    spool: Spool, variables: dict[str, str], scontrol: str, line: str
) -> None:
    executable(spool.scontrol, scontrol)
    done = spool.run(*JOB, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/slurm/train.sbatch: error: {line}")
    assert done.stderr.count("\n") == 1
    assert not Path(f"{spool.srun}.arguments").exists()
