"""YAML and command line in, a validated configuration out."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .errors import ConfigError
from .section import alternatives, type_name

ConfigType = TypeVar("ConfigType", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a plain name")
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise ConfigError(f"line {line}: key {key_node.value!r} is given twice; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(
    config_type: type[ConfigType],
    file: Path | dict[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    label: str | None = None,
) -> ConfigType:
    """Defaults, then `file` (or what would stand in one), then `overrides` (`section.key=value`), validated.

    `label` is how messages name the file. Raises ConfigError with one line a problem.
    """
    label = label or (str(file) if isinstance(file, Path) else "defaults")
    values = read_yaml(file, label) if isinstance(file, Path) else copy.deepcopy(file or {})
    from_command_line = set()
    for override in overrides:
        path, value = parse_override(override, config_type)
        _set_at(values, path, value, override)
        from_command_line.add(".".join(path))
    return validate(config_type, values, label, from_command_line)


def validate(
    config_type: type[ConfigType], values: dict[str, Any], label: str, from_command_line: Iterable[str] = ()
) -> ConfigType:
    """`values` as a `config_type`; every problem becomes one line of a ConfigError."""
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        lines = [
            _line(config_type, problem, label, set(from_command_line)) for problem in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def read_yaml(file: Path, label: str) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError where there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{label}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, a bad !!int
        raise ConfigError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{label}: expected sections with keys (`section:` and below it `key: value`)")
    return values


def parse_override(override: str, config_type: type[BaseModel]) -> tuple[list[str], Any]:
    """`section.key=value` as its path and value: read as YAML, but where text is wanted taken as it stands.

    A prompt may hold what YAML would make a mapping or a comment of; in quotes it may hold escapes such as "\\n".
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"command line: {override!r} is not of the form section.key=value")
    path = key.strip().split(".")
    section = _section_at(config_type, path[:-1])
    wants_text = section is not None and path[-1] in section.model_fields and _is_text(section, path[-1])
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if wants_text and not quoted and text not in ("null", "~", ""):
        return path, text
    try:
        return path, yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"command line: {override!r}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"command line: {override!r}: the value is not valid YAML: {reason}") from None


def _is_text(section: type[BaseModel], key: str) -> bool:
    """Whether a field holds text, or text or null."""
    return set(alternatives(section.model_fields[key].annotation)) <= {str, type(None)}


def _set_at(values: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    """Put `value` at `path`; a number in the path is a position in a list."""
    place: Any = values
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                where = ".".join(path[:depth])
                raise ConfigError(
                    f"command line: {override!r}: {where} is a list of {len(place)}; number its items from 0"
                )
            if last:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif isinstance(place, dict):
            if last:
                place[part] = value
            else:
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
        else:
            raise ConfigError(f"command line: {override!r}: {'.'.join(path[:depth])} is a value and has no keys")


def _line(config_type: type[BaseModel], problem: ErrorDetails, label: str, from_command_line: set[str]) -> str:
    """One problem as one line: where it stands, which key, what would be right."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    source = _source(key, label, from_command_line)
    kind, given = problem["type"], "null" if problem["input"] is None else repr(problem["input"])
    if kind == "extra_forbidden":
        message = f"unknown key; {_nearest(config_type, location)}"
    elif kind == "missing":
        message = "is required and not set"
    elif kind in ("value_error", "assertion_error"):
        message = str(problem["ctx"]["error"])
    elif kind == "literal_error":
        choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(str(problem["input"]), choices, 1)
        message = f"{given} is not one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    elif kind.endswith(("_type", "_parsing", "_from_float")):
        message = f"expected {_expected(config_type, location, problem['msg'])}, got {given}"
    else:
        message = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {given}"
    return f"{source}: {key}: {message}" if key else f"{source}: {message}"


def _source(key: str, label: str, from_command_line: set[str]) -> str:
    """Where the value at `key` came from: the file, the command line, or (a section with parts of each) both."""
    if any(key == given or key.startswith(given + ".") for given in from_command_line):
        return "command line"
    if any(not key or given.startswith(key + ".") for given in from_command_line):
        return f"{label} and command line"
    return label


def _section_at(config_type: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The section class that `location` points into, or None where the path leaves the declared sections."""
    current: Any = config_type
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        if part.isdigit():
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        current = next(iter(sections_in(field.annotation)), None)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes that a field's type mentions: itself, or inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for member in getattr(annotation, "__args__", ()) for section in sections_in(member)]


def _expected(config_type: type[BaseModel], location: list[str], message: str) -> str:
    section = _section_at(config_type, location[:-1]) if location else None
    if section is not None and location[-1] in section.model_fields:
        return type_name(section.model_fields[location[-1]].annotation)
    if _section_at(config_type, location) is not None:
        return "a mapping of keys to values"
    return message


def _nearest(config_type: type[BaseModel], location: list[str]) -> str:
    """The valid name nearest to an unknown one, in the same section or another; else the names that are valid here."""
    section = _section_at(config_type, location[:-1]) or config_type
    close = difflib.get_close_matches(location[-1], section.model_fields, 1, cutoff=0.7)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])}?"
    names = {name.rpartition(".")[2]: name for name in reversed(list(field_names(config_type)))}
    close = difflib.get_close_matches(location[-1], names, 1, cutoff=0.7)
    if close:
        return f"did you mean {names[close[0]]}?"
    return f"valid here: {', '.join(section.model_fields)}"


def field_names(config_type: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Every dotted key of a configuration, sections before their contents."""
    for name, field in config_type.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation):
            yield from field_names(section, f"{prefix}{name}.")
