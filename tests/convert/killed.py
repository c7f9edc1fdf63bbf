"""A conversion that is killed at a point of its choice."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.convert import convert


def convert_killed(source: Path, target: Path, at: int) -> tuple[int | None, int]:
    """The exit status of a process that converts and kills itself at call number `at` of fsync, rename or mkdir (0:
    never), and how many of these calls there were."""
    context = multiprocessing.get_context("forkserver")  # one process imports torch, for all
    context.set_forkserver_preload(["tests.convert.killed"])
    calls = context.Value("i", 0)
    process = context.Process(target=_run, args=(source, target, at, calls))
    process.start()
    process.join(120)
    return process.exitcode, calls.value


def _run(source: Path, target: Path, at: int, calls: Any) -> None:
    def killing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.value += 1
            if calls.value == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "rename", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))
    convert(source, target, proof="streamed")
