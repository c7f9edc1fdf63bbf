"""The quickstart, shortened, as a job of many processes: its arguments, its record, and an end to every wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCAL, TORCHRUN = ROOT / "launch/local.sh", ROOT / "launch/torchrun.sh"
SBATCH, REQUEUE = ROOT / "launch/slurm/train.sbatch", ROOT / "launch/slurm/requeue.sbatch"
STEPS = 12
RELATIVE = 1e-5
START_SECONDS = 150
"""Longer than four processes need to import, meet and train STEPS steps on two busy cores."""

FOREIGN = (
    "VERB", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NPROC_PER_NODE",
    "RDZV_ENDPOINT", "RDZV_ID", "RDZV_IS_HOST", "RDZV_LOCAL_ADDR", "JOIN_TIMEOUT_SECONDS", "SHOW_COMMAND",
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HARNESS_ROOT", "SLURM_CONF",
)  # fmt: skip
"""What the shell that runs the tests may have set, and a script would take for its own."""

CORPORA = "[{name: stdlib, source: [%s], suffixes: [.py]}]" % ", ".join(  # noqa: UP031
    f'"${{sysconfig:stdlib}}/{package}"' for package in ("asyncio", "email", "unittest")
)

Series = dict[int, tuple[float, float]]
"""Loss and gradient norm by step."""


def environment(**variables: str) -> dict[str, str]:
    """This process's environment for a script: this Python, one thread a process, nothing left over."""
    kept = {key: value for key, value in os.environ.items() if key not in FOREIGN and not key.startswith("SLURM_")}
    return {**kept, "VENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables}


@dataclass(frozen=True)
class Quickstart:
    """Runs of the quickstart that share one folder of prepared data, and a mark to find their processes by."""

    folder: Path
    mark: str = field(default_factory=lambda: f"HARNESS_TEST_JOB={uuid.uuid4().hex}")

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """What follows `harness train`."""
        return [
            "quickstart",
            f"run.name={name}",
            f"run.folder={self.folder}/runs",
            "run.tensorboard=false",
            "parallel.device=cpu",
            f"data.folder={self.folder}/data",
            f"data.corpora={CORPORA}",  # three packages of the library rather than all of it
            "data.tokenizer.vocab_size=1024",
            f"train.steps={STEPS}",
            "schedule.warmup_steps=4",
            "schedule.decay_steps=1",  # so that a longer run begins with the same steps
            "validation.every_steps=null",
            "summary.baselines=false",
            "summary.prompt=null",
            *overrides,
        ]

    def environment(self, **variables: str) -> dict[str, str]:
        """`environment`, with the mark."""
        name, _, value = self.mark.partition("=")
        return environment(**{name: value}, **variables)

    def run(self, command: Sequence[str], seconds: float, **variables: str) -> str:
        """Run to the end from the repository; the output. Fails where the status is not 0 or the time is over."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            self.kill()
            process.wait()
        assert process.returncode == 0, output
        return output

    def series(self, name: str) -> Series:
        """What the run has recorded so far."""
        return read_series(self.folder / "runs" / name)

    def processes(self) -> list[int]:
        """Ids of all processes of these runs: scripts, torchrun, ranks."""
        return processes_with(self.mark)

    def rank(self, number: int) -> int:
        """The process id of the running job's rank."""
        (pid,) = processes_with(self.mark, f"RANK={number}")
        return pid

    def kill(self) -> None:
        """End every process of these runs that is still there."""
        kill_all(self.mark)


def read_series(folder: Path) -> Series:
    """Of metrics.jsonl, its complete lines."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


def largest_difference(series: Series, reference: Series) -> float:
    """Relative, over the loss and gradient norm of the first STEPS steps, which both must have."""
    steps = range(1, STEPS + 1)
    return max(
        abs(ours - theirs) / abs(theirs)
        for step in steps
        for ours, theirs in zip(series[step], reference[step], strict=True)
    )


def wait_until(condition: Callable[[], bool], seconds: float, processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether it came true in time and before one of the processes ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.2)
    return True


def processes_with(*entries: str) -> list[int]:
    """Ids of the processes whose environment has all of `entries` (NAME=value). Workers of torchrun and of SLURM live
    in sessions of their own, so a process group does not hold them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            present = (process / "environ").read_bytes().split(b"\0")
            if all(entry.encode() in present for entry in entries):
                found.append(int(process.name))
    return found


def kill_all(entry: str) -> None:
    """SIGKILL to every process with `entry` in its environment, until there is none."""
    deadline = time.monotonic() + 20
    while pids := processes_with(entry):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} with {entry} do not end")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def shown(script: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A script's own output where it starts nothing: with SHOW_COMMAND=1, or refused."""
    return subprocess.run(
        [str(script), *arguments],
        env=environment(**{"SHOW_COMMAND": "1", **variables}),
        capture_output=True,
        text=True,
        timeout=30,
    )
