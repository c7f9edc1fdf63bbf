"""Whether the results in a study's work folder were made with the settings at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import HarnessError

from .files import locked, write_json


def check_settings(folder: Path, now: dict[str, Any]) -> None:
    """Note `now`, what a finished run comes out of; HarnessError where something of it was another before. Keys that
    come new are no change."""
    file = folder / "settings.json"
    with locked(folder / "settings.lock"):
        then: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        changed = [name for name, value in then.items() if name in now and now[name] != value]
        if changed:
            raise HarnessError(
                f"{folder}: its results were made with another {changed[0]}; choose another folder, or put "
                f"{changed[0]} back"
            )
        write_json(file, then | now)
