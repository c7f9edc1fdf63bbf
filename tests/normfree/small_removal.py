"""A norm removal small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.settings import Settings
from tests.small_run import small_settings

TIMES = {
    "mlp": {"first": 3, "gap": 1},
    "qk": {"first": 6, "gap": 2},
    "v": {"first": 7, "gap": 3},
    "q_norm": {"first": 5},
    "k_norm": {"first": 5, "gap": 2},
    "final": {"first": 12},
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 2},
    "llama": {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "qk_norm": True},
}


def small_removal(folder: Path, family: str = "gpt2", **sections: dict[str, Any]) -> Settings:
    """14 steps in which all norms of a two-layer model go, from new weights."""
    removal = {
        "enabled": True,
        "times": TIMES,
        "average_steps": 4,
        "auxiliary": {"weight": 0.1},
        **sections.pop("norm_removal", {}),
    }
    defaults: dict[str, dict[str, Any]] = {
        "model": MODELS[family],
        "train": {"steps": 14, "global_batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "checkpoint": {"every_steps": 1, "keep_last": None},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    return small_settings(folder, norm_removal=removal, **merged)
