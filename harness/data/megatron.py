"""megatron-core's datasets, imported late and quietly: the import takes seconds and warns of what CPUs lack."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def import_indexed_dataset() -> ModuleType:
    """megatron.core.datasets.indexed_dataset."""
    return _import("indexed_dataset")


def import_gpt_dataset() -> ModuleType:
    """megatron.core.datasets.gpt_dataset."""
    return _import("gpt_dataset")


def import_helpers() -> ModuleType:
    """megatron.core.datasets.helpers, the compiled index builders."""
    return _import("helpers")


def _import(name: str) -> ModuleType:
    with quiet_megatron(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{name}")


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Hold back megatron's own log lines below an error; everybody else's still pass."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
