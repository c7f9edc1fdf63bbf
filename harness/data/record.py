"""prepared.json: what a tokenized corpus was made from, and whether that is still what the configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import HarnessError
from harness.disk import sha256_of
from harness.text import SourceFile

from .config import CorpusSection, DataSection

RECORD = "prepared.json"
FORMAT = 1
"""Raised when the same input would give other tokens or another split."""


def text_settings(config: DataSection, corpus: CorpusSection) -> dict[str, Any]:
    """The settings, sources and tokenizer aside, that decide which documents stand in which split."""
    if corpus.selection is not None:  # its record says how it is read, and may be gone when nothing is to be read
        text: dict[str, Any] = {"text_field": "the selection's"}
    elif len(corpus.text_fields) > 1:
        text = {"text_field": list(corpus.text_fields), "joined_by": corpus.joined_by, "separator": corpus.separator}
    else:
        text = {"text_field": corpus.text_fields[0], "separator": corpus.separator}
    return {
        **text,
        "max_document_bytes": corpus.max_document_bytes,
        "validation_share": config.validation_share,
        "test_share": config.test_share,
    }


def describe_source(file: SourceFile) -> dict[str, Any]:
    """A source file as the record keeps it, with the digest of its content."""
    return {
        "path": str(file.path),
        "bytes": file.size,
        "modified_ns": file.modified_ns,
        "sha256": digest_file(file.path),
    }


def digest_file(path: Path) -> str | None:
    """sha256 of a file's bytes; None where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a corpus folder; None where there is no folder. Raises HarnessError for a broken one."""
    file = folder / RECORD
    if not folder.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["format"]
        for key in ("tokenizer", "settings", "on_error", "skipped", "sources", "splits"):
            record[key]
    except FileNotFoundError:
        raise HarnessError(f"{file}: no such file, so {folder} is not a prepared corpus; move or delete it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{file}: is damaged ({error!r}); delete {folder} and tokenize again") from None
    if version != FORMAT:
        raise HarnessError(
            f"{file}: has format {version}, this version reads {FORMAT}; delete {folder} and tokenize again"
        )
    loaded: dict[str, Any] = record
    return loaded


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The counterpart of read_record."""
    text = json.dumps({"format": FORMAT, **record}, indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def find_difference(
    record: dict[str, Any],
    config: DataSection,
    corpus: CorpusSection,
    fingerprint: str,
    files: list[SourceFile] | None,
) -> str | None:
    """In words, the first thing in which a prepared corpus differs from the configuration; None where nothing does.

    `files` are the sources as they are now; None leaves them out of the comparison.
    """
    if record["tokenizer"] != fingerprint:
        return "its tokenizer was another one"
    difference = compare_settings(record["settings"], text_settings(config, corpus))
    if difference is not None:
        return difference
    if config.on_error == "stop" and record["skipped"]["count"]:
        return f"on_error was skip, and {record['skipped']['count']} records were left out; it is stop now"
    return None if files is None else _compare_sources(record["sources"], files)


def compare_settings(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In words, the first key in which two mappings differ."""
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key):
            return f"{key} was {json.dumps(then.get(key))}, it is {json.dumps(now.get(key))} now"
    return None


def _compare_sources(then: list[dict[str, Any]], now: list[SourceFile]) -> str | None:
    if len(then) != len(now):
        old, new = {item["path"] for item in then}, {str(file.path) for file in now}
        example = next((f", {name} is new" for name in sorted(new - old)), None)
        example = example or next((f", {name} is gone" for name in sorted(old - new)), "")
        return f"it was made from {len(then)} source files, there are {len(now)} now{example}"
    for item, file in zip(then, now, strict=True):
        if item["bytes"] != file.size:
            return f"the source {file.path} has changed"
        untouched = item["path"] == str(file.path) and item["modified_ns"] == file.modified_ns
        if not untouched and item["sha256"] != digest_file(file.path):  # a copy or a checkout only changes the time
            return f"the source {file.path} has changed"
    return None
