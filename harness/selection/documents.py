"""What a record of the pool is as a document: its text, its id, the group that it is counted under."""

from __future__ import annotations

from dataclasses import dataclass

from harness.text import Content, Unusable, fields_of_line, text_of

from .config import PoolSection

NO_GROUP = "(none)"
"""What a document is counted under that does not say its group."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One record on its way to a worker: what it holds, and what it is called where it does not say."""

    content: Content
    id: str
    group: str


@dataclass(frozen=True, slots=True)
class Document:
    """A unit as it is scored and reported."""

    text: str | Unusable
    id: str
    """Its own, or what it is called without one."""
    has_id: bool
    """Whether the id is its own."""
    group: str


def read_document(unit: Unit, pool: PoolSection) -> Document:
    """Text, id and group by the fields that the pool names. A document without an id, or with null, is called by its
    file and place; without a group, or with a blank one, it is counted under NO_GROUP."""
    fields = fields_of_line(unit.content, pool) if isinstance(unit.content, bytes) else unit.content
    named = fields if isinstance(fields, dict) else {}
    own = None if pool.id_field is None else named.get(pool.id_field)
    text = fields if isinstance(fields, Unusable) else text_of(fields, pool)
    group = unit.group if pool.group_field is None else _group_of(named.get(pool.group_field))
    return Document(text, unit.id if own is None else str(own), own is not None, group)


def _group_of(value: object) -> str:
    name = "" if value is None else str(value)
    return name if name.strip() else NO_GROUP
