"""What a stranger is told by `harness select`: one line, status 2, and nothing that was there before is lost."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from harness.cli import main
from harness.config import dump_yaml
from harness.selection import select
from harness.selection.pool import Pool
from tests.selection.pools import (
    QUIET,
    chosen_ids,
    code,
    draw_pool,
    draw_targets,
    files_below,
    line_of,
    result_of,
    settings_of,
    write_lines,
    write_texts,
)

ROW = b'{"id": "x", "text": "def f(x): return x + 1"}\n'


def packed(compress: Callable[[bytes], bytes]) -> bytes:
    noise = random.randbytes(20_000).hex().encode()
    return compress(ROW + b'{"id": "y", "text": "' + noise + b'"}\n' + ROW)


def parquet(columns: dict[str, list[Any]]) -> bytes:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


class Place:
    """A folder with a configuration that works: a pool of 30 documents, of which 5 are chosen into out/."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        r = random.Random()
        lines = [line_of(r, document) for document in draw_pool(r, draw_targets(r), 40)]
        (folder / "in").mkdir()
        write_lines(folder / "in" / "good.jsonl", lines)
        write_texts(folder / "targets.jsonl", [code(r, 300) for _ in range(3)])
        section = {"source": [str(folder / "in")], "suffixes": [".jsonl", ".gz", ".zst", ".txt", ".parquet"]}
        aims, out = folder / "targets.jsonl", folder / "out"
        self.settings = settings_of(section | {"id_field": "id"}, aims, out, budget={"documents": 5})
        (folder / "select.yaml").write_text(dump_yaml(self.settings, comments=False))

    def run(self, *overrides: str) -> int:
        return main(["select", str(self.folder / "select.yaml"), *overrides])

    def refused(self, *overrides: str) -> str:
        """The line that the command gets; folder names shortened to {t}."""
        self._capsys.readouterr()
        assert self.run(*overrides) == 2
        lines = self._capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("harness select: error: ")]
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0], "the error is the last line"
        assert not any("Traceback" in line for line in lines)
        return errors[0].removeprefix("harness select: error: ").replace(str(self.folder), "{t}")

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out" / "report.json").read_text())
        return found


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, capsys)


