"""datatrove's tasks on this machine, whose log stays in its folder: the terminal is for harness to speak on.

Imports datatrove, so only what runs on it may import this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.utils import logging as theirs


class LocalTasks(LocalPipelineExecutor):
    """datatrove's local executor, silent; what it logs of a task lies below `logging_dir`."""

    def run(self) -> Any:
        with _off_the_terminal():
            return super().run()

    def _launch_run_for_rank(self, *arguments: Any, **options: Any) -> Any:
        with _off_the_terminal():  # in a process of its pool
            return super()._launch_run_for_rank(*arguments, **options)


@contextmanager
def _off_the_terminal() -> Iterator[None]:
    """datatrove sends its log to what it knows as sys.stderr, before, in and after each task, and has no setting for
    it. A task's own file stays, and everything else that writes to sys.stderr."""
    before = theirs.sys
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        theirs.sys = SimpleNamespace(stderr=nowhere)
        theirs.setup_default_logger()
        try:
            yield
        finally:
            theirs.sys = before
            theirs.setup_default_logger()
