"""Records that rounds keep: what is read of them is what the pool has, whatever became of the files meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import validate
from harness.selection import select
from harness.selection.config import PoolSection
from harness.selection.job import Job
from harness.selection.kept import KeptRecords, keep
from harness.selection.pool import Pool, PoolRecord, batches
from harness.selection.work import WRITING, WorkFolder
from tests.selection.pools import (
    QUIET,
    Document,
    code,
    draw_pool,
    draw_targets,
    line_of,
    result_of,
    settings_of,
    words,
    write_lines,
    write_texts,
)

PART_ROWS = 20


@pytest.fixture(autouse=True)
def _keep_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.selection.kept.KEPT_SHARE", 9.0)
    monkeypatch.setattr("harness.selection.kept.SMALL_SHARD_BYTES", 0)
    monkeypatch.setattr("harness.selection.pool.BATCH_BYTES", 3000)
    for module in ("pool", "work"):
        monkeypatch.setattr(f"harness.selection.{module}.PART_ROWS", PART_ROWS)


class Reads:
    """Counts how often shards of the pool itself are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        records = Pool.records

        def counted(pool: Pool, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            return records(pool, *arguments, **options)

        monkeypatch.setattr(Pool, "records", counted)


def write_jsonl(r: random.Random, folder: Path, documents: list[Document]) -> dict[str, Any]:
    file = write_lines(folder / f"a.jsonl{r.choice(['', '.gz', '.zst'])}", [line_of(r, each) for each in documents])
    return {"source": [str(file)], "id_field": "id", "group_field": "source"}


def write_parquet(r: random.Random, folder: Path, documents: list[Document]) -> dict[str, Any]:
    """Whose ids are numbers."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts, groups = [each.text for each in documents], [each.source for each in documents]
    folder.mkdir(exist_ok=True)
    columns = {"id": [*range(len(documents))], "text": texts, "source": groups}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return {"source": [str(folder / "a.parquet")], "id_field": "id", "group_field": "source"}


def write_parts(r: random.Random, folder: Path, documents: list[Document]) -> dict[str, Any]:
    """Text files with several documents each."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(documents), 7):
        text = "<|end|>".join(each.text for each in documents[start : start + 7])
        (folder / f"{start:03d}.txt").write_bytes(text.encode())
    return {"source": [str(folder)], "suffixes": [".txt"], "separator": "<|end|>"}


WRITERS = [write_jsonl, write_parquet, write_parts]


class Shard:
    """A shard in a folder, what is in it, and a working folder."""

    def __init__(self, folder: Path, write: Callable[..., dict[str, Any]]) -> None:
        self.r = random.Random()
        documents = draw_pool(self.r, draw_targets(self.r), self.r.randint(60, 100))
        self.pool = Pool(validate(PoolSection, write(self.r, folder / "in", documents), "test"))
        [self.shard] = self.pool.shards
        self.work = WorkFolder(folder / "work", {}, {})
        self.all = list(self.pool.records(self.shard))
        self.rounds = 0

    def draw(self, share: float) -> np.ndarray:
        """At least one record."""
        drawn = np.array([self.r.random() < share for _ in self.all])
        drawn[self.r.randrange(len(drawn))] |= not drawn.any()
        return drawn

    def kept(self) -> KeptRecords:
        return KeptRecords(self.pool, self.work, self.shard)

    def keep(self, wanted: np.ndarray) -> list[Path]:
        """As a round does; the files."""
        name = f"round-{self.rounds:03d}"
        self.rounds += 1
        self.work.plan_round(name, "score", {0: wanted})
        found = batches(self.pool.records(self.shard, wanted), set())
        handed_on = [record for batch in keep(found, self.shard, self.work, name) for record in batch.records]
        assert [record.row for record in handed_on] == np.flatnonzero(wanted).tolist()
        return sorted((self.work.path / name).glob("kept/shard-00000/part-*.zst"))

    def read(self, wanted: np.ndarray) -> list[PoolRecord]:
        return list(self.kept().read(wanted))

    def true(self, wanted: np.ndarray) -> list[PoolRecord]:
        return [record for record in self.all if wanted[record.row]]


def as_text(record: PoolRecord) -> tuple[Any, ...]:
    """A row of parquet is kept as text, and nothing asks for more."""
    content = record.content
    if isinstance(content, dict):
        content = json.dumps({name: str(value) for name, value in content.items()})
    return record.row, record.file, record.number, content


def same(found: list[PoolRecord], expected: list[PoolRecord]) -> bool:
    return list(map(as_text, found)) == list(map(as_text, expected))


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_kept_is_what_the_pool_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., dict[str, Any]]
) -> None:
    shard = Shard(tmp_path, write)
    rounds = [shard.draw(share) for share in (0.3, 0.2, 0.05, 0.3)]
    for wanted in rounds:
        assert shard.keep(wanted)
    reads = Reads(monkeypatch)
    everything = np.logical_or.reduce(rounds)
    for wanted in (everything, rounds[0], rounds[2], shard.draw(0.5) & everything, everything & False):
        assert shard.kept().cover(wanted)
        assert same(shard.read(wanted), shard.true(wanted))
    assert reads.count == 0
    missing = np.flatnonzero(~everything)[[0]]
    wanted = rounds[1].copy()
    wanted[missing] = True
    assert not shard.kept().cover(wanted)
    assert same(shard.read(wanted), shard.true(wanted))
    assert reads.count == 1