# A file of the pool, what the line says after `pool: {t}/in/FILE: `, and how many documents `skip` leaves of it.
FILES: list[tuple[str, bytes | Callable[[], bytes], str, int]] = [
    ("a.jsonl", ROW + b'{"id": 1, "body": "x"}\n', "line 2: has no key 'text' (text_field); its keys are 'id'", 1),
    ("a.jsonl", ROW + b'{"id": 1, "text": "cut o', "line 2: not valid JSON (Unterminated string starting", 1),
    ("a.jsonl", ROW + b'{"id": 1, "text": "\xff"}\n' + ROW, "line 2: not UTF-8: byte 0xff (invalid start byte)", 1),
    ("a.jsonl", b'{"id": 1, "text": "\\ud83d"}\n', "line 1: the text holds half a surrogate pair, \\ud83d, whi", 0),
    ("a.jsonl", b'{"id": 1, "text": ["x"]}\n', "line 1: 'text' should be text, found a list", 0),
    ("a.jsonl", b"", "is empty: expected a JSON object a line", 0),
    ("a.txt", b"one\ntwo \xe9\n", "line 2: not UTF-8: byte 0xe9 (invalid continuation byte)", 0),
    ("a.jsonl.gz", lambda: packed(gzip.compress)[:-9000], "line 2: the gzip stream is truncated here, what fol", 1),
    ("a.jsonl.gz", ROW, "line 1: the gzip stream is corrupt here, what follows is lost (Not a gzipped file", 0),
    ("a.jsonl.zst", lambda: packed(zstandard.compress)[:-9], "line 1: the zstd stream is truncated here, what fol", 0),
    ("a.parquet", lambda: parquet({"id": ["x"], "body": ["y"]}), "has no column 'text' (text_field); its colum", 0),
    ("a.parquet", lambda: parquet({"id": ["x"], "text": ["y"]})[:-30], "cannot be read as parquet (", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line", "left"), FILES)
@pytest.mark.filterwarnings("ignore")
def test_bad_files(place: Place, name: str, content: bytes | Callable[[], bytes], line: str, left: int) -> None:
    if callable(content):
        content = content()
    good = select(place.settings, progress=QUIET)
    before = files_below(place.folder / "out" / "chosen")
    other = f"output.folder={place.folder}/other"
    (place.folder / "in" / name).write_bytes(content)
    said = place.refused(other)
    assert said.startswith(f"pool: {{t}}/in/{name}: ")
    assert line in said
    assert said.endswith("; mend or exclude it, or set pool.on_error=skip to leave such records out")
    assert not (place.folder / "other" / "chosen").exists()
    assert place.run(other, f"output.work={place.folder}/work", "pool.on_error=skip") == 0
    report = json.loads((place.folder / "other" / "report.json").read_text())
    [(reason, count)] = report["pool"]["skipped"].items()
    assert count == 1
    assert line.split(": ", 1)[-1][:20] in reason
    # `text` of the rows that are left is the same in all, so all but one of them are repeats
    left_over = report["pool"]["documents"] - good["pool"]["documents"] - report["pool"]["duplicates_exact"]
    assert left_over + good["pool"]["duplicates_exact"] == left
    assert files_below(place.folder / "out" / "chosen") == before


# Overrides, and what the line says.
SETTINGS: list[tuple[tuple[str, ...], str]] = [
    (("targets.0.source=[{t}/none.jsonl]",), "targets 'code': source '{t}/none.jsonl': no such file or folder"),
    (("targets.0.source=[]",), "targets.0: has no text: set `source` (files, folders, globs)"),
    (("targets=[]",), "command line: targets: is empty: name at least one, `- name: mine`"),
    (("targets.0.documents=[1, 9]",), "targets 'code': documents [1, 9]: there are only 3 in its files"),
    (("targets.0.documents=[2, 2]",), "command line: targets.0.documents: [2, 2] is no range: [first, end)"),
    (("targets.0.text_field=body",), "targets 'code': {t}/targets.jsonl: line 1: has no key 'body' (text_field); its"),
    (("targets.0.share=0",), "command line: targets.0.share: input should be greater than 0, got 0"),
    (("score.level=0",), "score: level 0: gzip stores without compressing, so every score is a function"),
    (("score.level=10",), "score: level 10: gzip has levels 1 to 9"),
    (("score.compressor=brotli",), "command line: score.compressor: 'brotli' is not one of gzip, lz4, zstd"),
    (("budget.documents=1000",), "budget.documents: 1,000 is more than the pool's "),
    (("budget={bytes: 100000000}",), "budget.bytes: 100,000,000 is more than the pool's "),
    (("budget.share=0.5",), "budget: say exactly one of documents, tokens, bytes, share, threshold; found doc"),
    (("budget={}",), "command line: budget: say exactly one of documents, tokens, bytes, share, threshold; fou"),
    (("budget={tokens: 5}",), "budget: tokens are counted by a tokenizer: set both `tokens` and `token"),
    (("budget={tokens: 5, tokenizer: {t}/none.model}",), "{t}/none.model: "),
    (("budget={tokens: 5, tokenizer: {t}/targets.jsonl}",), "budget.tokenizer: {t}/targets.jsonl: no tokenizer; give"),
    (("budget={tokens: 5, tokenizer: {t}}",), "{t}"),
    (("leaks.against=[{name: x}]",), "leaks.against: 'x' has no text: set `source` (files, folders, globs)"),
    (("pool.source=[{t}/nowhere/*.jsonl]",), "pool: source '{t}/nowhere/*.jsonl': no file matches this glob"),
    (("pool.suffixes=[.md]",), "pool: source '{t}/in': no file below this folder ends in .md"),
    (("output.folder={t}/targets.jsonl",), "{t}/targets.jsonl"),
    (("output.score_field=id",), "{t}/in/good.jsonl: line "),
    (("workers=0",), "command line: workers: input should be greater than or equal to 1, got 0"),
    (("outptu.folder=x",), "outptu: unknown key; did you mean output?"),
    (("distributed.engine=slurm",), "distributed: slurm needs a `partition`"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "line"), SETTINGS)
def test_bad_settings(place: Place, overrides: tuple[str, ...], line: str) -> None:
    said = place.refused(*(override.replace("{t}", str(place.folder)) for override in overrides))
    assert line in said
    assert not (place.folder / "out" / "chosen").exists()


def test_targets_without_text(place: Place) -> None:
    (place.folder / "targets.jsonl").write_bytes(b'{"text": " \\n"}\n{"text": ""}\n')
    assert place.refused() == "targets 'code': no text in 1 files, the first is {t}/targets.jsonl"
    (place.folder / "targets.jsonl").write_bytes(b"")
    assert place.refused().startswith("targets 'code': {t}/targets.jsonl: is empty: expected a JSON object a line")


def test_a_pool_without_text(place: Place) -> None:
    (place.folder / "in" / "good.jsonl").write_bytes(b'{"id": 1, "text": " \\n"}\n{"id": 2, "text": ""}\n')
    for more in ("budget.when_short=stop", "budget.when_short=take", "budget={threshold: 0.1}", "budget={share: 0.1}"):
        assert place.refused(more) == "pool: has no document with text: all are empty or unreadable"


def test_folders_of_other_selections(place: Place) -> None:
    assert place.run() == 0
    before = result_of(place.folder / "out")
    said = place.refused("budget.documents=6")
    assert said == (
        "{t}/out: has a finished selection by other settings (they differ in budget); choose another output.folder "
        "(with output.work={t}/out/work its scores are used again)"
    )
    other = f"output.folder={place.folder}/other", f"output.work={place.folder}/out/work"
    assert place.run(*other, "budget.documents=6") == 0
    assert set(chosen_ids(place.folder / "out")) < set(chosen_ids(place.folder / "other"))
    third = f"output.folder={place.folder}/third", other[1]
    for override, key in [
        ("score.level=1", "score"),
        ("pool.text_field=source", "pool"),
        ("racing.exact=true", "exact"),
    ]:
        said = place.refused(*third, override)
        assert said.startswith(f"{{t}}/out/work: holds the scores of another selection (it differs in {key}); choose")
    with (place.folder / "in" / "good.jsonl").open("ab") as file:
        file.write(ROW)
    assert "holds the scores of another selection (it differs in files)" in place.refused(*third)
    assert result_of(place.folder / "out") == before
    (place.folder / "out" / "selection.json").write_text("{")
    assert place.refused().startswith("{t}/out/selection.json: is damaged; choose another output.folder, or delete")


def test_a_folder_in_use(place: Place) -> None:
    for name, advice in (("out", "output.folder"), ("scores", "output.work")):
        (place.folder / name).mkdir(exist_ok=True)
        with (place.folder / name / ".lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("123")
            file.flush()
            said = place.refused(f"output.work={place.folder}/scores")
        assert said == f"{{t}}/{name}: process 123 is selecting here; wait for it, or choose another {advice}"


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_work(place: Place, damage: str) -> None:
    """Whatever is read of it is refused; what is not needed any more harms nobody."""
    rows = [b'{"id": %d, "text": "a%d"}\n' % (n, n) for n in range(99)]
    (place.folder / "in" / "good.jsonl").write_bytes(b"".join(rows))
    work, chosen = place.folder / "out" / "work", place.folder / "out" / "chosen"
    assert place.run() == 0
    kept, before = files_below(work), files_below(chosen)
    refused = set()
    for name in set(kept) - {".lock"}:
        data = bytearray(kept[name])
        if damage == "flip":
            data[len(data) // 2] ^= 0x80
        else:
            del data[len(data) // 2 :]
        (work / name).write_bytes(data)
        (place.folder / "out" / "selection.json").unlink(missing_ok=True)
        if place.run() != 0:
            refused.add(name)
            said = place.refused()
            assert said.startswith((f"{{t}}/out/work/{name}: is damaged (", "{t}/out/work: holds the scores of anot"))
        assert files_below(chosen) == before
        (work / name).write_bytes(kept[name])
    assert refused >= {"measure/shard-00000/part-0000.npz", "measure/shard-00000/done.json", "duplicates.npz"}
    assert refused >= {"round-000/plan.json", "round-000/shard-00000/part-0000.npz", "state.json"}


def test_a_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at any file that is flushed; each start gets a little further."""
    real, left = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    lines = []
    for room in range(0, 60, 3):
        left = room
        if (place.folder / "out" / "selection.json").exists():
            break
        lines.append(place.refused())
    assert len(lines) > 2
    assert all(line.startswith("{t}/out") for line in lines)
    assert all(line.endswith("cannot be written: No space left on device") for line in lines)
    monkeypatch.undo()
    assert place.run() == 0
    after = files_below(place.folder / "out" / "chosen")
    assert place.run(f"output.folder={place.folder}/whole") == 0
    assert after == files_below(place.folder / "whole" / "chosen")
    assert not list((place.folder / "out").rglob(".writing-*"))


def test_a_pool_that_changes_while_it_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    records, count = Pool.records, 0

    def touching(pool: Pool, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            os.utime(place.folder / "in" / "good.jsonl", (1, 1))
        elif count == 4:
            (place.folder / "in" / "good.jsonl").unlink()
        return records(pool, *arguments, **options)

    monkeypatch.setattr(Pool, "records", touching)
    said = place.refused()
    assert said.startswith("pool: {t}/in/good.jsonl: was changed while it was read; select again, into another output.")
    assert "is gone" in place.refused(f"output.folder={place.folder}/other")
    assert not (place.folder / "other" / "chosen").exists()


def test_a_line_that_changes_unseen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's size and time are what they were."""
    file, records, count = place.folder / "in" / "good.jsonl", Pool.records, 0

    def breaking(pool: Pool, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            time = file.stat().st_mtime_ns
            file.write_bytes(file.read_bytes().replace(b"{", b"("))
            os.utime(file, ns=(time, time))
        return records(pool, *arguments, **options)

    monkeypatch.setattr(Pool, "records", breaking)
    said = place.refused("leaks.remove=false")
    assert re.fullmatch(r"\{t}/in/good.jsonl: line \d+: was scored, and now not valid JSON \(.*\)", said)
    assert not (place.folder / "out" / "chosen").exists()


def test_a_folder_without_a_score_is_no_other_selections(place: Place) -> None:
    """Whoever follows the advice of the first error does not get another one for it."""
    broken = place.folder / "in" / "broken.jsonl"
    broken.write_text("{\n")
    said = place.refused()
    assert "set pool.on_error=skip" in said
    assert place.run("pool.on_error=skip") == 0


def test_nothing_chosen_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("budget.documents=null", "budget.threshold=99") == 0
    assert "nothing was chosen" in "".join(capsys.readouterr())


# Overrides of what is refused before a document has a score.
EARLY: list[tuple[str, ...]] = [
    ("targets.0.source=[{t}/none.jsonl]",),
    ("targets.0.documents=[1, 9]",),
    ("pool.source=[{t}/nowhere/*.jsonl]",),
    ("pool.source=[{t}/in/broken.jsonl]",),
    ("output.work={t}/scores", "score.level=1"),
    ("output.work={t}/free/work", "targets.0.text_field=body"),
]


@pytest.mark.parametrize("overrides", EARLY)
@pytest.mark.parametrize("there", [False, True])
def test_a_refused_command_leaves_nothing_behind(place: Place, overrides: tuple[str, ...], there: bool) -> None:
    """Neither folders nor locks, and what was there stays as it was."""
    assert place.run(f"output.work={place.folder}/scores") == 0
    (place.folder / "in" / "broken.jsonl").write_text("{\n")
    other = place.folder / "some" / "where"
    if there:
        other.mkdir(parents=True)
    before = {path: path.read_bytes() if path.is_file() else b"" for path in place.folder.rglob("*")}
    lock = place.folder / "scores" / ".lock"
    place.refused(f"output.folder={other}", *(each.replace("{t}", str(place.folder)) for each in overrides))
    after = {path: path.read_bytes() if path.is_file() else b"" for path in place.folder.rglob("*")}
    assert after | {lock: b""} == before | {lock: b""}


def test_a_command_that_is_refused_later_leaves_its_scores(place: Place) -> None:
    place.refused("budget.documents=1000")
    kept = {file: file.stat().st_mtime_ns for file in place.folder.glob("out/work/measure/*/*")}
    assert kept
    assert place.run() == 0
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_the_help_names_a_selection(capsys: pytest.CaptureFixture[str]) -> None:
    """What it names as an example can be selected."""
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "embedded configuration: selection" in said
    assert "quickstart" not in said
    assert "run folder" not in said
    assert main(["config", "selection"]) == 0
