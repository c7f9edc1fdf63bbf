"""Every format gives the same corpus; splits are disjoint; nothing half-written looks whole."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from harness.config import HarnessError
from harness.data import DataSection, Prepared, open_prepared, prepare, text_bytes
from harness.data.splits import SPLITS
from harness.data.writer import PARTIAL, CorpusWriter
from harness.text import Progress
from harness.text.progress import LINE_SECONDS
from harness.text.workers import BYTES_PER_WORKER, choose_workers
from tests.data.helpers import random_documents, random_text, write_jsonl

MakeConfig = Callable[..., DataSection]
MakePrepared = Callable[..., tuple[DataSection, Prepared]]


def expected_split(text: str, validation: float = 0.2, test: float = 0.1) -> str:
    """The rule of the documentation, written again: the first 8 bytes of a 16-byte blake2b as a fraction."""
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def contents(prepared: Prepared, corpus: str) -> dict[str, list[str]]:
    return {split: [text.decode() for text in text_bytes(prepared, corpus, split)] for split in SPLITS}


def write_in(form: str, folder: Path, documents: list[str]) -> dict[str, Any]:
    """The documents as files of one format; the corpus entry that reads them, in the same order."""
    folder.mkdir()
    lines = b"".join(json.dumps({"id": 1, "body": text}).encode() + b"\n" for text in documents)
    middle = lines.index(b"\n", len(lines) // 2) + 1
    if form in ("txt", "txt.gz"):
        for number, text in enumerate(documents):
            data = text.encode()
            path = folder / f"{number:04}.{form}"
            path.write_bytes(gzip.compress(data) if form == "txt.gz" else data)
        return {"source": str(folder), "suffixes": [f".{form}"]}
    if form == "separated":
        (folder / "all.md").write_bytes("<<<cut>>>".join(documents).encode())
        return {"source": str(folder / "*.md"), "separator": "<<<cut>>>"}
    if form == "jsonl":
        (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[:middle])
        (folder / "b.jsonl").write_bytes(b"\n  \n" + lines[middle:-1])  # blank lines; no line end at the end
        return {"source": [str(folder / "b.jsonl"), str(folder / "?.jsonl")], "text_field": "body"}
    if form == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines[:middle]) + gzip.compress(lines[middle:]))
        return {"source": str(folder / "**" / "*.gz"), "text_field": "body"}
    if form == "jsonl.zst":
        compress = zstandard.ZstdCompressor().compress
        (folder / "a.jsonl.zst").write_bytes(compress(lines[:middle]) + compress(b"") + compress(lines[middle:]))
        return {"source": str(folder), "suffixes": ".jsonl.zst", "text_field": "body"}
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(documents))), "body": documents})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return {"source": str(folder / "a.parquet"), "text_field": "body"}


FORMS = ["txt", "txt.gz", "separated", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


class Counted(Progress):
    """Checks that each pass over the sources counts every byte on disk."""

    @contextmanager
    def work(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        counts: list[int] = []
        yield counts.append
        assert sum(counts) == total_bytes > 0


@pytest.mark.parametrize("form", FORMS)
def test_formats(form: str, tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator) -> None:
    documents = random_documents(rng, 80)
    entry = write_in(form, tmp_path / "text", documents)
    config = make_config(corpora=[{"name": "mine", **entry}])
    prepared = prepare(config, progress=Counted(quiet=True))
    expected: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in documents:
        expected[expected_split(text)].append(text)
    assert contents(prepared, "mine") == expected
    for split in SPLITS:
        part = prepared.split("mine", split)
        assert part.documents == len(expected[split])
        assert part.bytes == sum(len(text.encode()) for text in expected[split])
        assert part.tokens == part.bytes + part.documents  # an end of text each


def test_same_files_for_any_number_of_workers(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.data.encoding.BATCH_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 200))
    made = {}
    for workers in (1, 3):
        folder = tmp_path / f"by-{workers}"
        config = make_config(
            folder=str(folder),
            corpora=[{"name": "a", "source": str(tmp_path / "a.jsonl")}],
            tokenizer={"vocab_size": 500},
            workers=workers,
        )
        prepare(config, progress=quiet)
        made[workers] = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.name != ".lock"
            if file.is_file()
        }
    assert len(made[1]) == 3 * 2 + 1 + 3
    assert made[1] == made[3]


def test_equal_documents_stand_on_one_side(
    tmp_path: Path, make_prepared: MakePrepared, rng: np.random.Generator
) -> None:
    shared, own = random_documents(rng, 80), random_documents(rng, 80)
    first = [*shared, *own, *shared[:40]]
    second = [shared[place] for place in rng.permutation(80)]
    _, prepared = make_prepared({"first": first, "second": second})
    sides = {name: contents(prepared, name) for name in ("first", "second")}
    for name, documents in (("first", first), ("second", second)):
        assert sorted(text for side in sides[name].values() for text in side) == sorted(documents)
    both = {split: {*sides["first"][split], *sides["second"][split]} for split in SPLITS}
    assert not both["train"] & both["validation"]
    assert not both["train"] & both["test"]
    assert not both["validation"] & both["test"]
    # Raising one share moves documents between its neighbours only.
    _, more = make_prepared({"first": first}, folder=str(tmp_path / "more"), validation_share=0.4)
    assert sorted(contents(more, "first")["test"]) == sorted(sides["first"]["test"])
    assert set(contents(more, "first")["validation"]) > set(sides["first"]["validation"])


def test_cutting_long_documents(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress
) -> None:
    book = "\n".join(random_text(rng, int(rng.integers(1, 90))) for _ in range(200)) + "日本" * 100
    (tmp_path / "book.txt").write_bytes(book.encode())
    config = make_config(
        corpora=[{"name": "book", "source": str(tmp_path / "book.txt"), "max_document_bytes": 300}],
        validation_share=0.0,
        test_share=0.0,
    )
    parts = contents(prepare(config, progress=quiet), "book")["train"]
    assert "".join(parts) == book
    assert max(len(part.encode()) for part in parts) <= 300
    assert sum(part.endswith("\n") for part in parts) > 0.7 * len(parts)


def test_files_are_read_by_megatron(make_prepared: MakePrepared, rng: np.random.Generator) -> None:
    """IndexedDataset and the blended builder, as Megatron uses them, on the files written here."""
    documents = random_documents(rng, 100)
    _, prepared = make_prepared({"mine": documents}, validation_share=0.0, test_share=0.0)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    dataset = IndexedDataset(prepared.split("mine", "train").prefix)
    assert dataset.index.dtype == np.uint16
    assert [bytes(dataset[n][:-1].tolist()).decode() for n in range(len(dataset))] == documents
    assert {int(dataset[n][-1]) for n in range(len(dataset))} == {256}
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    settings = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        tokenizer=prepared.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    samples = GPTDataset(dataset, None, np.arange(len(dataset), dtype=np.int32), 50, Split.train, settings)
    assert samples[3]["tokens"].shape == (32,)


def test_skipping_counts_and_says_what_it_left_out(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator
) -> None:
    documents = random_documents(rng, 40)
    good = [json.dumps({"text": text}) for text in documents]
    lines = [*good[:20], "{broken", json.dumps({"text": " \n"}), json.dumps({"text": 5}), *good[20:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"fine\nnot \xff fine\n")
    (tmp_path / "c.txt").write_bytes(b"")
    packed = gzip.compress("".join(line + "\n" for line in good).encode())
    (tmp_path / "d.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    said = io.StringIO()
    config = make_config(
        corpora=[{"name": "x", "source": str(tmp_path / "*.*")}], on_error="skip", validation_share=0.0, test_share=0.0
    )
    prepared = prepare(config, progress=Progress(said))
    read = contents(prepared, "x")["train"]
    assert read[:40] == documents
    assert set(read[40:]) < set(documents)  # what the cut archive still gave
    record = json.loads((tmp_path / "prepared" / "x" / "prepared.json").read_text())
    assert record["skipped"]["count"] == 4
    assert record["empty_documents"] == 2
    a, b, d = (tmp_path / name for name in ("a.jsonl", "b.txt", "d.jsonl.gz"))
    first = record["skipped"]["first"]
    assert first[0].startswith(f"{a}: line 21: not valid JSON")
    assert first[1] == f"{a}: line 23: 'text' should be text, found a number"
    assert first[2] == f"{b}: line 2: not UTF-8: byte 0xff (invalid start byte)"
    assert first[3].startswith(f"{d}: line {len(read) - 40 + 1}: the gzip stream is truncated here")
    for line in first:
        assert f"skipped {line}\n" in said.getvalue()
    assert f"x: {len(read)} documents" in said.getvalue()
    assert "2 empty documents left out; 4 unreadable records skipped" in said.getvalue()
    # With on_error=stop the same folder is not taken as whole.
    with pytest.raises(HarnessError, match="on_error was skip, and 4 records were left out; it is stop now"):
        open_prepared(config.model_copy(update={"on_error": "stop"}))


def _run_and_kill(config: DataSection, when: str, pids: Path) -> None:
    """In a forked child: SIGKILL itself in the middle of preparing."""

    def die(*_: Any) -> None:
        pids.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "rename":
        os.rename = die  # type: ignore[assignment]
    else:
        add, calls = CorpusWriter.add, iter(range(10**6))

        def add_or_die(self: CorpusWriter, *arguments: Any) -> None:
            add(self, *arguments)
            if next(calls) == 100:
                die()

        CorpusWriter.add = add_or_die  # type: ignore[method-assign, assignment]
    prepare(config, progress=Progress(quiet=True))


@pytest.mark.parametrize(("when", "workers"), [("writing", 1), ("rename", 1), ("writing", 2)])
def test_killed_run_leaves_nothing_whole(
    when: str, workers: int, tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("harness.data.encoding.BATCH_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 200))
    corpora = [{"name": "a", "source": str(tmp_path / "a.jsonl")}]
    config = make_config(corpora=corpora, workers=workers)
    prepare(make_config(corpora=corpora, folder=str(tmp_path / "clean")), progress=quiet)
    pids = tmp_path / "pids"
    child = multiprocessing.get_context("fork").Process(target=_run_and_kill, args=(config, when, pids))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = tmp_path / "prepared"
    assert not (left / "a").exists()
    assert list(left.glob(PARTIAL + "*"))
    with pytest.raises(HarnessError, match="run `harness tokenize` first"):
        open_prepared(config)
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in pids.read_text().split()):  # workers end with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (left / f"{PARTIAL}renamed-since").mkdir()
    prepare(config.model_copy(update={"workers": 1}), progress=quiet)
    assert not list(left.glob(PARTIAL + "*"))
    for name in ("prepared.json", "train.bin", "train.idx", "validation.bin", "test.idx"):
        assert (left / "a" / name).read_bytes() == (tmp_path / "clean" / "a" / name).read_bytes()


def test_error_in_the_middle_leaves_nothing(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 50))
    with path.open("a") as file:
        file.write("{broken\n")
    config = make_config(corpora=[{"name": "a", "source": str(path)}])
    with pytest.raises(HarnessError, match="line 51: not valid JSON"):
        prepare(config, progress=quiet)
    assert sorted(item.name for item in (tmp_path / "prepared").iterdir()) == [".lock", "tokenizer"]


def test_text_that_a_tokenizer_changes_is_counted(tmp_path: Path, make_config: MakeConfig) -> None:
    """sentencepiece's own defaults normalise (NFKC) and join spaces."""
    import sentencepiece

    plain = [f"plain words number {number}" for number in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=2,
        hard_vocab_limit=False, add_dummy_prefix=False,
    )  # fmt: skip
    write_jsonl(tmp_path / "a.jsonl", [*plain, "plain  words", "日本"])
    said = io.StringIO()
    config = make_config(
        corpora=[{"name": "a", "source": str(tmp_path / "a.jsonl")}], tokenizer={"path": str(tmp_path / "m.model")}
    )
    prepared = prepare(config, progress=Progress(said))
    assert prepared.tokenizer.definition == (tmp_path / "m.model").read_bytes()
    assert "a: 2 documents do not come back byte for byte from this tokenizer" in said.getvalue()
    assert json.loads((tmp_path / "prepared" / "a" / "prepared.json").read_text())["altered_documents"] == 2


def test_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal: a line when enough time has gone by, none otherwise."""
    now = [0.0]
    monkeypatch.setattr("harness.text.progress.time.monotonic", lambda: now[0])
    said = io.StringIO()
    with Progress(said).work("reading", 4_000_000) as advance:
        advance(1_000_000)
        now[0] += LINE_SECONDS + 1
        advance(1_000_000)
        advance(1_000_000)
    assert said.getvalue() == "reading: 2 of 4 MB\n"


def test_progress_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal()
    progress = Progress(said)
    with progress.work("reading", 100) as advance:
        advance(60)
        progress.say("skipped [red]one[/red]")
        advance(40)
    assert "skipped [red]one[/red]" in said.getvalue()
    assert "100/100 bytes" in said.getvalue()


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asked; otherwise the cores, but no process that has less to do than it takes to start."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert choose_workers(3, 1) == 3
    assert [choose_workers(None, BYTES_PER_WORKER * share) for share in (0, 1, 5, 100)] == [1, 1, 5, 8]
