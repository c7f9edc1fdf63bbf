"""Which files a `source` entry leads to."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from harness.data import CorpusSection
from harness.text.files import expand, find_files


def names(folder: Path, **fields: object) -> list[str]:
    corpus = CorpusSection.model_validate({"name": "x", **fields})
    return [str(file.path.relative_to(folder)) for file in find_files(corpus)]


def test_folders_globs_and_exclusions(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "a.pyc", "test/t.py", "pkg/c.py", "pkg/test/d.py", "pkg/odd[1].py", ".hidden/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = [".hidden/e.py", "a.py", "b.py", "pkg/c.py", "pkg/odd[1].py", "pkg/test/d.py", "test/t.py"]
    assert names(tmp_path, source=str(tmp_path), suffixes=[".py"]) == everything
    assert names(tmp_path, source=f"{tmp_path}/**/*.py") == everything
    assert names(tmp_path, source=str(tmp_path), suffixes=".py", exclude=["test/*", "*/test/*", ".hidden/*"]) == [
        "a.py", "b.py", "pkg/c.py", "pkg/odd[1].py"
    ]  # fmt: skip
    assert names(tmp_path, source=str(tmp_path), suffixes=".py", exclude="?.py") == ["pkg/odd[1].py"]
    # A name that looks like a glob, a file named twice.
    twice = [f"{tmp_path}/pkg/odd[1].py", f"{tmp_path}/b.py", f"{tmp_path}/?.py"]
    assert names(tmp_path, source=twice) == ["a.py", "b.py", "pkg/odd[1].py"]


def test_formats_by_ending(tmp_path: Path) -> None:
    endings = {
        "a.txt": ("text", "none"),
        "b.md.gz": ("text", "gzip"),
        "c": ("text", "none"),
        "d.jsonl": ("jsonl", "none"),
        "e.JSONL.gz": ("jsonl", "gzip"),
        "f.ndjson.zst": ("jsonl", "zstd"),
        "g.parquet": ("parquet", "none"),
    }
    for name in endings:
        (tmp_path / name).write_bytes(b"1234")
    found = find_files(CorpusSection(name="x", source=(f"{tmp_path}/*",)))
    assert {file.path.name: (file.format, file.compression) for file in found} == endings
    assert {file.size for file in found} == {4}


def test_expansion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert expand("${sysconfig:stdlib}/json", "x") == sysconfig.get_path("stdlib") + "/json"
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand("~/text", "x") == "/home/someone/text"
    # A relative path is relative to the working directory.
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in find_files(CorpusSection(name="x", source=("a.txt",)))] == [Path("a.txt")]
    package = CorpusSection(name="x", source=("${sysconfig:stdlib}/json",), suffixes=(".py",))
    assert f"{sysconfig.get_path('stdlib')}/json/decoder.py" in [str(file.path) for file in find_files(package)]
