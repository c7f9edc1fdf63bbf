"""Where text is: files, folders and globs, and what in a record is the text."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from harness.config import Section


class TextSource(Section):
    """Files with documents in them; part of the configuration of whatever reads text."""

    name: str
    """How messages call it."""

    source: tuple[str, ...] = ()
    """Files, folders and globs to read. .jsonl and .parquet hold a document a line or row; any other ending is plain
    UTF-8 text; .gz and .zst may follow. `~` and `${sysconfig:stdlib}` expand; relative to the working directory."""

    suffixes: tuple[str, ...] = ()
    """Endings of the files to take from a folder in `source`, such as [.py] or [.jsonl.zst]."""

    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the path below the folder, the whole path, and the file's name;
    `*` also crosses `/`."""

    text_field: str | tuple[str, ...] = "text"
    """Key (jsonl) or column (parquet) that holds a document's text; of several, [question, answer], the texts are
    joined by `joined_by`."""

    joined_by: str = "\n"
    """What stands between the texts of several text_fields."""

    separator: str | None = Field(None, min_length=1)
    """Text that separates documents inside a plain text file; null takes a whole file as one document."""

    @property
    def label(self) -> str:
        """How messages begin that speak of it."""
        return f"corpus {self.name!r}"

    @property
    def text_fields(self) -> tuple[str, ...]:
        """`text_field` as a list, whether it names one or several."""
        return (self.text_field,) if isinstance(self.text_field, str) else self.text_field

    @field_validator("source", "suffixes", "exclude", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("text_field")
    @classmethod
    def _check_text_field(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("names no field; say which key or column holds the text, such as text")
        return value

    @field_validator("suffixes")
    @classmethod
    def _check_suffixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for suffix in value:
            if not suffix.startswith("."):
                raise ValueError(f"{suffix!r} should begin with a dot, such as .py or .jsonl.zst")
        return value
