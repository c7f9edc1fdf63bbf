"""JSON files that other programs wrote, or will read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint import write_synced
from harness.config import HarnessError
from harness.disk import sha256_of


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


class Fields:
    """A configuration that another program wrote, with a line for what it should not say."""

    def __init__(self, config: Mapping[str, Any], label: str) -> None:
        self.config, self.label = config, label

    def get(self, key: str, default: Any = None) -> Any:
        """What is not said, or null, is the default."""
        value = self.config.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        if self.config.get(key) is None:
            raise HarnessError(f"{self.label}: {key} is missing")
        return self.config[key]

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; without a default it must be there."""
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refusal(key, "and not a number")
        return value

    def integer(self, key: str, default: int | None = None) -> Any:
        """A whole number; without a default it must be there."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.refusal(key, "and not a whole number")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping, empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refusal(key, "and not a mapping of keys to values")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts, empty where there is none."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refusal(key, "and not a list of texts")
        return value

    def expect(self, key: str, *allowed: Any, default: Any = None, why: str = "the decoder has no such thing") -> Any:
        """The value at `key`, which must be one of `allowed`; True is not 1."""
        value = self.get(key, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise self.refusal(key, f"and only {listed(allowed)} can be read: {why}")
        return value

    def refusal(self, key: str, why: str) -> HarnessError:
        return HarnessError(f"{self.label}: {key} is {self.config.get(key)!r}, {why}")


RECORD = "conversion.json"
"""What a conversion says of itself, in its target."""


def verify_record(folder: Path, share: tuple[int, int]) -> list[str]:
    """Files that are not those that a conversion wrote into the folder, a line each; none where it has no record.

    `share` (number, of how many) leaves out the files that other ranks read.
    """
    if not (folder / RECORD).is_file():
        return []
    files = read_json(folder / RECORD).get("files", {})
    problems = []
    for name in sorted(files)[share[0] :: share[1]]:
        try:
            same = sha256_of(folder / name) == files[name]["sha256"]
        except (OSError, KeyError, TypeError) as error:
            problems.append(f"{folder / name}: cannot be compared with {RECORD}: {error}")
            continue
        if not same:
            problems.append(
                f"{folder / name}: digest differs from {RECORD}: the file is damaged; if it was changed on purpose, "
                f"remove {RECORD}"
            )
    return problems


def listed(values: Sequence[Any]) -> str:
    """ "'a' or 'b'"."""
    return " or ".join(map(repr, values))


def write_json(file: Path, values: dict[str, Any]) -> None:
    """A new file, on the disk when this returns."""
    write_synced(file, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
