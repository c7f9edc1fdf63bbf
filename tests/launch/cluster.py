"""A small SLURM of its own on this machine: a controller and two nodes, for root only.

Everything of it (configuration, state, the munge key and socket, ports) is private, so a SLURM that is there already
is not touched and does not see it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.launch.jobs import environment, kill_all

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
READY_SECONDS = 30


def why_not() -> str | None:
    """Why no SLURM can be started here, in a few words; None where one can."""
    if os.geteuid() != 0:
        return "slurmctld and slurmd need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)" if missing else None


class Cluster:
    """A context manager: `nodes` accept jobs between entering and leaving."""

    nodes = ("harness-node1", "harness-node2")
    """Names that do not resolve, as on a cluster whose nodes are known to SLURM by address only."""

    def __init__(self, *, slurmd_timeout_seconds: int = 300, kill_wait_seconds: int = 5) -> None:
        """A node whose slurmd is silent for the first is down; jobs have the second between SIGTERM and SIGKILL."""
        # Not pytest's folder: a socket's path may have 107 characters, and munge wants folders that others may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.configuration = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        """Environment of whoever is to see this cluster."""
        self._settings = [f"SlurmdTimeout={slurmd_timeout_seconds}", f"KillWait={kill_wait_seconds}"]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_options())
            _wait_for((self.folder / "munge.socket").exists, "munged", self.folder / "munged.out")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            _wait_for(self._is_idle, "two idle nodes", self.folder / "slurmctld.out")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *command: str, env: dict[str, str] | None = None, **options: Any) -> str:
        """A SLURM command, to its end: what it prints. Raises RuntimeError where it fails."""
        done = subprocess.run(
            command,
            env={**(environment() if env is None else env), **self.configuration},
            capture_output=True,
            text=True,
            timeout=30,
            **options,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    def wait(self, job: str, seconds: float) -> tuple[str, int]:
        """The job's last state and its exit status. (`sbatch --wait` would look after 2, 10, 42 s only.)"""
        deadline = time.monotonic() + seconds
        while True:
            shown = self.show(job)
            state, status = shown["JobState"], int(shown["ExitCode"].partition(":")[0])
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return state, status
            if time.monotonic() > deadline:
                self.run("scancel", job)
                return f"{state} after {seconds} s", status
            time.sleep(0.3)

    def start_node(self, node: str) -> None:
        """Its slurmd, for the first time or after `kill_node`."""
        self._slurmd[node] = self._start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Its slurmd, by SIGKILL; what runs on the node goes on."""
        self._slurmd[node].kill()
        self._slurmd[node].wait(timeout=10)

    def close(self) -> None:
        """End the daemons, and the jobs, whose processes are known by this cluster's configuration."""
        for daemon in self._daemons:
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait(timeout=10)
        kill_all(f"SLURM_CONF={self.configuration['SLURM_CONF']}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        controller, *ports = _free_ports(1 + len(self.nodes))
        lines = [
            "ClusterName=ci",
            "SlurmctldHost=localhost",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # A requeued job waits as long as a credential lives before it starts again: by default, two minutes.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=10",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            *self._settings,
            # The job's rendezvous port comes from its number; another cluster on this machine would begin at 1 too.
            f"FirstJobId={secrets.randbelow(20000) + 1}",
            *(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
                for node, port in zip(self.nodes, ports, strict=True)
            ),
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES State=UP",
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _munge_options(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{ending}" for option, ending in names.items()]

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            daemon = subprocess.Popen(
                command,
                env={**environment(), **self.configuration},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def _is_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except RuntimeError:  # the controller does not listen yet
            return False
        return states == ["idle"] * len(self.nodes)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:] if log.exists() else "(no output)"
            raise RuntimeError(f"{what}: not there after {READY_SECONDS} s; {log.name} says:\n{said}")
        time.sleep(0.1)
