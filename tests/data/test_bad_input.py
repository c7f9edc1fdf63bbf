"""What a stranger is told: every bad corpus, tokenizer or setting and the one line that it gets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from harness.config import ConfigError, HarnessError, validate
from harness.data import DataSection, EvaluationWindows, TokenStream, prepare, text_bytes
from harness.data.splits import SPLITS
from harness.text import Progress
from tests.data.helpers import random_documents, write_jsonl

MakeConfig = Callable[..., DataSection]
GOOD = b'{"text": "fine"}\n'
STOP = "; mend or exclude it, or set data.on_error=skip to leave such records out"


def cut(data: bytes) -> bytes:
    return data[: len(data) - 6]


def packed_lines(compress: Callable[[bytes], bytes]) -> bytes:
    noise = np.random.default_rng(0).bytes(20_000).hex().encode()
    return compress(b'{"text": "' + noise + b'"}\n')


def parquet_file(columns: dict[str, list[Any]]) -> bytes:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def broken_page() -> bytes:
    """A parquet file whose footer is whole and whose data is not."""
    data = bytearray(parquet_file({"text": [str(n) * 50 for n in range(200)]}))
    data[4:200] = b"\xff" * 196
    return bytes(data)


# File name, its bytes, and what the line says after `corpus 'x': FILE: `.
FILES: list[tuple[str, bytes | Callable[[], bytes], str]] = [
    ("a.txt", b"one\ntwo \xe9\n", "line 2: not UTF-8: byte 0xe9 (invalid continuation byte)"),
    ("a.txt", "text".encode("utf-16"), "line 1: is UTF-16, not UTF-8; convert it"),
    ("a.jsonl", GOOD + b'{"text": "cut off', "line 2: not valid JSON (Unterminated string starting at at column 10)"),
    ("a.jsonl", GOOD + b"\n[1]\n", "line 3: expected a JSON object with the key 'text', found a list"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1: has no key 'text' (text_field); its keys are 'body', 'id'"),
    ("a.jsonl", b"{}", "line 1: has no key 'text' (text_field); its keys are none"),
    ("a.jsonl", b'{"text": null}\n', "line 1: 'text' should be text, found null"),
    ("a.jsonl", b'{"text": {"a": 1}}\n', "line 1: 'text' should be text, found an object"),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2: not UTF-8: byte 0xff (invalid start byte)"),
    (
        "a.jsonl",
        b'{"text": "\\ud83d alone"}\n',
        "line 1: the text holds half a surrogate pair, \\ud83d, which is no character",
    ),
    ("a.jsonl", b"[" * 200_000, "line 1: not valid JSON ("),
    ("a.jsonl", b"", "is empty: expected a JSON object a line"),
    (
        "a.jsonl.gz",
        lambda: packed_lines(gzip.compress)[:5000],
        "line 1: the gzip stream is truncated here, what follows is lost (Compressed file ended before ",
    ),
    ("a.jsonl.gz", GOOD, "line 1: the gzip stream is corrupt here, what follows is lost (Not a gzipped file"),
    (
        "a.jsonl.zst",
        lambda: cut(packed_lines(zstandard.ZstdCompressor().compress)),
        "line 1: the zstd stream is truncated here, what follows is lost (zstd file ends in the middle of a frame)",
    ),
    ("a.jsonl.zst", GOOD * 3, "line 1: the zstd stream is corrupt here, what follows is lost (zstd decompress"),
    ("a.txt.gz", cut(gzip.compress(b"text", mtime=0)), "the gzip stream is truncated here, what follows is lost ("),
    ("a.parquet", b"PAR1 and no more", "cannot be read as parquet ("),
    ("a.parquet", broken_page, "cannot be read as parquet ("),
    ("a.parquet", lambda: parquet_file({"body": ["x"]}), "has no column 'text' (text_field); its columns are 'body'"),
    ("a.parquet", lambda: parquet_file({"text": [1, 2]}), "column 'text' should hold text, it holds int64"),
    ("a.parquet", lambda: parquet_file({"text": ["fine", None]}), "row 2: 'text' should be text, found null"),
    ("a.parquet", lambda: parquet_file({"text": np.array([], dtype=str).tolist()}), "column 'text' should hold text"),
]


@pytest.mark.parametrize(("name", "data", "line"), FILES)
def test_bad_files(
    name: str, data: bytes | Callable[[], bytes], line: str, tmp_path: Path, make_config: MakeConfig, quiet: Progress
) -> None:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data())
    config = make_config(corpora=[{"name": "x", "source": str(path)}])
    with pytest.raises(HarnessError) as caught:
        prepare(config, progress=quiet)
    said = str(caught.value)
    assert said.startswith(f"corpus 'x': {path}: {line}")
    assert said.endswith(STOP)
    assert "\n" not in said
    # Skipped instead: what else the file holds is kept; where that is nothing, an empty corpus is refused all the same.
    try:
        prepared = prepare(config.model_copy(update={"on_error": "skip"}), progress=quiet)
    except HarnessError as error:
        assert str(error).startswith("corpus 'x': no document in 1 files (0 empty, 1 unreadable)")  # noqa: PT017
    else:
        kept = [text for split in SPLITS for text in text_bytes(prepared, "x", split)]
        assert kept == [b"fine"]
    assert not (tmp_path / "prepared" / ".partial-x").exists()


def test_parquet_that_is_not_utf8(tmp_path: Path, make_config: MakeConfig, quiet: Progress) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"fine", b"bad \xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    config = make_config(corpora=[{"name": "x", "source": str(tmp_path / "a.parquet")}])
    with pytest.raises(HarnessError, match=r"a.parquet: row 2: 'text' is not UTF-8 \(invalid start byte at byte 4\)"):
        prepare(config, progress=quiet)


def test_parquet_without_pyarrow(
    tmp_path: Path, make_config: MakeConfig, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(HarnessError, match=r"^reading .parquet needs pyarrow: pip install harness\[parquet\]$"):
        prepare(make_config(corpora=[{"name": "x", "source": str(tmp_path / "a.parquet")}]), progress=quiet)
    assert not (tmp_path / "prepared").exists()


SOURCES: list[tuple[dict[str, Any], str]] = [
    ({"source": "{t}/gone.txt"}, "corpus 'x': source '{t}/gone.txt': no such file or folder"),
    ({"source": "{t}"}, "corpus 'x': source '{t}' is a folder: set `suffixes` to the endings to read, such as [.txt]"),
    (
        {"source": "{t}", "suffixes": [".rs", ".go"]},
        "corpus 'x': source '{t}': no file below this folder ends in .rs or .go",
    ),
    ({"source": "{t}/*.rs"}, "corpus 'x': source '{t}/*.rs': no file matches this glob (from "),
    ({"source": "{t}/*.txt", "exclude": "*.txt"}, "corpus 'x': `exclude` leaves no file of {t}/*.txt"),
    ({"source": "{t}/b.json"}, "corpus 'x': {t}/b.json: .json files are not read: one JSON value a line is read as"),
    ({"source": "{t}/c.txt.xz"}, "corpus 'x': {t}/c.txt.xz: .xz files are not read: recompress it with gzip or zstd"),
    ({"source": "{t}/d.parquet.gz"}, "corpus 'x': {t}/d.parquet.gz: parquet compresses its own columns"),
    (
        {"source": "${{sysconfig:stdlb}}/a.py"},
        "corpus 'x': source: ${{sysconfig:stdlb}} is not known; one of sysconfig:stdlib, ",
    ),
    ({"source": "{t}/empty.txt"}, "corpus 'x': no document in 1 files (1 empty, 0 unreadable), the first is {t}/empty"),
    ({"indexed": "{t}/none"}, "corpus 'x': no such file: {t}/none.idx; a Megatron dataset is a .bin and a .idx"),
    ({"indexed": "{t}/text"}, "corpus 'x': {t}/text.idx is not a Megatron index (it should begin with MMIDIDX)"),
    ({"indexed": "{t}/void"}, "corpus 'x': {t}/void.bin is empty"),
]


@pytest.mark.parametrize(("corpus", "line"), SOURCES)
def test_bad_sources(
    corpus: dict[str, Any], line: str, tmp_path: Path, make_config: MakeConfig, quiet: Progress
) -> None:
    for name in ("a.txt", "b.json", "c.txt.xz", "d.parquet.gz", "text.bin", "text.idx", "void.idx"):
        (tmp_path / name).write_text("text")
    for name in ("empty.txt", "void.bin"):
        (tmp_path / name).write_text("")
    filled = json.loads(json.dumps(corpus).replace("{t}", str(tmp_path)).replace("{{", "{").replace("}}", "}"))
    with pytest.raises(HarnessError) as caught:
        prepare(make_config(corpora=[{"name": "x", **filled}]), progress=quiet)
    assert str(caught.value).startswith(line.format(t=tmp_path))
    assert "\n" not in str(caught.value)


TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    (
        {"kind": "sentencepiece", "vocab_size": 100_000},
        "data.tokenizer.vocab_size: a sentencepiece model of 100000 pieces cannot be trained on ",
    ),
    ({"kind": "sentencepiece", "path": "{t}/gone.model"}, "{t}/gone.model: the tokenizer cannot be read: No such file"),
    ({"kind": "sentencepiece", "path": "{t}/bad.json"}, "{t}/bad.json: not a sentencepiece model; data.tokenizer.path"),
    ({"kind": "sentencepiece", "path": "{t}/void"}, "{t}/void: not a sentencepiece model; data.tokenizer.path"),
    ({"kind": "huggingface", "path": "{t}/bad.json"}, "{t}/bad.json: not a tokenizer.json of the `tokenizers` library"),
    ({"kind": "huggingface", "path": "{t}"}, "{t}/tokenizer.json: the tokenizer cannot be read: No such file"),
]


@pytest.mark.parametrize(("tokenizer", "line"), TOKENIZERS)
def test_bad_tokenizers(
    tokenizer: dict[str, Any], line: str, tmp_path: Path, make_config: MakeConfig, quiet: Progress
) -> None:
    (tmp_path / "bad.json").write_text('{"not": "a tokenizer"}')
    (tmp_path / "void").write_text("")
    write_jsonl(tmp_path / "a.jsonl", [f"some text {n}" for n in range(20)])
    filled = json.loads(json.dumps(tokenizer).replace("{t}", str(tmp_path)))
    config = make_config(corpora=[{"name": "x", "source": str(tmp_path / "a.jsonl")}], tokenizer=filled)
    with pytest.raises(HarnessError) as caught:
        prepare(config, progress=quiet)
    assert str(caught.value).startswith(line.format(t=tmp_path))
    assert "\n" not in str(caught.value)


ONE = {"name": "x", "source": "a.txt"}
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({}, "f: corpora: is required and not set"),
    ({"corpora": []}, "f: corpora: is empty: name at least one corpus, `- name: mine` with `source: [mine/*.txt]`"),
    ({"corpora": [ONE, ONE]}, "f: corpora: two corpora are named 'x'; give each its own name"),
    (
        {"corpora": [ONE, {**ONE, "name": "y", "weight": 1}]},
        "f: corpora: some corpora have a weight and x has none: give every corpus one, or none",
    ),
    (
        {"corpora": [{"name": "x"}]},
        "f: corpora.0: has no text: set `source` (files, folders, globs), `selection` (a folder of harness select) or "
        "`indexed` (a Megatron prefix)",
    ),
    (
        {"corpora": [{**ONE, "indexed": "b"}]},
        "f: corpora.0: `source` and `indexed` exclude each other: keep one",
    ),
    (
        {"corpora": [{**ONE, "name": "a/b"}]},
        "f: corpora.0.name: 'a/b' cannot name a folder: use letters, digits, `.`, `_` and `-`",
    ),
    (
        {"corpora": [{**ONE, "name": "tokenizer"}]},
        "f: corpora.0.name: 'tokenizer' is the tokenizer's place in the prepared folder; choose another name",
    ),
    (
        {"corpora": [{**ONE, "suffixes": "py"}]},
        "f: corpora.0.suffixes: 'py' should begin with a dot, such as .py or .jsonl.zst",
    ),
    (
        {"corpora": [{"name": "x", "indexed": "b", "split": [0.5, 0.4]}]},
        "f: corpora.0.split: [0.5, 0.4] should be three shares (train, validation, test) that sum to 1",
    ),
    (
        {"corpora": [{"name": "x", "indexed": "b"}]},
        "f: corpus 'x' is already tokenized, so its tokenizer cannot be trained here: "
        "set tokenizer.path to the one it was made with",
    ),
    (
        {"corpora": [ONE], "validation_share": 0.5, "test_share": 0.5},
        "f: validation_share 0.5 and test_share 0.5 leave nothing to train on: together they should stay below 1",
    ),
    (
        {"corpora": [ONE], "tokenizer": {"kind": "huggingface"}},
        "f: tokenizer: kind huggingface needs `path`, a tokenizer.json",
    ),
    (
        {"corpora": [ONE], "tokenizer": {"kind": "bytes", "path": "p"}},
        "f: tokenizer: kind bytes loads nothing: remove `path`, or choose kind sentencepiece or huggingface",
    ),
    (
        {"corpora": [ONE], "tokenizer": {"kind": "byte"}},
        "f: tokenizer.kind: 'byte' is not one of sentencepiece, huggingface, bytes; did you mean bytes?",
    ),
    ({"corpora": [{**ONE, "sorce": "a"}]}, "f: corpora.0.sorce: unknown key; did you mean corpora.0.source?"),
]


@pytest.mark.parametrize(("values", "line"), CONFIGS)
def test_bad_settings(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(DataSection, values, "f")
    assert str(caught.value) == line


def test_splits_that_are_too_small(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress
) -> None:
    write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 60))
    (tmp_path / "b.txt").write_text("short")
    entries = [{"name": "a", "source": str(tmp_path / "a.jsonl")}, {"name": "b", "source": str(tmp_path / "b.txt")}]
    config = make_config(corpora=entries, validation_share=0.3, test_share=0.0, sequence_length=64)
    prepared = prepare(config, progress=quiet)
    in_train = prepared.split("b", "train").documents == 1
    held = "has 6 tokens in the train split" if in_train else "has none of its 1 documents in the train split"
    with pytest.raises(HarnessError) as caught:
        TokenStream(prepared, config, seed=1)
    assert str(caught.value) == (
        f"corpus 'b': {held}, 65 tokens are needed: give more text, or set data.sequence_length lower"
    )
    with pytest.raises(HarnessError) as caught:
        EvaluationWindows(prepared, config, "test", 4)
    assert str(caught.value) == (
        "corpus 'a': has none of its 60 documents in the test split, 2 tokens are needed: "
        "cut them into documents (separator, max_document_bytes), or raise data.test_share"
    )
    with pytest.raises(HarnessError, match="'valid' is not a split; the splits are train, validation, test"):
        EvaluationWindows(prepared, config, "valid", 4)
    with pytest.raises(HarnessError, match="has no corpus 'c'; it has a, b"):
        prepared.split("c", "train")
