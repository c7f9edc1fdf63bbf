"""The tokenizer that a budget counts by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import HarnessError

if TYPE_CHECKING:
    from harness.data import Tokenizer


def open_tokenizer(place: str) -> Tokenizer:
    """A tokenizer folder's, or that of a .model or tokenizer.json. HarnessError where there is none."""
    from harness.data import TokenizerSection, load_tokenizer
    from harness.data import open_tokenizer as open_file

    path = Path(place).expanduser()
    if path.is_dir():
        return load_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    if path.suffix == ".model":
        return open_file(TokenizerSection(kind="sentencepiece", path=str(path)))
    if path.suffix == ".json":
        return open_file(TokenizerSection(kind="huggingface", path=str(path)))
    raise HarnessError(
        f"budget.tokenizer: {place}: no tokenizer; give a folder with one (data.folder/tokenizer), a .model or a "
        "tokenizer.json"
    )


def stamp_of(place: str) -> list[Any]:
    """What differs where another tokenizer lies at a place: its files' names, sizes and times."""
    path = Path(place).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stamps = [(file, file.stat()) for file in files if file.exists()]
    return [place, *([file.name, stamp.st_size, stamp.st_mtime_ns] for file, stamp in stamps)]
