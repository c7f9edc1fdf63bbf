"""Trains a list of settings, one after the other, in one group of processes; started from layout_table.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from harness.config import validate
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from harness.train import train


def main() -> None:
    """`layout_worker.py JOBS`: a JSON list of {settings, after}.

    `after` = [run, step] begins with a copy of that run as it was at that step.
    """
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as layout:
        for job in jobs:
            settings = validate(Settings, job["settings"], "layout_worker")
            if job.get("after"):
                layout.first_decides(lambda job=job, to=settings.run.path: copy_run(*job["after"], to))
            train(settings)


def copy_run(source: str, step: int, to: Path) -> None:
    shutil.copytree(source, to)
    for folder in (to / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
