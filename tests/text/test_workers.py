"""Processes that work on batches: order, errors, and what becomes of a process that dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness.config import HarnessError
from harness.text import map_in_processes

BOUND_SECONDS = 60
WITHOUT_GUARD = """
from harness.text import map_in_processes
list(map_in_processes([(1, "x")], len, 2, print, ("started",), setting="data.workers"))
"""

_started = ""


def begin(word: str) -> None:
    global _started
    _started = word


def work(number: int) -> str:
    if number == 13:
        raise ValueError("13")
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{_started} {number} {os.getpid()}"


def run(numbers: Iterable[int]) -> list[tuple[str, str]]:
    batches = ((f"batch {number}", number) for number in numbers)
    return list(map_in_processes(batches, work, 2, begin, ("hello",), setting="some.workers"))


def test_results_come_in_order_from_other_processes() -> None:
    numbers = list(range(14, 60))
    found = run(numbers)
    assert [batch for batch, _ in found] == [f"batch {number}" for number in numbers]
    assert [result.split()[:2] for _, result in found] == [["hello", str(number)] for number in numbers]
    assert str(os.getpid()) not in {result.split()[2] for _, result in found}


def test_what_a_process_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="13"):
        run([1, 2, 13, 4])


@pytest.mark.parametrize("seen", ["as a batch is handed over", "at a result"])
def test_a_process_that_dies_ends_the_work(seen: str) -> None:
    def numbers() -> Iterator[int]:
        yield from (1, 99)
        if seen == "at a result":
            return
        end = time.monotonic() + BOUND_SECONDS
        while multiprocessing.active_children():  # the others are ended too
            assert time.monotonic() < end
            time.sleep(0.01)
        yield 20

    with pytest.raises(HarnessError, match=r"a worker process ended early .* set some.workers lower, 1 for none"):
        run(numbers())


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_GUARD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND_SECONDS)
    assert done.returncode == 1
    assert "started from a script without `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
