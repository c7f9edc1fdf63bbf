"""Trains a list of settings, one after the other, in one group of processes; started from layout_table.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.callbacks import Callback
from harness.config import validate
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from harness.train import Trainer, train


def main() -> None:
    """`layout_worker.py JOBS`: a JSON list of jobs (run_job)."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as layout:
        for job in jobs:
            run_job(job, layout)


def run_job(job: dict[str, Any], layout: ParallelLayout) -> None:
    """Train {settings, after, checked}, the last two optional.

    `after` = [run, step] begins with a copy of that run as it was at that step. `checked`: see Checked.
    """
    settings = validate(Settings, job["settings"], "layout_worker")
    after = job.get("after")
    if after:
        layout.first_decides(lambda: copy_run(after[0], after[1], settings.run.path))
    train(settings, [Checked(after)] if job.get("checked") else [])


def copy_run(source: str, step: int, to: Path) -> None:
    shutil.copytree(source, to)
    for folder in (to / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


class Checked(Callback):
    """Knows every step that was made since the run began, whatever layouts made them.

    After a resume it compares what every rank holds with the checkpoint, bit for bit, and saves it once more.
    """

    name = "checked"

    def __init__(self, resumed_from: tuple[str, int] | None) -> None:
        self.steps: list[int] = []
        self._resumed_from = resumed_from

    def before_training(self, trainer: Any) -> None:
        assert isinstance(trainer, Trainer)
        if self._resumed_from is None:
            return
        run, step = self._resumed_from
        saved = whole_tensors(Path(run), step)
        held = list(trainer.engine.fragments())  # also where several ranks hold the same part
        assert {fragment.key for fragment in held} == saved.keys()
        for fragment in held:
            differing = differing_bytes(fragment.tensor, saved[fragment.key][fragment.slices])
            assert differing == 0, f"{fragment.key} at {fragment.offsets}: {differing} bytes differ"
        trainer.save()
        trainer.saving.settle(trainer.step)

    def after_step(self, trainer: Any, record: dict[str, Any]) -> None:
        self.steps.append(record["step"])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


def whole_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by "kind/name", put together from the files as its manifest says and no more."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"]}
    tensors = {}
    for key, entry in manifest["tensors"].items():
        tensors[key] = whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for part in entry["fragments"]:
            box = tuple(slice(o, o + size) for o, size in zip(part["offsets"], part["shape"], strict=True))
            whole[box] = files[part["file"]][part["key"]]
    return tensors


def differing_bytes(one: Tensor, other: Tensor) -> int:
    """How many bytes of two tensors of the same shape and dtype differ; zeros of two signs do, and a nan is itself."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return int((a != b).sum())


if __name__ == "__main__":
    main()
