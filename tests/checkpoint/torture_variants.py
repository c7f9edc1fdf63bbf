"""The kinds of runs that tools/torture_checkpoints.py kills."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.settings import Settings
from tests.checkpoint.kills import Poison
from tests.small_run import small_settings

STEPS, ROLLBACK_STEPS = 24, 3


@dataclass(frozen=True)
class Variant:
    """A kind of run."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    world_size: int = 1
    poison: Poison | None = None

    @property
    def rolls_back(self) -> bool:
        return "rollback" in self.sections.get("faults", {}).values()

    def settings(self, folder: Path, name: str) -> Settings:
        sections: dict[str, dict[str, Any]] = {
            "run": {"name": name, "tensorboard": True},
            "parallel": {"threads": 1, "timeout_seconds": 30.0, "lost_after_seconds": 20.0},
            "train": {"steps": STEPS},
            "validation": {"every_steps": 4},
            "checkpoint": {"every_steps": 2, "keep_last": 3, "keep_every_steps": 8, "keep_best": 1},
            "faults": {"rollback_steps": ROLLBACK_STEPS, "window_steps": 8},
        }
        for section, changes in self.sections.items():
            sections[section] = {**sections.get(section, {}), **changes}
        return small_settings(folder, **sections)


_GPT2 = {"model": {"family": "gpt2", "dropout": 0.1}}
_BF16 = {"train": {"precision": "bf16"}}
_WAITING = {"checkpoint": {"asynchronous": False}}
_NAN = Poison((22, 61), float("nan"))
_JUMP = Poison((26, 62), 8.0)
VARIANTS = {
    "llama": Variant(),
    "llama, bf16, one checkpoint": Variant(
        {**_BF16, "checkpoint": {"keep_last": 1, "keep_every_steps": None, "keep_best": None}}
    ),
    "llama, document masking, waiting saves": Variant({"data": {"document_masking": True}, **_WAITING}),
    "gpt2, dropout": Variant({**_GPT2, "validation": {"every_steps": 2}}),
    "gpt2, dropout, bf16": Variant({**_GPT2, **_BF16, "checkpoint": {"every_steps": 4}}),
    "llama, non-finite loss, rollback": Variant({"faults": {"non_finite": "rollback"}}, poison=_NAN),
    "gpt2, dropout, bf16, spike, rollback": Variant({**_GPT2, **_BF16, "faults": {"spike": "rollback"}}, poison=_JUMP),
    "llama, non-finite loss, skip": Variant({"faults": {"non_finite": "skip"}, **_WAITING}, poison=_NAN),
    "2 ranks, data": Variant(world_size=2),
    "2 ranks, data, gpt2, dropout, rollback": Variant(
        {**_GPT2, "faults": {"non_finite": "rollback"}}, world_size=2, poison=_NAN
    ),
    "2 ranks, ZeRO 1, bf16": Variant({**_BF16, "parallel": {"zero_stage": 1}}, world_size=2),
    "2 ranks, ZeRO 2": Variant({"parallel": {"zero_stage": 2}}, world_size=2),
    "2 ranks, ZeRO 3": Variant({"parallel": {"zero_stage": 3}}, world_size=2),
    "2 ranks, tensor": Variant({"parallel": {"tensor": 2}}, world_size=2),
    "2 ranks, tensor, sequence parallel, gpt2, dropout, bf16": Variant(
        {**_GPT2, **_BF16, "parallel": {"tensor": 2, "sequence_parallel": True}}, world_size=2
    ),
}


def folder_name(variant: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in variant)
