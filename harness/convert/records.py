"""JSON files that other programs wrote, or will read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.checkpoint import write_synced
from harness.config import HarnessError


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises HarnessError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HarnessError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HarnessError(f"{file}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise HarnessError(f"{file}: is not a mapping of keys to values")
    return values


def write_json(file: Path, values: dict[str, Any]) -> None:
    """A new file, on the disk when this returns."""
    write_synced(file, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
