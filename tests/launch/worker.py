"""A worker without torch, as harness train behaves under the launcher: `worker.py HOW`. Started by test_launcher.py."""

from __future__ import annotations

import os
import signal
import sys
import time

how, rank = sys.argv[1], os.environ["RANK"]
come: list[str] = []
if how != "unprepared":
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, lambda number, frame: come.append(signal.Signals(number).name))
try:
    print(f"worker {rank} is there", flush=True)
    if how == "finish":
        sys.exit(0)
    if how == "error" and rank == "1":
        print("harness train: error: rank 1: no such file", file=sys.stderr, flush=True)
        os._exit(2)
    if how == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    until = time.monotonic() + 100
    while not come and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1.0)  # saving
    print(f"worker {rank} saved after {come[0]}", flush=True)
    os._exit(75)  # Python's own end would restore the default handlers, and torchrun send SIGTERM meanwhile
except KeyboardInterrupt:
    print(f"worker {rank} interrupted", flush=True)
    os._exit(130)
