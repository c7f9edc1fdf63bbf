"""A run folder back in Python, finished or still being written."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .errors import RunError
from .files import read_lines
from .folder import CONFIG, ENVIRONMENT, EVENTS, METRICS


@dataclass(frozen=True)
class Run:
    """What a run has recorded so far."""

    path: Path
    config: dict[str, Any]
    """The resolved configuration of the newest start."""
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    """One record a step, in order."""
    events: list[dict[str, Any]]

    @cached_property
    def steps(self) -> np.ndarray:
        """The recorded steps, int64 of shape (records,)."""
        return np.array([record["step"] for record in self.metrics], dtype=np.int64)

    @property
    def columns(self) -> list[str]:
        """The names that any record has, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.metrics for name in record))

    def column(self, name: str) -> np.ndarray:
        """One metric over the steps, float64 of shape (records,), nan where a record lacks it.

        Raises RunError where no record has it.
        """
        if self.metrics and name not in self.columns:
            close = difflib.get_close_matches(name, self.columns, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.columns)}"
            raise RunError(f"{self.path / METRICS}: no record has {name!r}; {hint}")
        values = [record.get(name) for record in self.metrics]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def read(path: Path | str) -> Run:
    """The run in the folder `path`. Raises RunError where there is none, or where a file of it is damaged."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        runs = sorted(place.name for place in beside if (place / CONFIG).is_file())
        there = f"runs in {path.parent}: {', '.join(runs)}" if runs else f"there is no run in {path.parent}"
        raise RunError(f"{path}: is not a run folder, it has no {CONFIG}; {there}")
    return Run(
        path=path,
        config=_parse(path / CONFIG, yaml.safe_load),
        environment=_parse(path / ENVIRONMENT, json.loads),
        metrics=[record for _, record in read_lines(path / METRICS, "step")],
        events=[record for _, record in read_lines(path / EVENTS, "event")],
    )


def _parse(path: Path, parse: Any) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # a run that was killed while it started
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return values or {}
