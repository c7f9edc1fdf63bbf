"""A rank whose collective failed asks the watch first why, wherever in the layout's context that was."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parallel import ParallelLayout, ParallelSection

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:22956: Connection reset by peer")


class Watch:
    """Finds nothing, and writes down what it is asked and told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def wait_for_verdict(self, seconds: float | None = None) -> None:
        self.calls.append("wait")

    def report(self, text: str, reason: str = "failed") -> bool:
        self.calls.append(f"{reason}: {text.split(':')[0]}")
        return True


@pytest.mark.parametrize("waited_before", [False, True])
@pytest.mark.parametrize(
    ("error", "calls"), [(LOST, ["wait", "failed: RuntimeError"]), (ValueError("own"), ["failed: ValueError"])]
)
def test_it_waits_once_and_then_tells(error: Exception, calls: list[str], waited_before: bool) -> None:
    watch: Any = Watch()
    layout = ParallelLayout(ParallelSection(device="cpu")).__enter__()
    processes = layout._processes
    assert processes is not None
    processes.watch = watch
    if waited_before:
        layout.await_verdict(error)
    layout.__exit__(type(error), error, None)
    processes.watch = None
    processes.close()  # the process group itself, which ranks that fail leave to their end
    assert watch.calls == calls
