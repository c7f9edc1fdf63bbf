"""The configurations of norm removal that are shipped."""

from __future__ import annotations

from pathlib import Path

from harness.config import load_config
from harness.settings import Settings

FOLDER = Path(__file__).parents[2] / "configs" / "norm_removal"


def load_shipped(name: str) -> Settings:
    return load_config(Settings, FOLDER / f"{name}.yaml", ["norm_removal.enabled=true"])
