"""A configuration as YAML, each key under its own documentation."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from .load import sections_in


def dump_yaml(config: BaseModel, *, comments: bool = True) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back to an equal object."""
    return "\n".join(_lines(config, 0, comments)) + "\n"


def _lines(section: BaseModel, indent: int, comments: bool) -> list[str]:
    lines = []
    pad = " " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if comments and field.description:
            text = " ".join(field.description.split())
            lines += textwrap.wrap(text, 110 - indent, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_lines(value, indent + 2, comments)]
        elif isinstance(value, (list, tuple)) and value and sections_in(field.annotation):
            lines.append(f"{pad}{name}:")
            for number, item in enumerate(value):
                first, *rest = _lines(item, indent + 4, comments and number == 0) or [f"{pad}    {{}}"]
                lines += [f"{pad}  -", first, *rest]
        else:
            dumped = yaml.safe_dump({name: plain(value)}, sort_keys=False, allow_unicode=True, width=100)
            lines += [pad + line for line in dumped.rstrip("\n").split("\n")]
    return lines


def plain(value: Any) -> Any:
    """Sections, tuples and paths as the dictionaries, lists and text that JSON and YAML know."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
