"""The base of every configuration section."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """One section of a run's configuration, declared in the room that uses it.

    A field is documented by the string literal under it (meaning, unit, what the default is for); a test refuses a
    field without one. Instances are frozen: what a run was started with is what its folder says.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _adapt(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty section (`run:` and nothing below it) is one with defaults; a switch is not a number."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return {}
        if isinstance(value, bool) and bool not in alternatives(annotation):
            # Python counts True as 1; a configuration that says `steps: yes` is a mistake.
            raise ValueError(f"true/false where {type_name(annotation)} is expected")
        return value


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def type_name(annotation: Any) -> str:
    """A type as a user would say it: `a whole number`, `one of cpu, cuda`."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    names = []
    for member in alternatives(annotation):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif origin in (list, tuple):
            names.append("a list")
        elif origin is dict or (isinstance(member, type) and issubclass(member, BaseModel)):
            names.append("a mapping of keys to values")
        else:
            names.append(plain.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(names)
