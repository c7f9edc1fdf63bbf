"""Our own checkpoints, of any layout, as a source and as a target of conversions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import CheckpointStore, StoredFile
from harness.config import HarnessError, plain, validate
from harness.data import Tokenizer, load_tokenizer
from harness.model import ModelSection, SiteState, norm_sites
from harness.parallel import Fragment

from .source import ModelSource, decoder_shapes

TOKENIZER = "tokenizer"
NORM_REMOVAL = "norm_removal"
"""Whose state says which norm sites are frozen."""


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder, with or without checkpoints yet, or means one of its checkpoints."""
    path = Path(os.path.abspath(path))  # so that "." has a name
    if path.parent.name == "checkpoints":
        return not path.exists() or (path / "manifest.json").is_file()
    if path.name == "checkpoints" and any(path.glob("step-*/manifest.json")):
        return True
    if (path / "config.json").is_file() and not any((path / "checkpoints").glob("step-*/manifest.json")):
        return False  # another's model, in a folder that has such names too
    return (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()


def locate_run(path: Path) -> tuple[Path, int | None]:
    """The run folder that a path means, and the step where it means one checkpoint.

    A path is a run folder, its `checkpoints`, or a checkpoint's own folder, which `.` may stand for too. HarnessError
    for something else below `checkpoints`.
    """
    place = Path(os.path.abspath(path))  # so that "." has a name
    if place.name == "checkpoints":
        return (path.parent if path.name == "checkpoints" else place.parent), None
    if place.parent.name != "checkpoints":
        return path, None
    name = place.name.removeprefix("step-")
    if not name.isdigit():
        raise HarnessError(f"{path}: not a checkpoint; expected a folder such as step-00000200")
    return (path.parent.parent if path.parent.name == "checkpoints" else place.parent.parent), int(name)


class RunSource(ModelSource):
    """The master weights of a run's checkpoint: the newest one, `step`, or the one whose folder `path` is.

    Raises HarnessError where there is no such run or checkpoint, or its manifest is damaged.
    """

    format = "harness"

    def __init__(self, path: Path, step: int | None = None) -> None:
        run_folder, named = locate_run(path)
        step = named if step is None else step
        self.run_folder = run_folder
        self.store = CheckpointStore(run_folder / "checkpoints")
        if step is None:
            step = max(self.store.steps(), default=None)  # if it is damaged, that is said, and no other is taken for it
            if step is None:
                raise HarnessError(
                    f"{run_folder}: no run with a good checkpoint; give runs/NAME or runs/NAME/checkpoints/step-…"
                )
        self.step: int = step
        self.path = self.store.folder_of(step)
        self._manifest = self.store.manifest(step)
        self.state = self._manifest.state
        settings: Any = self.state["settings"]
        self.section = validate(ModelSection, settings["model"], f"{self.path}: model")
        self.sequence_length = settings.get("data", {}).get("sequence_length")
        self.tokenizer_fingerprint: str | None = self.state["tokenizer"]  # type: ignore[assignment]
        self.norm_states = self._read_norm_states()

    def read(self, fragments: Sequence[Fragment]) -> None:
        self.store.read(self._manifest, fragments)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        if self.tokenizer_fingerprint is None:
            return None
        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise HarnessError(f"{self.tokenizer_folder}: not the tokenizer that the checkpoint was trained with")
        return tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        return self.run_folder / TOKENIZER

    @property
    def details(self) -> dict[str, Any]:
        return {**super().details, "step": self.step}

    def _read_norm_states(self) -> dict[str, SiteState]:
        """Those that norm removal has changed."""
        callbacks: Any = self.state.get("callbacks", {})
        sites = callbacks.get(NORM_REMOVAL, {}).get("sites", {})
        names = {site.name for site in norm_sites(self.section)}
        states = {}
        for name, said in sites.items():
            state = SiteState(float(said["alpha"]), None if said["sigma"] is None else float(said["sigma"]))
            if name not in names:
                raise HarnessError(f"{self.path}: norm removal speaks of a site {name}, which its model has not")
            if state.alpha > 0:
                states[name] = state
        return states

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        damaged = self.store.verify(self.step, share, kinds={"master"})
        return [line + self.store.advice(self.step) for line in damaged]


def write_run(folder: Path, source: ModelSource, dtype: torch.dtype) -> dict[str, StoredFile]:
    """Write a run folder whose one checkpoint, of step 0, holds the master weights of `source` and nothing else.

    Raises HarnessError for a dtype that master weights do not have.
    """
    if dtype != torch.float32:
        raise HarnessError(f"--dtype {str(dtype).removeprefix('torch.')}: master weights are float32; leave it out")
    section, tokenizer = source.section, source.tokenizer

    def fetch(fragment: Fragment) -> Tensor:
        whole = Fragment.whole(fragment.name, fragment.kind, torch.empty(fragment.global_shape))
        source.read([whole])
        return whole.tensor

    shapes = decoder_shapes(section)
    masters = [
        Fragment.whole(name, "master", torch.empty(shape, dtype=torch.float32, device="meta"))
        for name, shape in shapes.items()
    ]
    state = {
        "step": 0,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "converted_from": source.details,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "settings": {"model": plain(section)},
    }
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    store = CheckpointStore(folder / "checkpoints")
    saved = store.save(0, masters, state, fetch=fetch)
    return {str(saved.relative_to(folder) / name): file for name, file in store.manifest(0).files.items()}
