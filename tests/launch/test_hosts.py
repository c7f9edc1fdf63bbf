"""launch/torchrun.sh on two hosts (network namespaces) x 2 processes: the same losses, and an end when a rank is lost.

Each start runs on past the steps that are compared, and is then broken: once a worker is killed, once the link is cut.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.launch.jobs import (
    RELATIVE,
    ROOT,
    START_SECONDS,
    STEPS,
    TORCHRUN,
    Quickstart,
    Series,
    largest_difference,
    wait_until,
)
from tests.parallel import namespaces

LOST_SECONDS = 8
END_SECONDS = LOST_SECONDS + 7 + 20
"""The bound that harness/parallel/watch.py states for its processes, and what torchrun takes to end after them."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[namespaces.Hosts]:
    reason = namespaces.why_not()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.Hosts() as hosts:
        yield hosts


class Job:
    """launch/torchrun.sh on both hosts, with their own variables and prefixes."""

    def __init__(
        self,
        hosts: namespaces.Hosts,
        quickstart: Quickstart,
        name: str,
        folder: Path,
        variables: Sequence[dict[str, str]],
        prefix: Sequence[str] = (),
    ) -> None:
        self._quickstart, self._name = quickstart, name
        self._logs = [folder / f"{name}-host{number}.log" for number in range(2)]
        overrides = ["train.steps=1000000", f"parallel.lost_after_seconds={LOST_SECONDS}", "parallel.tensor=2"]
        self.processes = []
        for number, log in enumerate(self._logs):
            environment = quickstart.environment(NNODES="2", NPROC_PER_NODE="2", **variables[number])
            with log.open("wb") as output:
                self.processes.append(
                    hosts.run(
                        number,
                        [*prefix, str(TORCHRUN), *quickstart.arguments(name, *overrides)],
                        env=environment,
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def first_steps(self) -> Series:
        """Once STEPS of them are recorded."""
        enough = wait_until(lambda: STEPS in self._quickstart.series(self._name), START_SECONDS, self.processes)
        assert enough, self.outputs()
        return self._quickstart.series(self._name)

    def outputs(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self._logs]

    def end(self) -> tuple[list[int], list[str]]:
        """Exit status and output of both hosts. Fails where a rank, or a script, is still there after the bound."""
        over = wait_until(lambda: not self._quickstart.processes(), END_SECONDS, [])
        assert over, self.outputs()
        return [process.wait() for process in self.processes], self.outputs()


def test_a_worker_is_killed(
    hosts: namespaces.Hosts, quickstart: Quickstart, one_process: Series, tmp_path: Path
) -> None:
    """c10d rendezvous between hosts that share a name, which resolves on neither."""
    own = [
        {
            "RDZV_ENDPOINT": f"{hosts.addresses[0]}:29400",
            "RDZV_ID": "killed",
            "RDZV_IS_HOST": "true" if number == 0 else "false",
            "RDZV_LOCAL_ADDR": hosts.addresses[number],
        }
        for number in range(2)
    ]
    rename = ["sh", "-c", 'hostname twin && exec "$@"', "sh"]
    job = Job(hosts, quickstart, "killed", tmp_path, own, rename)
    try:
        assert largest_difference(job.first_steps(), one_process) < RELATIVE
        os.kill(quickstart.rank(3), signal.SIGKILL)
        statuses, outputs = job.end()
    finally:
        quickstart.kill()
    assert all(statuses), outputs
    # torchrun ends the killed worker's neighbour at once, so that one may be named too.
    assert any(re.search("harness: rank 0 on twin: .*lost .*rank 3 on twin", output) for output in outputs), outputs


def test_the_link_is_cut(hosts: namespaces.Hosts, quickstart: Quickstart, one_process: Series, tmp_path: Path) -> None:
    """Static rendezvous, by name."""
    own = [{"MASTER_ADDR": hosts.names[0], "MASTER_PORT": "29401", "NODE_RANK": str(number)} for number in range(2)]
    job = Job(hosts, quickstart, "cut", tmp_path, own)
    try:
        assert largest_difference(job.first_steps(), one_process) < RELATIVE
        hosts.cut()
        statuses, outputs = job.end()
    finally:
        quickstart.kill()
        hosts.mend()
    assert all(statuses), outputs
    # Each side names ranks of the other; when one rank has ended, torchrun may end its neighbour before it speaks.
    assert re.search("harness: rank 0 on nodeA: .*lost rank [23] on nodeB", outputs[0]), outputs
    assert re.search("harness: rank [23] on nodeB: .*lost contact with rank 0 on nodeA", outputs[1]), outputs
