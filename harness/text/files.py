"""From `source` entries to the list of files to read."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from harness.config import HarnessError

from .source import TextSource

UNREADABLE = {
    ".json": "one JSON value a line is read as .jsonl; write it so",
    ".bz2": "recompress it with gzip or zstd",
    ".xz": "recompress it with gzip or zstd",
    ".zip": "unpack it and name the folder",
    ".tar": "unpack it and name the folder",
    ".tgz": "unpack it and name the folder",
    ".pdf": "extract its text first",
    ".docx": "extract its text first",
    ".arrow": "write it as .parquet",
    ".bin": "a Megatron dataset is named by `indexed`, its path without the ending",
    ".idx": "a Megatron dataset is named by `indexed`, its path without the ending",
}


@dataclass(frozen=True)
class SourceFile:
    """A file to read: `format` says how, `size` is in bytes as it lies on disk."""

    path: Path
    format: Literal["text", "jsonl", "parquet"]
    compression: Literal["none", "gzip", "zstd"]
    size: int
    modified_ns: int

    @property
    def estimated_text_bytes(self) -> int:
        """Roughly the text in it: compressed text is a quarter of its size."""
        return self.size * (1 if self.compression == "none" and self.format != "parquet" else 4)


def find_files(source: TextSource) -> list[SourceFile]:
    """The files of a source, each once, sorted by path. Raises HarnessError where an entry leads to none."""
    paths: set[str] = set()
    for entry in source.source:
        paths.update(_files_of_entry(source, entry))
    if not paths:
        raise HarnessError(f"{source.label}: `exclude` leaves no file of {', '.join(source.source)}")
    return [_describe(source, path) for path in sorted(paths)]


def expand(entry: str, label: str) -> str:
    """`~` and `${sysconfig:NAME}` replaced."""

    def look_up(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(":")
        if kind != "sysconfig" or name not in sysconfig.get_path_names():
            known = ", ".join(f"sysconfig:{name}" for name in sysconfig.get_path_names())
            raise HarnessError(f"{label}: source: {match[0]} is not known; one of {known}")
        return sysconfig.get_path(name)

    return os.path.expanduser(re.sub(r"\$\{([^}]*)\}", look_up, entry))


def _files_of_entry(source: TextSource, entry: str) -> list[str]:
    where = f"{source.label}: source {entry!r}"
    path = expand(entry, source.label)
    if os.path.isdir(path):
        if not source.suffixes:
            raise HarnessError(f"{where} is a folder: set `suffixes` to the endings to read, such as [.txt]")
        below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        found = [file for file in below if file.endswith(source.suffixes)]
        if not found:
            raise HarnessError(f"{where}: no file below this folder ends in {' or '.join(source.suffixes)}")
        return [file for file in found if not _is_excluded(source, file, os.path.relpath(file, path))]
    if os.path.exists(path):
        return [] if _is_excluded(source, path, path) else [path]
    if glob.has_magic(path):
        found = [file for file in glob.glob(path, recursive=True, include_hidden=True) if os.path.isfile(file)]
        if not found:
            raise HarnessError(f"{where}: no file matches this glob (from {os.getcwd()})")
        return [file for file in found if not _is_excluded(source, file, file)]
    raise HarnessError(f"{where}: no such file or folder" + ("" if os.path.isabs(path) else f" (from {os.getcwd()})"))


def _is_excluded(source: TextSource, path: str, relative: str) -> bool:
    names = [name.replace(os.sep, "/") for name in (relative, path, os.path.basename(path))]
    return any(fnmatchcase(name, pattern) for pattern in source.exclude for name in names)


def _describe(source: TextSource, name: str) -> SourceFile:
    path = Path(name)
    compression: Literal["none", "gzip", "zstd"] = "none"
    inner = path
    if path.suffix == ".gz":
        compression, inner = "gzip", path.with_suffix("")
    elif path.suffix == ".zst":
        compression, inner = "zstd", path.with_suffix("")
    ending = inner.suffix.lower()
    if ending in UNREADABLE:
        raise HarnessError(f"{source.label}: {path}: {ending} files are not read: {UNREADABLE[ending]}")
    if ending == ".parquet" and compression != "none":
        raise HarnessError(f"{source.label}: {path}: parquet compresses its own columns; unpack the file")
    file_format: Literal["text", "jsonl", "parquet"] = "text"
    if ending in (".jsonl", ".ndjson"):
        file_format = "jsonl"
    elif ending == ".parquet":
        file_format = "parquet"
    try:
        status = path.stat()
    except OSError as error:
        raise HarnessError(f"{source.label}: {path}: cannot be read: {error.strerror or error}") from None
    return SourceFile(path, file_format, compression, status.st_size, status.st_mtime_ns)
