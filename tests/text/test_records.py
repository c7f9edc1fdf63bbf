"""Records and their texts, of one field and of several."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from harness.config import ConfigError, validate
from harness.text import Problem, Record, TextSource, Unusable, find_files, read_records, text_of


def source_of(path: Path, **fields: object) -> TextSource:
    return validate(TextSource, {"name": "x", "source": [str(path)], **fields}, "test")


def texts(source: TextSource) -> list[str | Unusable | Problem]:
    [file] = find_files(source)
    records = read_records(file, source)
    return [record if isinstance(record, Problem) else text_of(record.content, source) for record in records]


def test_several_fields_are_joined_in_the_order_named(tmp_path: Path) -> None:
    generator = random.Random()
    rows = [{"a": f"á{generator.random()}", "n": 1, "b": f"{generator.random()}\n"} for _ in range(50)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert texts(source_of(path, text_field=["b", "a"])) == [row["b"] + "\n" + str(row["a"]) for row in rows]
    assert texts(source_of(path, text_field=["b", "a"], joined_by="")) == [row["b"] + str(row["a"]) for row in rows]
    assert texts(source_of(path, text_field="a")) == [row["a"] for row in rows]
    [first, *_] = texts(source_of(path, text_field=["a", "c"]))
    assert first == Unusable("has no key 'c' (text_field); its keys are 'a', 'n', 'b'")
    [first, *_] = texts(source_of(path, text_field=["a", "n"]))
    assert first == Unusable("'n' should be text, found a number")


def test_several_columns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {"id": list(range(1500)), "b": [f"b{i}" for i in range(1500)], "a": [f"a{i}" for i in range(1500)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    source = source_of(tmp_path / "x.parquet", text_field=["a", "b"], joined_by=" ")
    assert texts(source) == [f"a{i} b{i}" for i in range(1500)]
    [file] = find_files(source)
    records = list(read_records(file, source, columns=["id"]))
    assert [record.content["id"] for record in records if isinstance(record, Record)] == columns["id"]  # type: ignore[index]
    [first, *_] = read_records(file, source, columns=["key", "id"])
    assert isinstance(first, Record)
    assert first.content == {"a": "a0", "b": "b0", "id": 0}, "without a column that is not there"


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n[]\n{"text": "two"}')
    source = source_of(tmp_path / "x.jsonl")
    [file] = find_files(source)
    records = [record for record in read_records(file, source) if isinstance(record, Record)]
    assert [record.number for record in records] == [1, 4, 5]
    assert texts(source) == ["one", Unusable("expected a JSON object with the key 'text', found a list"), "two"]


def test_no_field_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no field"):
        validate(TextSource, {"name": "x", "text_field": []}, "test")
