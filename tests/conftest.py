"""Several test processes side by side: which tests stay together, and how many threads each process computes with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first."""
    items.sort(key=lambda item: min(n for n, place in enumerate((*LONGEST, TESTS)) if item.path.is_relative_to(place)))


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests, or those of a folder of TOGETHER, run in one process, whose fixtures they share.

    (xdist 3.8's own groups, by marks, are without effect from pytest 9.2 on: pytest-xdist issue 1386.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return str(file.parent if file.parent in TOGETHER else file)

    return ByFile(config, log)
