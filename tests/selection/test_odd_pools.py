"""Pools at the edge of what there is: one document, all the same, huge ones, strange names."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from harness.selection import select
from tests.selection.pools import (
    QUIET,
    Document,
    Truth,
    chosen_ids,
    code,
    draw_targets,
    order,
    settings_of,
    words,
    write_lines,
)

UNITS: list[dict[str, Any]] = [
    {"documents": 1},
    {"share": 1e-9},
    {"bytes": 10_000, "when_short": "take"},
    {"threshold": -9.0},
]


def rows(texts: list[str]) -> list[bytes]:
    return [json.dumps({"id": str(number), "text": text}).encode() + b"\n" for number, text in enumerate(texts)]


def choose(folder: Path, texts: list[str], targets: list[str], **sections: Any) -> dict[str, Any]:
    file = write_lines(folder / "in" / "pool.jsonl", rows(texts))
    aims = write_lines(folder / "targets.jsonl", rows(targets))
    return select(settings_of([file], aims, folder / "out", **sections), progress=QUIET)


@pytest.mark.parametrize("targets", [1, 20])
@pytest.mark.parametrize("budget", UNITS)
def test_one_document(tmp_path: Path, budget: dict[str, Any], targets: int) -> None:
    r = random.Random()
    near = {"remove": "near"}
    summary = choose(tmp_path, [words(r, 30)], draw_targets(r, targets), budget=budget, duplicates=near)
    assert chosen_ids(tmp_path / "out") == ["0"]
    assert json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail) == summary


def test_the_best_document_is_larger_than_the_budget(tmp_path: Path) -> None:
    """Then the choice, which is a prefix, is empty; a second set of targets without a share of it is as well."""
    r = random.Random()
    summary = choose(tmp_path, [code(r, 900) for _ in range(80)], draw_targets(r, 20), budget={"bytes": 5})
    assert summary["chosen"]["documents"] == 0
    assert list((tmp_path / "out" / "chosen").iterdir()) == []
    aims = [{"name": name, "source": [str(tmp_path / "targets.jsonl")]} for name in ("a", "b")]
    settings = settings_of([tmp_path / "in" / "pool.jsonl"], aims, tmp_path / "two", budget={"documents": 1})
    assert select(settings, progress=QUIET)["chosen"]["documents"] == 1


def test_one_text_many_times(tmp_path: Path) -> None:
    r = random.Random()
    every = {"duplicates": {"remove": "none"}, "racing": {"audited_documents": 64}}
    summary = choose(tmp_path, [words(r, 50)] * 300, draw_targets(r, 20), budget={"documents": 7}, **every)
    ids = [Document(str(number), "", "") for number in range(300)]
    expected = {document.id for document in sorted(ids, key=lambda document: order(document, 0))[:7]}
    assert set(chosen_ids(tmp_path / "out")) == expected
    assert summary["recall"]["estimate"] == 1


def test_equal_scores_go_by_the_hash_of_the_text(tmp_path: Path) -> None:
    r = random.Random()
    texts = ["".join(r.sample("ABCDEFGHIJKL", 12)) for _ in range(1000)]  # of which deflate finds nothing anywhere
    targets = ["".join(chr(r.randrange(0x410, 0x450)) for _ in range(90)) for _ in range(20)]
    racing = {"audited_documents": 64, "headroom": 1.0}
    summary = choose(tmp_path, texts, targets, budget={"documents": 40}, racing=racing)
    assert summary["best"][0]["score"] == summary["thresholds"]["code"]
    documents = [Document(str(number), text, "") for number, text in enumerate(texts)]
    expected = {document.id for document in sorted(documents, key=lambda document: order(document, 0))[:40]}
    assert set(chosen_ids(tmp_path / "out")) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_huge_documents_among_small_ones(tmp_path: Path, workers: int) -> None:
    """Larger than a batch and many windows long."""
    r = random.Random()
    targets = draw_targets(r, 2)
    texts = [code(r, 60_000) * 5, "x" * 300_000, *(words(r, 50) for _ in range(30)), "🚀" * 50_000]
    summary = choose(tmp_path, texts, targets, budget={"documents": 9}, workers=workers)
    documents = [Document(str(number), text, "") for number, text in enumerate(texts)]
    assert set(chosen_ids(tmp_path / "out")) == Truth(documents, targets).take(9)
    assert summary["pairs"]["evaluated"] == 2 * sum(max(1, -(-len(text.encode()) // 1024)) for text in texts)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Half surrogate pairs in ids and groups, bytes that are no UTF-8 in the name of a file."""
    r = random.Random()
    lines = [b'{"id": "\\ud83d%d", "group": "\\udc00 %d", "text": "some text %d"}\n' % (n, n, n) for n in range(9)]
    file = write_lines(tmp_path / "pool.jsonl", lines)
    targets = write_lines(tmp_path / "targets.jsonl", rows(draw_targets(r)))
    section = {"source": [str(file)], "id_field": "id", "group_field": "group"}
    select(settings_of(section, targets, tmp_path / "out", budget={"documents": 5}), progress=QUIET)
    assert all(name[0] == "\ud83d" for name in chosen_ids(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["source"] for row in report["by_source"]} == {f"\udc00 {number}" for number in range(9)}
    strange = os.fsdecode(b"strange \xff\n.txt")
    try:
        (tmp_path / strange).write_text(words(r, 9))
    except OSError:
        pytest.skip("this file system takes no such name")
    section = {"source": [str(tmp_path)], "suffixes": [".txt"]}
    select(settings_of(section, targets, tmp_path / "text", budget={"documents": 1}), progress=QUIET)
    assert (tmp_path / "text" / "chosen" / strange).exists()
    record = json.loads((tmp_path / "text" / "selection.json").read_text())
    assert record["files"][0]["file"] == strange


def test_many_small_files(tmp_path: Path) -> None:
    r = random.Random()
    targets = draw_targets(r, 3)
    texts = [words(r, r.randint(1, 30)) for _ in range(25)]
    files = [write_lines(tmp_path / f"in/{n}.jsonl.gz", [line]) for n, line in enumerate(rows(texts))]
    aims = write_lines(tmp_path / "targets.jsonl", rows(targets))
    select(settings_of(files, aims, tmp_path / "out", budget={"documents": 7}), progress=QUIET)
    documents = [Document(str(number), text, "") for number, text in enumerate(texts)]
    expected = Truth(documents, targets).take(7)
    assert set(chosen_ids(tmp_path / "out")) == expected
    assert {file.name for file in (tmp_path / "out" / "chosen").iterdir()} == {f"{name}.jsonl.gz" for name in expected}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("kept", [False, True])
def test_ids_and_groups_are_optional(
    tmp_path: Path, kind: str, kept: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document without one, or with null, is called by its place; one without a group has a row that says so. Also
    where the working folder has kept the records."""
    if kept:
        monkeypatch.setattr("harness.selection.kept.SMALL_SHARD_BYTES", 0)
        monkeypatch.setattr("harness.selection.kept.KEPT_SHARE", 1)
    r = random.Random()
    extra: list[dict[str, Any]] = [
        {"id": None, "group": None}, {}, {"id": "mine", "group": "web"}, {"id": 7, "group": " "},
        {"id": "", "group": ""}, {"id": None, "group": "web"},
    ]  # fmt: skip
    records = [{"text": words(r, 40), "id": None, "group": None} | fields for fields in extra]
    names = [f"pool.{kind}:1", f"pool.{kind}:2", "mine", "7", "", f"pool.{kind}:6"]
    if kind == "jsonl":
        lines = [{"text": record["text"], **fields} for record, fields in zip(records, extra, strict=True)]
        lines.append({"text": "", "group": "nothing but empty"})
        file = write_lines(tmp_path / "pool.jsonl", [json.dumps(line).encode() + b"\n" for line in [*lines, 5]])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        file = tmp_path / "pool.parquet"
        shown = [record | {"id": None if record["id"] is None else str(record["id"])} for record in records]
        parquet.write_table(pyarrow.Table.from_pylist([*shown, {"text": "", "group": "nothing but empty"}]), file)
    targets = write_lines(tmp_path / "targets.jsonl", rows(draw_targets(r, 2)))
    section = {"source": [str(file)], "id_field": "id", "group_field": "group", "on_error": "skip"}
    settings = settings_of(section, targets, tmp_path / "out", budget={"documents": 6})
    summary = select(settings, progress=QUIET)
    assert sorted(row["id"] for row in summary["best"]) == sorted(names)
    assert {row["id"]: row["source"] for row in summary["best"]}["mine"] == "web"
    assert {row["source"]: row["documents"] for row in summary["by_source"]} == {"(none)": 4, "web": 2}
    assert summary["pool"]["without_id"] == 3
    assert "3 of 6 documents have no 'id' (pool.id_field), or null: they are called by their file" in caplog.text


def test_a_parquet_file_without_the_columns_of_ids_and_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    r = random.Random()
    parquet.write_table(pyarrow.table({"text": [words(r, 30) for _ in range(5)]}), tmp_path / "a.parquet")
    targets = write_lines(tmp_path / "targets.jsonl", rows(draw_targets(r, 2)))
    section = {"source": [str(tmp_path / "a.parquet")], "id_field": "id", "group_field": "group"}
    summary = select(settings_of(section, targets, tmp_path / "out", budget={"documents": 2}), progress=QUIET)
    assert summary["pool"]["without_id"] == 5
    assert [row["source"] for row in summary["by_source"]] == ["(none)"]
