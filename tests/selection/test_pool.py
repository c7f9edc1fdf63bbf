"""Shards: which files are scored together, and that it does not show."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import validate
from harness.selection import select
from harness.selection.config import PoolSection
from harness.selection.pool import Pool
from tests.selection.pools import (
    QUIET,
    draw_pool,
    draw_targets,
    files_below,
    line_of,
    result_of,
    settings_of,
    write_lines,
    write_texts,
)

SUFFIXES = [".jsonl", ".gz", ".zst", ".txt", ".parquet"]


def write_files(r: random.Random, folder: Path) -> list[str]:
    """Files of every format, of which two end in the middle; the targets."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    targets = draw_targets(r)
    folder.mkdir()
    for number in range(24):
        documents = draw_pool(r, targets, r.randint(1, 12))
        ending = r.choice([".jsonl", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
        path = folder / f"{number:02d}{ending}"
        if ending == ".txt":
            path.write_bytes("<end>".join(each.text for each in documents).encode())
        elif ending == ".parquet":
            columns = {"id": [each.id for each in documents], "text": [each.text for each in documents]}
            parquet.write_table(pyarrow.table(columns), path)
        else:
            write_lines(path, [line_of(r, each) for each in documents])
    for number in (9, 16):
        lines = [line_of(r, each) for each in draw_pool(r, targets, 30)]
        path = write_lines(folder / f"{number:02d}-cut.jsonl", lines)
        packed = gzip.compress(path.read_bytes())
        path.unlink()
        (folder / f"{path.name}.gz").write_bytes(packed[: len(packed) // 2])
    return targets


def section_of(folder: Path) -> dict[str, Any]:
    return {"source": [str(folder)], "suffixes": SUFFIXES, "separator": "<end>", "on_error": "skip"}


def test_which_files_are_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random()
    sizes: dict[str, int] = {}
    for number in range(200):
        name = f"{number:03d}{r.choice(['.jsonl'] * 6 + ['.parquet', '.txt'])}"
        sizes[name] = r.choice([r.randint(1, 40), r.randint(1, 150)])
        (tmp_path / name).write_bytes(b" " * sizes[name])
    monkeypatch.setattr("harness.selection.pool.SHARD_BYTES", 100)
    monkeypatch.setattr("harness.selection.pool.FILES_A_SHARD", 7)
    pool = Pool(validate(PoolSection, section_of(tmp_path), "test"))
    shards = [[file.path.name for file in shard.files] for shard in pool.shards]
    texts = [name for name in sorted(sizes) if name.endswith(".txt")]
    others = [name for name in sorted(sizes) if not name.endswith(".txt")]
    assert [name for names in shards for name in names] == others + texts
    assert [shard.number for shard in pool.shards] == list(range(len(shards)))
    for shard, after in zip(shards, [*shards[1:], []], strict=True):
        kinds = {name.split(".")[1] for name in shard}
        size = sum(sizes[name] for name in shard)
        assert len(kinds) == 1
        assert len(shard) <= 7
        assert kinds == {"txt"} or len(shard) == 1 or size <= 100
        if after and after[0].split(".")[1] in kinds and len(shard) < 7:
            assert kinds != {"txt"}
            assert size + sizes[after[0]] > 100, "one more would have been too many"


def test_any_rows_of_any_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random()
    write_files(r, tmp_path / "in")
    for name in ("98", "99"):  # two small neighbours, which the drawn files need not have
        (tmp_path / "in" / f"{name}.jsonl").write_text('{"id": "small", "text": "a small one"}\n')
    monkeypatch.setattr("harness.selection.pool.SHARD_BYTES", 6000)
    pool = Pool(validate(PoolSection, section_of(tmp_path / "in"), "test"))
    assert any(len(shard.files) > 1 for shard in pool.shards)
    for shard in pool.shards:
        everything = list(pool.records(shard))
        assert [record.row for record in everything] == list(range(len(everything)))
        for share in (0, 0.1, 0.5, 1):
            wanted = np.array([r.random() < share for _ in everything], dtype=bool)
            assert list(pool.records(shard, wanted)) == [everything[row] for row in np.flatnonzero(wanted)]


def test_which_files_are_scored_together_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random()
    targets = write_texts(tmp_path / "targets.jsonl", write_files(r, tmp_path / "in"))
    results = []
    for size in (0, 4000, 1 << 24):
        (tmp_path / f"{size}").mkdir()
        monkeypatch.chdir(tmp_path / f"{size}")
        monkeypatch.setattr("harness.selection.pool.SHARD_BYTES", size)
        sections = {"budget": {"documents": 30}, "output": {"rejected": True}, "racing": {"exact": True}}
        summary = select(settings_of(section_of(tmp_path / "in"), targets, "out", **sections), progress=QUIET)
        assert summary["chosen"]["documents"] == 30
        assert sum(summary["pool"]["skipped"].values()) == 2
        written = result_of(Path("out")) | files_below(Path("out/rejected"))
        results.append({name: data for name, data in written.items() if not name.startswith("scores-")})
    assert results[0] == results[1] == results[2]
