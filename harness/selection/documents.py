"""What a record of the pool is as a document: its text, its id, the group that it is counted under."""

from __future__ import annotations

from dataclasses import dataclass

from harness.text import Content, Unusable, fields_of_line, text_of

from .config import PoolSection


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
    group: str


def read_document(unit: Unit, pool: PoolSection) -> Document:
    """Text, id and group by the fields that the pool names."""
    fields = fields_of_line(unit.content, pool) if isinstance(unit.content, bytes) else unit.content
    named = fields if isinstance(fields, dict) else {}
    return Document(
        fields if isinstance(fields, Unusable) else _text_of(fields, pool),
        unit.id if pool.id_field is None else str(named.get(pool.id_field, "")),
        unit.group if pool.group_field is None else str(named.get(pool.group_field, "")),
    )


def _text_of(fields: Content, pool: PoolSection) -> str | Unusable:
    """The text of a record, which has to have an id too where the pool names one."""
    if isinstance(fields, dict) and pool.id_field is not None and fields.get(pool.id_field) is None:
        if pool.id_field in fields:
            return Unusable(f"{pool.id_field!r} (id_field) should name the document, found null")
        names = ", ".join(map(repr, list(fields)[:10])) or "none"
        return Unusable(f"has no key {pool.id_field!r} (id_field); its keys are {names}")
    return text_of(fields, pool)
