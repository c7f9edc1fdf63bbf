"""Several test processes side by side: which tests stay together, and how many threads each process computes with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TOGETHER = {TESTS / "launch"}
"""Folders whose files share fixtures of the session that are expensive."""
LONGEST = (
    TESTS / "launch",
    *(TESTS / "parallel" / f"test_{name}.py" for name in ("layouts", "resume_layouts", "ranks", "decisions")),
    TESTS / "convert",
    TESTS / "kernels" / "test_vocab_parallel.py",
)
"""What takes minutes; begun last, it would be waited for with the other processes idle."""


# Before the kernels are first imported: Triton runs them in its interpreter, on the CPU. What is asked for by no name
# ("auto") is plain torch there all the same.
os.environ.setdefault("TRITON_INTERPRET", "1")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported; the processes that tests start get it too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests, or a folder's, run in one process, whose fixtures they share; the longest begin first."""
    for item in items:
        place = item.path.parent if item.path.parent in TOGETHER else item.path
        item.add_marker(pytest.mark.xdist_group(str(place.relative_to(TESTS))))
    items.sort(key=lambda item: min(n for n, place in enumerate((*LONGEST, TESTS)) if item.path.is_relative_to(place)))