def damage(r: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    kind = r.random()
    if kind < 0.2 or not data:
        file.unlink()
    elif kind < 0.6:
        file.write_bytes(data[: r.randrange(len(data))])
    else:
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        file.write_bytes(data)


@pytest.mark.parametrize("write", WRITERS)
def test_any_damage_is_seen_before_anything_false_is_read(tmp_path: Path, write: Callable[..., dict[str, Any]]) -> None:
    shard = Shard(tmp_path, write)
    rounds = [shard.draw(0.4), shard.draw(0.3)]
    files = [file for wanted in rounds for file in shard.keep(wanted)]
    whole = {file: file.read_bytes() for file in files}
    everything = rounds[0] | rounds[1]
    for _ in range(60):
        damage(shard.r, shard.r.choice(files))
        assert same(shard.read(everything), shard.true(everything))
        assert all(file.read_bytes() == whole[file] for file in files if file.exists()), "what was damaged is gone"
        for file, data in whole.items():
            file.write_bytes(data)


def test_a_file_that_lacks_a_block_or_is_another_round_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = Shard(tmp_path, write_jsonl)
    wanted = np.ones(len(shard.all), dtype=bool)
    first, second, *_ = shard.keep(wanted)
    data = first.read_bytes()
    size = 12 + int.from_bytes(data[:8], "little")
    assert len(data) > size, "of several blocks"
    for broken in (data[size:], data[:size], b"", second.read_bytes()):
        first.write_bytes(broken)
        caplog.clear()
        assert same(shard.read(wanted), shard.true(wanted))
        [line] = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{first}: is damaged (")
        assert line.endswith("); the pool is read instead")
        assert not first.exists()


def test_how_much_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.selection.kept.KEPT_SHARE", 0.25)
    shard = Shard(tmp_path, write_jsonl)
    count = len(shard.all)
    wanted = np.zeros(count, dtype=bool)
    wanted[: count // 8] = True
    other = np.zeros(count, dtype=bool)
    other[-(count // 4 - count // 8) :] = True
    assert shard.kept().should_grow(wanted)
    shard.keep(wanted)
    assert not shard.kept().should_grow(wanted), "it is there"
    assert shard.kept().should_grow(other)
    other[count // 8] = True
    assert not shard.kept().should_grow(other), "one more than a quarter"
    other[count // 8] = False
    monkeypatch.setattr("harness.selection.kept.SMALL_SHARD_BYTES", shard.shard.bytes_on_disk + 1)
    assert not shard.kept().should_grow(other)


@pytest.mark.parametrize("blocked", [True, False])
def test_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, blocked: bool
) -> None:
    """The folder cannot be made, or its disk is full."""
    shard = Shard(tmp_path, write_jsonl)
    name = "unlucky" if blocked else "full"
    if blocked:
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "full").symlink_to("/dev/full")
        monkeypatch.setattr("harness.selection.kept.temporary_name", lambda: "full")
    monkeypatch.setattr(WorkFolder, "kept_file", lambda *of: tmp_path / name / "part-0000.zst")
    first = np.arange(len(shard.all)) < PART_ROWS  # one part, so one warning
    assert shard.keep(first) == []
    [line] = [record.getMessage() for record in caplog.records]
    reason = "File exists" if blocked else "No space left on device"
    assert line == f"{tmp_path}/{name}/part-0000.zst: is not kept ({reason}); later rounds read the pool"
    assert blocked or list((tmp_path / name).iterdir()) == []


def test_what_is_not_whole_does_not_count(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write_jsonl)
    wanted = np.ones(len(shard.all), dtype=bool)
    shard.work.plan_round("round-000", "score", {0: wanted})
    begun = keep(batches(iter(shard.all), set()), shard.shard, shard.work, "round-000")
    while next(begun).part == 0:
        pass
    folder = tmp_path / "work/round-000/kept/shard-00000"
    assert len(list(folder.glob(f"{WRITING}*"))) == 1
    (folder / f"{WRITING}by-a-killed-one").touch()
    begun.close()
    assert [file.name for file in folder.glob("part*")] == ["part-0000.zst"]
    assert not shard.kept().cover(wanted)
    assert shard.kept().cover(np.arange(len(wanted)) < PART_ROWS)
    shard.keep(wanted)
    list(keep(batches(iter(shard.all), set()), shard.shard, shard.work, "round-000"))
    assert not list(folder.glob(f"{WRITING}*"))
    assert shard.kept().cover(wanted)


# In a selection.


def disturb(monkeypatch: pytest.MonkeyPatch, disturbed: Callable[[Path], None]) -> None:
    """Before every pass and before the writing."""
    run, write = Job.run_pass, Job.write_shard

    def run_pass(job: Job, *arguments: Any) -> None:
        disturbed(job.work.path)
        run(job, *arguments)

    def write_shard(job: Job, *arguments: Any) -> None:
        disturbed(job.work.path)
        write(job, *arguments)

    monkeypatch.setattr(Job, "run_pass", run_pass)
    monkeypatch.setattr(Job, "write_shard", write_shard)


class Selecting:
    """A pool that is raced for over several rounds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., dict[str, Any]]) -> None:
        monkeypatch.setattr("harness.selection.choice.FEW", 10)
        for module in ("pool", "work"):
            monkeypatch.setattr(f"harness.selection.{module}.PART_ROWS", 150)
        self.r = random.Random()
        self._folder = folder
        self._monkeypatch = monkeypatch
        texts = draw_targets(self.r, 24)
        alike = [Document(f"a{n}", code(self.r, self.r.randint(30, 400)), "x") for n in range(200)]
        others = [Document(f"b{n}", words(self.r, 30), "x") for n in range(200)]
        documents = [*draw_pool(self.r, texts, 50), *alike, *others]
        self.r.shuffle(documents)
        self._pool = write(self.r, folder / "in", documents)
        self._targets = write_texts(folder / "targets.jsonl", texts)

    def choose(self, name: str) -> tuple[dict[str, bytes], list[Any], int]:
        """What comes out, the examples in the report, and how often the pool was read."""
        (self._folder / name).mkdir()
        with self._monkeypatch.context() as patch:
            patch.chdir(self._folder / name)
            reads = Reads(patch)
            sections: dict[str, Any] = {
                "budget": {"documents": 12},
                "duplicates": {"remove": "near"},
                "racing": {"audited_documents": 64, "headroom": 1.0},
            }
            summary = select(settings_of(self._pool, self._targets, "out", **sections), progress=QUIET)
        examples = [summary[kind] for kind in ("best", "last_chosen", "first_rejected")]
        return result_of(self._folder / name / "out"), examples, reads.count

    def kept(self, name: str) -> list[Path]:
        return kept_below(self._folder / name / "out" / "work")


def kept_below(work: Path) -> list[Path]:
    return sorted(work.glob("round-*/kept/*/*.zst"))


@pytest.mark.parametrize("write", WRITERS)
def test_the_choice_is_the_same_whatever_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., dict[str, Any]]
) -> None:
    selecting = Selecting(tmp_path, monkeypatch, write)
    with monkeypatch.context() as patch:
        patch.setattr("harness.selection.kept.KEPT_SHARE", 0.0)
        *expected, most = selecting.choose("nothing")
        assert not selecting.kept("nothing")
    *found, least = selecting.choose("all")
    assert found == expected
    assert selecting.kept("all")
    assert least <= most - 3
    for share in (1.0, 0.5):

        def harm(work: Path, share: float = share) -> None:
            for file in kept_below(work):
                if selecting.r.random() < share:
                    damage(selecting.r, file)

        with monkeypatch.context() as patch:
            disturb(patch, harm)
            *found, count = selecting.choose(f"damaged-{share}")
        assert found == expected
        assert count > least
