"""Trains a list of settings, one after the other, in one group of processes; started by torchrun from tests."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch

from harness.config import validate
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from harness.train import train


def main() -> None:
    """`layout_worker.py JOBS`: a JSON list of settings; a job that fails writes `error.txt` into its run folder."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as layout:
        for values in jobs:
            settings = validate(Settings, values, "layout_worker")
            try:
                train(settings)
            except Exception:
                (settings.run.path / f"error-{layout.rank}.txt").write_text(traceback.format_exc())
                raise


if __name__ == "__main__":
    main()
