"""What every kind of study can do: say what it would cost, run what is missing, say how far it is, report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from harness.config import ConfigError, read_yaml

KINDS = ("ladder", "norm_removal", "selection", "tokenization")
"""Each a room of this one, with `plan`, `run`, `status` and `report`."""


def plan(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print what the study will do and cost, from its configuration alone."""
    _kind(config_path).plan(config_path, overrides)


def run(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Do what is missing. A study that was killed goes on with the same command."""
    _kind(config_path).run(config_path, overrides)


def status(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print how much is done and about how long the rest takes."""
    _kind(config_path).status(config_path, overrides)


def report(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Write report.json, report.md and report.html into the work folder, of what is done so far."""
    _kind(config_path).report(config_path, overrides)


def fit(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print what laws the finished runs follow, of a study that has such."""
    kind = _kind(config_path)
    if not hasattr(kind, "fit"):
        raise ConfigError(f"{config_path}: a study of kind {kind.__name__.rpartition('.')[2]} has no laws to fit")
    kind.fit(config_path, overrides)


def _kind(config_path: Path) -> ModuleType:
    kind = read_yaml(config_path, str(config_path)).get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{config_path}: kind: {kind!r} is no kind of study; known: {', '.join(KINDS)}")
    return import_module(f".{kind}", __package__)
