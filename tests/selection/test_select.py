"""A selection from end to end, beside what its definition says, document by document."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from harness.config import HarnessError
from harness.selection import select
from harness.selection.tasks import Worker
from tests.selection.pools import (
    QUIET,
    Document,
    Truth,
    chosen_ids,
    code,
    draw_pool,
    draw_targets,
    files_below,
    line_of,
    read_rows,
    result_of,
    settings_of,
    take,
    words,
    write_lines,
    write_texts,
)


@dataclass
class Prepared:
    """A pool of three files and its truth for two sets of targets."""

    seed: int
    folder: Path
    documents: list[Document]
    truth: Truth
    files: list[Path]
    targets: Path
    more_targets: Path

    @property
    def both(self) -> list[dict[str, Any]]:
        return [
            {"name": "code", "source": [str(self.targets)], "share": 2},
            {"name": "more", "source": [str(self.more_targets)], "documents": [1, 4], "share": 1},
        ]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    seed = random.randrange(10**9)
    r = random.Random(seed)
    folder = tmp_path_factory.mktemp("pool")
    targets, more = draw_targets(r), [words(r, 40), *(code(r, 300) for _ in range(3)), words(r, 40)]
    documents = draw_pool(r, targets, 220)
    lines = [line_of(r, document) for document in documents]
    names = ["a.jsonl", "b/c.jsonl.gz", "b/d.jsonl.zst"]
    files = [write_lines(folder / "in" / name, lines[start::3]) for start, name in enumerate(names)]
    return Prepared(
        seed,
        folder,
        documents,
        Truth(documents, targets, more[1:4]),
        files,
        write_texts(folder / "targets.jsonl", targets),
        write_texts(folder / "more.jsonl.gz", more),
    )


def choose(pool: Prepared, folder: Path, targets: Any = None, **sections: Any) -> dict[str, Any]:
    return select(settings_of(pool.files, targets or pool.targets, folder, **sections), progress=QUIET)


@pytest.mark.parametrize("exact", [True, False])
def test_documents(pool: Prepared, tmp_path: Path, exact: bool) -> None:
    for budget in (1, 40):
        folder = tmp_path / str(budget)
        summary = choose(pool, folder, budget={"documents": budget}, racing={"exact": exact})
        assert set(chosen_ids(folder)) == pool.truth.take(budget)
        rows = read_rows(folder / "chosen")
        assert {row["id"]: row["score"] for row in rows} == {row["id"]: pool.truth.scores[0][row["id"]] for row in rows}
        threshold = json.loads((folder / "selection.json").read_text())["thresholds"]["code"]
        assert threshold == min(row["score"] for row in rows)
        assert summary["chosen"]["documents"] == len(rows) == budget
        assert summary["pool"]["documents"] == sum(bool(d.text.strip()) for d in pool.documents)
        assert summary["pool"]["empty"] == sum(not d.text.strip() for d in pool.documents)
        assert summary["pool"]["duplicates_exact"] == summary["pool"]["documents"] - len(pool.truth.eligible)
        assert summary["chosen"]["bytes"] == sum(len(row["text"].encode()) for row in rows)
        assert (summary["recall"] is None) == exact


@pytest.fixture
def _no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is inspected that need not be."""
    monkeypatch.setattr("harness.selection.choice.SLACK", 0)
    monkeypatch.setattr("harness.selection.choice.Choice._typical_weight", lambda choice: 0)


@pytest.mark.usefixtures("_no_slack")
def test_bytes(pool: Prepared, tmp_path: Path) -> None:
    sizes = {document.id: len(document.text.encode()) for document in pool.documents}
    for budget in (random.randint(1, 3000), random.randint(3000, 60_000)):
        folder = tmp_path / str(budget)
        choose(pool, folder, budget={"bytes": budget})
        expected = pool.truth.take(budget, lambda document: sizes[document.id])
        assert set(chosen_ids(folder)) == expected
        assert sum(sizes[name] for name in expected) <= budget
        assert (folder / "chosen").is_dir(), "also where the best document is larger than the budget"


