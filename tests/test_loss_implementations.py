"""`harness train` with each implementation of the loss: the same curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import runs
from harness.train import train
from tests.kernels import interpreter
from tests.small_run import small_settings

STEPS = 16


def losses(folder: Path, name: str, **sections: Any) -> np.ndarray:
    settings = {"train": {"steps": STEPS}, "schedule": {"warmup_steps": 2}, "optimizer": {"learning_rate": 1e-2}}
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return runs.read(train(small_settings(folder, run={"name": name}, **settings)).folder).column("loss")


@pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))
def test_each_implementation_trains_the_same_model(tmp_path: Path) -> None:
    def curve(implementation: str, **train: Any) -> np.ndarray:
        name = "-".join(map(str, (implementation, *train.values())))
        loss = {"implementation": implementation, "z_loss": 1e-3}
        return losses(tmp_path, name, loss=loss, train={"precision": "bf16", **train})

    exact = curve("reference")
    assert exact[-5:].mean() < 0.85 * exact[:5].mean(), "the model learns"
    two_seeds = np.abs(curve("reference", seed=77) - exact).mean()
    for implementation in ("blocked", "triton"):
        off = np.abs(curve(implementation) - exact)
        assert off.mean() < 0.2 * two_seeds, f"{implementation}: {off.mean()}, beside {two_seeds} of two seeds"
