"""harness.launcher with small workers: which signals reach them, and what it ends with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.launcher import children, describe, exit_status
from tests.launch.jobs import environment, kill_all

MARK = f"HARNESS_TEST_LAUNCHER={os.getpid()}"
HERE = ["--standalone", "--nproc-per-node=2"]
SECONDS = 100
"""For a machine under load; on an idle one each start takes two or three."""


@contextmanager
def started(how: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The launcher, two workers of worker.py behind it; nothing of them is left afterwards."""
    name, _, value = MARK.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.launcher", *(options or HERE), str(Path(__file__).with_name("worker.py")), how],
        env=environment(**{name: value}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        kill_all(MARK)
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and what was written."""
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def wait_for_workers(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    seen = ""
    while len(re.findall(r"is there", seen)) < 2:
        read = process.stdout.readline()
        assert read, seen
        seen += read


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_workers_and_they_are_waited_for(number: signal.Signals) -> None:
    with started("wait") as process:
        wait_for_workers(process)
        process.send_signal(number)
        status, output = end(process)
    assert status == 75
    assert all(f"worker {rank} saved after {number.name}\n" in output for rank in range(2)), output
    assert "ended with status 75" in output
    assert "Traceback" not in output
    assert "Sending process" not in output


@pytest.mark.parametrize(
    ("how", "status", "lines"),
    [
        ("finish", 0, []),
        # What the other one does is that it is asked to end, by torchrun.
        ("error", 2, ["harness train: error: rank 1: no such file", "rank 1 ended with status 2; .*exit status 2"]),
        ("killed", 75, ["rank 1 killed by SIGKILL; .*exit status 75, worth another start"]),
    ],
)
def test_the_status_is_the_workers(how: str, status: int, lines: list[str]) -> None:
    with started(how) as process:
        ended, output = end(process)
    assert ended == status, output
    for line in lines:
        assert re.search(line, output), output
    assert output.count("harness.launcher on ") == (status != 0)
    assert "Traceback" not in output
    assert "failed (exitcode" not in output


def test_a_signal_that_comes_while_workers_import_ends_them_too() -> None:
    """They have no handlers yet, and die of it."""
    with started("unprepared") as process:
        wait_for_workers(process)
        process.send_signal(signal.SIGUSR1)
        status, output = end(process)
    assert status == 75
    assert re.search("killed by SIGUSR1.*exit status 75", output), output


def test_an_interrupt_is_torchruns() -> None:
    with started("wait") as process:
        wait_for_workers(process)
        process.send_signal(signal.SIGINT)
        status, output = end(process)
    assert status == 130
    assert all(f"worker {rank} interrupted" in output for rank in range(2)), output
    assert "ended by SIGINT, and its workers with it" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_are_workers_a_signal_ends_the_launcher(number: signal.Signals) -> None:
    """While it waits, in C++, for a machine that does not come."""
    options = ["--nnodes=2", "--node-rank=1", "--master-addr=localhost", f"--master-port={free_port()}"]
    with started("wait", *options, "--nproc-per-node=2") as process:
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and "pt_elastic" not in threads(process.pid):  # torchrun's name for itself
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        status, output = end(process)
    assert status == 75
    assert f"{number.name} before any worker was started: exit status 75, worth another start" in output


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "OTHER"])
def test_a_worker_that_starts_after_the_signal_gets_it(variable: str) -> None:
    """The second worker starts when the first has got both signals already. Without torchrun's variable they are no
    workers that it starts as programs; then the children that are there count as workers."""
    program = textwrap.dedent('''
        import os, signal, subprocess, sys
        from harness import launcher
        launcher.Forwarding().begin()
        worker = """
        import signal, time
        come = set()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: come.add(number))
        print("there", flush=True)
        while len(come) < 2:
            time.sleep(0.01)
        """
        def start():
            environment = {**os.environ, sys.argv[1]: "x"}
            return subprocess.Popen([sys.executable, "-c", worker], env=environment, stdout=subprocess.PIPE)
        first = start()
        assert first.stdout.readline() == b"there\\n"
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert first.wait(60) == 0
        if sys.argv[1] != "OTHER":
            assert start().wait(60) in (0, -signal.SIGUSR1, -signal.SIGTERM)  # before or after it has handlers
    ''')
    done = subprocess.run([sys.executable, "-c", program, variable], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([75, 75], 75),
        ([-9, 75], 75),
        ([-11], 75),
        ([75, 1], 1),
        ([-15, 2, 1], 2),
        ([1, 2], 1),
        ([-15, 130], 130),
    ],
)
def test_exit_status(statuses: list[int], status: int) -> None:
    assert exit_status(statuses) == status


def test_describe() -> None:
    assert describe({3: -9, 1: 75, 0: 75}) == "rank 3 killed by SIGKILL; ranks 0, 1 ended with status 75"
    assert describe({0: -99}) == "rank 0 killed by signal 99"


def test_children() -> None:
    """One whose name would mislead who splits the line at blanks."""
    process = subprocess.Popen(["bash", "-c", 'printf "a) b (c" >/proc/self/comm; read -r'], stdin=subprocess.PIPE)
    try:
        assert process.pid in children(os.getpid())
        assert children(process.pid) == []
    finally:
        process.communicate()
    assert process.pid not in children(os.getpid())


def free_port() -> int:
    """Nobody listens on it, so that who connects goes on trying."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def threads(pid: int) -> set[str]:
    """Their names."""
    return {path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")}