@pytest.fixture(scope="module")
def tokenizer(pool: Prepared) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([document.text[:400] for document in pool.truth.eligible[:60]]),
        model_prefix=str(pool.folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        character_coverage=0.98,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return pool.folder / "tokenizer.model"


@pytest.mark.usefixtures("_no_slack")
def test_tokens(pool: Prepared, tokenizer: Path, tmp_path: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = {document.id: len(model.encode(document.text)) + 1 for document in pool.documents}
    for budget in (random.randint(50, 600), random.randint(600, 30_000)):
        folder = tmp_path / str(budget)
        summary = choose(pool, folder, budget={"tokens": budget, "tokenizer": str(tokenizer)})
        expected = pool.truth.take(budget, lambda document: tokens[document.id])
        assert set(chosen_ids(folder)) == expected
        assert summary["chosen"]["tokens"] == sum(tokens[name] for name in expected)


def test_a_budget_that_only_a_closer_look_finds_too_large(pool: Prepared, tokenizer: Path, tmp_path: Path) -> None:
    """Leaks count first, and tokens, of which there are more than a first guess says."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    left = {document.id for document in pool.truth.ranking()}
    assert len(left) < len(pool.truth.eligible)
    tokens = sum(len(model.encode(document.text)) + 1 for document in pool.truth.ranking())
    work = str(tmp_path / "work")
    for unit, have in (("documents", len(left)), ("tokens", tokens)):
        section: dict[str, Any] = {"tokenizer": str(tokenizer)} if unit == "tokens" else {}
        with pytest.raises(HarnessError, match=f"budget.{unit}: {have + 1:,} is more than the pool's {have:,} "):
            choose(pool, tmp_path / unit, budget=section | {unit: have + 1}, output={"work": work})
        assert not (tmp_path / unit / "chosen").exists()
        for name, more in (("all", {unit: have}), ("take", {unit: 2 * have, "when_short": "take"})):
            output = {"folder": str(tmp_path / unit / name), "work": work}
            choose(pool, tmp_path, budget=section | more, output=output)
            assert set(chosen_ids(tmp_path / unit / name)) == left


@pytest.mark.usefixtures("_no_slack")
@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_what_does_not_fit_is_looked_at_before_it_ends_the_choice(
    pool: Prepared, tokenizer: Path, tmp_path: Path, unit: str
) -> None:
    """It may be a leak, or have fewer tokens than its bytes let expect."""
    r = random.Random()
    targets = draw_targets(r, 3)
    texts = [
        code(r, r.randint(20, 200)) if r.random() < 0.5 else r.choice(targets) * 3 + words(r, 2) for _ in range(60)
    ]
    texts += [r.choice(["return ", "self."]) * r.randint(5, 80) for _ in range(30)]
    documents = [Document(f"{number}", text, "") for number, text in enumerate(texts)]
    truth = Truth(documents, targets)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    weights = {d.id: len(d.text.encode()) if unit == "bytes" else len(model.encode(d.text)) + 1 for d in documents}
    files = [write_lines(tmp_path / "in.jsonl", [line_of(r, document) for document in documents])]
    aims = write_texts(tmp_path / "targets.jsonl", targets)
    section = {"tokenizer": str(tokenizer)} if unit == "tokens" else {}
    for number in range(8):
        budget = r.randint(20, sum(weights[document.id] for document in truth.ranking()) // 2)
        folder = tmp_path / f"{number}"
        select(settings_of(files, aims, folder, budget=section | {unit: budget}), progress=QUIET)
        assert set(chosen_ids(folder)) == truth.take(budget, lambda document: weights[document.id])


def test_share_and_threshold(pool: Prepared, tmp_path: Path) -> None:
    share = random.random() / 2
    choose(pool, tmp_path / "share", budget={"share": share})
    assert set(chosen_ids(tmp_path / "share")) == pool.truth.take(max(1, int(share * len(pool.truth.eligible))))
    scores = pool.truth.scores[0]
    for limit in (random.choice(sorted(scores.values())), 5.0):
        choose(pool, tmp_path / str(limit), budget={"threshold": limit})
        expected = {document.id for document in pool.truth.ranking() if scores[document.id] >= limit}
        assert set(chosen_ids(tmp_path / str(limit))) == expected


def test_several_targets(pool: Prepared, tmp_path: Path) -> None:
    summary = choose(pool, tmp_path, pool.both, budget={"documents": 60})
    first = take(pool.truth.ranking(0, (0, 1)), 40, lambda document: 1)
    rest = [document for document in pool.truth.ranking(1, (0, 1)) if document.id not in first]
    second = take(rest, 20, lambda document: 1)
    rows = read_rows(tmp_path / "chosen")
    assert {row["id"] for row in rows if row["score_target"] == "code"} == first
    assert {row["id"] for row in rows if row["score_target"] == "more"} == second
    for row in rows:
        assert row["score"] == pool.truth.scores[row["score_target"] == "more"][row["id"]]
    assert [target["documents"] for target in summary["targets"]] == [12, 3]


def test_neither_workers_nor_part_sizes_show(pool: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.selection.kept.SMALL_SHARD_BYTES", 0)
    results = []
    for name, workers, rows, size in [("one", 1, 1 << 16, 1 << 18), ("two", 2, 30, 1000), ("four", 4, 50, 1)]:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for module in ("pool", "work"):
            monkeypatch.setattr(f"harness.selection.{module}.PART_ROWS", rows)
        monkeypatch.setattr("harness.selection.pool.BATCH_BYTES", size)
        monkeypatch.setattr("harness.selection.kept.KEPT_SHARE", workers - 1.0)  # nothing, and all
        monkeypatch.setattr(sys.modules["harness.selection.select"], "WORTH_A_PROCESS", 0 if workers == 2 else 999)
        near = {"remove": "near"}
        choose(pool, Path("out"), pool.both, workers=workers, output={"rejected": True}, duplicates=near)
        results.append((result_of(Path("out")), files_below(Path("out/rejected"))))
    assert results[0] == results[1] == results[2]
    assert len(results[0][1]) == 3


def test_the_files_that_documents_lie_in_do_not_show(pool: Prepared, tmp_path: Path) -> None:
    r = random.Random()
    expected = pool.truth.take(33)
    for deal in range(3):
        documents = r.sample(pool.documents, len(pool.documents))
        count = [1, 5, 25][deal]
        files = [
            write_lines(tmp_path / f"in{deal}" / f"{r.random()}.jsonl", [line_of(r, d) for d in documents[part::count]])
            for part in range(count)
        ]
        select(settings_of(files, pool.targets, tmp_path / f"{deal}", budget={"documents": 33}), progress=QUIET)
        assert set(chosen_ids(tmp_path / f"{deal}")) == expected


class Counted:
    """What workers of this process are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[str] = []
        self.scored: list[str] = []
        run = Worker.run

        def counted(worker: Worker, task: str, units: Any) -> Any:
            held = {"measure": self.measured, "score": self.scored}.get(task, [])
            held += [json.loads(unit.content)["id"] for unit in units]
            return run(worker, task, units)

        monkeypatch.setattr(Worker, "run", counted)


def test_another_budget_computes_no_score_again(
    pool: Prepared, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    weigh: dict[str, Callable[[Document], int]] = {
        "documents": lambda document: 1,
        "tokens": lambda document: len(model.encode(document.text)) + 1,
        "bytes": lambda document: len(document.text.encode()),
    }
    counted = Counted(monkeypatch)
    racing = {"audited_documents": 64, "headroom": 1.0, "margin": 30.0}
    for number, (unit, budget) in enumerate([("documents", 10), ("bytes", 20_000), ("tokens", 2000), ("documents", 5)]):
        output = {"folder": str(tmp_path / f"{number}"), "work": str(tmp_path / "work")}
        section = {unit: budget} | ({"tokenizer": str(tokenizer)} if unit == "tokens" else {})
        choose(pool, Path("unused"), budget=section, racing=racing, output=output)
        assert set(chosen_ids(tmp_path / f"{number}")) == pool.truth.take(budget, weigh[unit])
    assert len(counted.measured) == len(set(counted.measured)) == len(pool.documents)
    assert len(counted.scored) == len(set(counted.scored))


def test_the_race_loses_no_winner(tmp_path: Path) -> None:
    r = random.Random()
    targets = write_texts(tmp_path / "targets.jsonl", draw_targets(r, 24))
    documents = [Document(f"{n}", code(r, r.randint(30, 600)) if n % 2 else words(r, 40), "x") for n in range(3000)]
    files = [write_lines(tmp_path / "a.jsonl", [line_of(r, document) for document in documents])]
    results = []
    for exact in (True, False):
        racing = {"exact": exact, "audited_documents": 400}
        folder = tmp_path / f"{exact}"
        leaks = {"remove": False}
        settings = settings_of(files, targets, folder, budget={"documents": 60}, racing=racing, leaks=leaks)
        results.append((select(settings, progress=QUIET), chosen_ids(folder)))
    (_, expected), (summary, found) = results
    assert found == expected
    assert summary["pairs"]["evaluated"] < 0.8 * summary["pairs"]["all"]
    recall = summary["recall"]
    assert recall["estimate"] == 1
    assert recall["audited"] > 50
    assert 0.3 < recall["lower_95"] < 1


def test_what_is_left_out_makes_room_for_what_lost_the_race(tmp_path: Path) -> None:
    """The best of the pool are all leaks: those chosen in their place are the best of the rest, not of the scored."""
    r = random.Random()
    texts = draw_targets(r, 24)
    targets = write_texts(tmp_path / "targets.jsonl", texts)
    leaks = [Document(f"leak-{n}", f"{text} {words(r, 2)}", "x") for n, text in enumerate(texts * 10)]
    others = [Document(f"{n}", code(r, r.randint(30, 300)), "x") for n in range(600)]
    documents = leaks + others
    files = [write_lines(tmp_path / "a.jsonl", [line_of(r, document) for document in documents])]
    racing = {"audited_documents": 64, "headroom": 1.0, "margin": 1.0}
    for exact in (True, False):
        settings = settings_of(files, targets, tmp_path / f"{exact}", racing=racing | {"exact": exact})
        select(settings, progress=QUIET)
    found, expected = set(chosen_ids(tmp_path / "False")), set(chosen_ids(tmp_path / "True"))
    assert not any(name.startswith("leak") for name in expected)
    assert len(expected - found) <= 1, "the margin is what it is; 20 of 20 were missed when it was measured too early"
