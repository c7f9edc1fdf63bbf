"""What is written of the chosen and of the others, in every format, with all that they came with."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.config import HarnessError
from harness.selection import select
from tests.selection.pools import (
    QUIET,
    Document,
    Truth,
    chosen_ids,
    draw_pool,
    draw_targets,
    line_of,
    read_bytes,
    result_of,
    settings_of,
    write_lines,
    write_texts,
)


class Prepared:
    def __init__(self) -> None:
        self.seed = random.randrange(10**9)
        self.r = random.Random(self.seed)
        self.targets = draw_targets(self.r, 5)
        self.documents = draw_pool(self.r, self.targets, 90)
        self.truth = Truth(self.documents, self.targets)
        self.chosen = self.truth.take(25)
        self.usable = {document.id for document in self.documents if document.text.strip()}

    def __repr__(self) -> str:
        return f"Prepared(seed={self.seed})"

    def write_targets(self, folder: Path) -> Path:
        return write_texts(folder / "targets.jsonl", self.targets)

    def choose(self, pool: Any, folder: Path, **sections: Any) -> dict[str, Any]:
        sections = {"budget": {"documents": 25}, "output": {"rejected": True}, "racing": {"exact": True}} | sections
        return select(settings_of(pool, self.write_targets(folder), folder / "out", **sections), progress=QUIET)


@pytest.fixture(scope="module")
def pool() -> Prepared:
    return Prepared()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_stays_as_it_was_and_grows_by_its_score(pool: Prepared, tmp_path: Path, ending: str) -> None:
    lines = {document.id: line_of(pool.r, document) for document in pool.documents}
    first = b"\xef\xbb\xbf" + b"".join([b"\r\n", *lines.values()])
    file = write_lines(tmp_path / f"in{ending}", [first])
    pool.choose([file], tmp_path)
    written = {kind: read_bytes(tmp_path / "out" / kind / file.name) for kind in ("chosen", "rejected")}
    wanted = {"chosen": pool.chosen, "rejected": pool.usable - pool.chosen}
    for kind, data in written.items():
        assert data.endswith(b"}\n")
        found = []
        for line in data.removesuffix(b"\n").split(b"\n"):
            row = json.loads(line)
            match = re.fullmatch(rb'(.*), "score": ([-\d.e]+|null)}', line)
            assert match is not None
            assert match[1] == re.sub(rb"\s*}\s*$", b"", lines[row["id"]].rstrip())
            assert row["score"] == pool.truth.scores[0][row["id"]]
            found.append(row["id"])
        in_order = [document.id for document in pool.documents if document.id in wanted[kind]]
        assert found == in_order


def test_parquet_keeps_its_columns_and_types(pool: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    r = pool.r
    columns = {
        "n": pyarrow.array([r.choice([None, r.randrange(200)]) for _ in pool.documents], pyarrow.uint8()),
        "id": pyarrow.array([document.id for document in pool.documents], pyarrow.large_string()),
        "kind": pyarrow.array([document.source for document in pool.documents]).dictionary_encode(),
        "list": pyarrow.array([[{"a": r.random(), "b": "é"}] * r.randrange(3) for _ in pool.documents]),
        "when": pyarrow.array([r.randrange(10**9) for _ in pool.documents], pyarrow.timestamp("us", "UTC")),
        "text": pyarrow.array([document.text for document in pool.documents]),
        "raw": pyarrow.array([r.randbytes(9) for _ in pool.documents]),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"made by": "a test"})
    file = tmp_path / "in" / "pool.parquet"
    file.parent.mkdir()
    pyarrow.parquet.write_table(table, file, row_group_size=17)
    pool.choose([file], tmp_path)
    for kind, wanted in (("chosen", pool.chosen), ("rejected", pool.usable - pool.chosen)):
        found = pyarrow.parquet.read_table(tmp_path / "out" / kind / "pool.parquet")
        mask = pyarrow.array([document.id in wanted for document in pool.documents])
        kept = table.filter(mask)
        scores = [pool.truth.scores[0][name] for name in kept["id"].to_pylist()]
        kept = kept.append_column("score", pyarrow.array(scores, pyarrow.float64()))
        assert found.schema.equals(kept.schema)
        assert found.schema.metadata[b"made by"] == b"a test"
        assert found.to_pylist() == kept.to_pylist()


def test_text_files(pool: Prepared, tmp_path: Path) -> None:
    names = {document.id: f"{'deep/er/' * (n % 3)}{n} ñ.txt" for n, document in enumerate(pool.documents)}
    by_name = [Document(names[document.id], document.text, "") for document in pool.documents]
    truth = Truth(by_name, pool.targets)
    for document in by_name:
        path = tmp_path / "in" / document.id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.text.encode())
    summary = pool.choose({"source": [str(tmp_path / "in")], "suffixes": [".txt"]}, tmp_path)
    expected = truth.take(25)
    chosen = tmp_path / "out" / "chosen"
    assert {str(file.relative_to(chosen)) for file in chosen.rglob("*.txt")} == expected
    texts = {document.id: document.text.encode() for document in by_name}
    assert all((chosen / name).read_bytes() == texts[name] for name in expected)
    rows = [json.loads(line) for line in (chosen / "scores-00000.jsonl").read_text().splitlines()]
    assert {row["file"]: row["score"] for row in rows} == {name: truth.scores[0][name] for name in expected}
    assert {entry["source"] for entry in summary["by_source"]} >= {"deep"}


def test_parts_of_text_files(pool: Prepared, tmp_path: Path) -> None:
    mark = "\n<|end|>\n"
    halves = [pool.documents[:40], pool.documents[40:]]
    documents = []
    (tmp_path / "in").mkdir()
    for number, half in enumerate(halves):
        name = f"{number}.txt"
        (tmp_path / "in" / name).write_bytes(mark.join(document.text for document in half).encode())
        parts = [document.text for document in half if document.text]
        documents += [Document(f"{name}:{place}", text, "") for place, text in enumerate(parts, 1)]
    truth = Truth(documents, pool.targets)
    pool.choose({"source": [str(tmp_path / "in")], "suffixes": [".txt"], "separator": mark}, tmp_path)
    expected = truth.take(25)
    chosen = tmp_path / "out" / "chosen"
    rows = [json.loads(line) for line in (chosen / "scores-00000.jsonl").read_text().splitlines()]
    assert {f"{row['file']}:{row['part']}" for row in rows} == expected
    for number in range(2):
        wanted = [document.text for document in documents if document.id in expected and document.id[0] == str(number)]
        file = chosen / f"{number}.txt"
        assert (file.read_bytes().decode() if file.exists() else "") == mark.join(wanted)


def test_fields_are_called_as_configured_and_text_may_lie_in_several(pool: Prepared, tmp_path: Path) -> None:
    cuts = {document.id: pool.r.randint(0, len(document.text)) for document in pool.documents}

    def row(document: Document) -> dict[str, Any]:
        cut = cuts[document.id]
        return {"key": document.id, "title": document.text[:cut], "body": document.text[cut:], "score": "mine"}

    rows = [row(document) for document in pool.documents]
    file = write_lines(tmp_path / "in.jsonl", [json.dumps(each).encode() + b"\n" for each in rows])
    section = {"source": [str(file)], "text_field": ["title", "body"], "joined_by": "", "id_field": "key"}
    pool.choose(section, tmp_path, output={"score_field": "alike"})
    kept = [json.loads(line) for line in (tmp_path / "out" / "chosen" / "in.jsonl").read_text().splitlines()]
    assert {each["key"] for each in kept} == pool.chosen
    assert all(each.pop("alike") == pool.truth.scores[0][each["key"]] for each in kept)
    assert all(each in rows for each in kept)
    assert not (tmp_path / "out" / "rejected").exists()


def test_where_files_lie(pool: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files named twice, by ways up and down, through links, and beside what the selection writes itself."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    lines = [line_of(pool.r, document) for document in pool.documents]
    write_lines(tmp_path / "data" / "a.jsonl", lines[:45])
    write_lines(tmp_path / "other" / "b.jsonl", lines[45:])
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "other" / "b.jsonl")
    names = ["a.jsonl", "./sub/../a.jsonl", str(tmp_path / "data" / "a.jsonl"), "sub/../link.jsonl", "."]
    section = {"source": names, "suffixes": [".jsonl"], "id_field": "id"}
    targets = pool.write_targets(tmp_path)
    output = {"folder": "out", "work": "scores", "rejected": True}
    settings = settings_of(section, targets, "", budget={"documents": 25}, output=output)
    results = []
    for _ in range(2):  # the second time all that the first has written lies there
        assert select(settings, progress=QUIET)["pool"]["files"] == 2
        written = [str(file) for file in sorted(Path().rglob("*.jsonl"))]
        folders = ["", "out/chosen/", "out/rejected/"]
        assert written == [f"{folder}{name}" for folder in folders for name in ("a.jsonl", "link.jsonl")]
        assert set(chosen_ids(Path("out"))) == pool.chosen
        results.append(result_of(Path("out")))
    assert results[0] == results[1]


def test_no_selection_chooses_from_what_selections_wrote(
    pool: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not its own records and pages either, by whatever way they are found, and of others only what is asked for."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "harness.selection")
    data = tmp_path / "data"
    write_lines(data / "a.jsonl", [line_of(pool.r, document) for document in pool.documents])
    (tmp_path / "link").symlink_to(data)
    targets = pool.write_targets(tmp_path)

    def choose(source: str, folder: str, work: str | None = None) -> dict[str, Any]:
        section = {"source": [source], "suffixes": [".jsonl", ".html"], "id_field": "id"}
        caplog.clear()
        output = {"folder": folder, "work": work, "score_field": "alike" if folder == "deep" else "score"}
        return select(settings_of(section, targets, "", budget={"documents": 25}, output=output), progress=QUIET)

    assert choose("data", "data/one")["pool"]["files"] == 1
    assert "left out" not in caplog.text
    whole = result_of(data / "one")
    for source in ("link", "data", "data/**/*.jsonl"):
        assert choose(source, "data/one" if source == "data" else f"of-{len(source)}")["pool"]["files"] == 1
        [line] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        other = source != "data"
        assert ("written by other selections" in line) == other
        assert ("in this selection's own folders" in line) == (not other)
        assert (str((data / "one").resolve()) in line) == other
    assert result_of(data / "one") == whole
    assert choose("link", "data/two", "data/scores")["pool"]["files"] == 1
    assert choose("link", "data/two", "data/scores")["pool"]["files"] == 1
    for source in ("data/one/chosen", "data/*/chosen/*.jsonl"):
        shutil.rmtree("deep", ignore_errors=True)
        assert choose(source, "deep")["pool"]["files"] == 1 + ("*" in source)
        assert "left out" not in caplog.text
    with pytest.raises(HarnessError, match=r"left out of \d files: \d in this selection's own folders; that is all"):
        choose("data", "data")
