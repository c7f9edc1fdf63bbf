"""Near-duplicates beside exact Jaccard similarities, and documents that hold what they must not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.selection import select
from harness.selection.config import DuplicatesSection, LeaksSection
from harness.selection.leaks import LeakCheck
from harness.selection.repeats import find_exact_repeats
from harness.selection.signatures import Signer, find_repeats
from harness.selection.work import View
from tests.selection.pools import (
    QUIET,
    Document,
    Truth,
    chosen_ids,
    code,
    draw_targets,
    holds,
    line_of,
    settings_of,
    split_words,
    take,
    words,
    write_lines,
    write_texts,
)


def shingles(text: str, count: int = 5) -> set[tuple[str, ...]]:
    found = split_words(text)
    return {tuple(found[start : start + count]) for start in range(max(len(found) - count, 0) + 1)}


def jaccard(a: str, b: str) -> float:
    mine, theirs = shingles(a), shingles(b)
    return len(mine & theirs) / len(mine | theirs)


def changed(r: random.Random, text: str, count: int) -> str:
    """With some words replaced."""
    found = text.split(" ")
    for place in r.sample(range(len(found)), count):
        found[place] = f"new{r.randrange(10**9)}"
    return " ".join(found)


def alike(r: random.Random, text: str) -> str:
    """The same to all but the eye, or of a Jaccard similarity beyond 0.95."""
    kind = r.randrange(4)
    if kind == 0:
        return text.replace(" ", ",\n ")
    if kind == 1:
        return text.upper()
    return changed(r, text, 1) if kind == 2 else f"{text} {words(r, 2)}"


def test_estimates_are_near_the_exact_similarity() -> None:
    r = random.Random()
    signer = Signer(DuplicatesSection(permutations=256))
    errors = []
    for _ in range(40):
        text = words(r, r.randint(1, 300))
        other = changed(r, text, r.randint(0, len(text.split()) // 3))
        estimate = float((signer.sign(text) == signer.sign(other)).mean())
        errors.append(estimate - jaccard(text, other))
    assert max(map(abs, errors)) < 6 * 0.5 / 256**0.5
    assert abs(float(np.mean(errors))) < 0.02


def test_texts_without_words_repeat_only_themselves() -> None:
    signer = Signer(DuplicatesSection())
    signatures = [signer.sign(text) for text in ("?!", "--- ***", "😀🎉", " ?!\n", "", "one", "ONE")]
    assert find_repeats(signatures, DuplicatesSection()).tolist() == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("similarity", [0.5, 0.8])
def test_repeats_of_what_is_kept(similarity: float) -> None:
    """A chain a, b, c, each like the one before: b falls for a, and c, unlike a, stays."""
    r = random.Random()
    section = DuplicatesSection(similarity=similarity, permutations=512)
    texts, expected = [], []
    for _ in range(20):
        a = words(r, 400)
        b = changed(r, a, {0.5: 12, 0.8: 3}[similarity])
        c = changed(r, b, {0.5: 80, 0.8: 40}[similarity])
        texts += [a, b, c]
        assert jaccard(a, b) > similarity + 0.1
        assert jaccard(a, c) < similarity - 0.1
        expected += [False, True, False]
    signer = Signer(section)
    assert find_repeats([signer.sign(text) for text in texts], section).tolist() == expected


def test_what_is_chosen_for_one_set_of_targets_is_not_chosen_again_for_another(tmp_path: Path) -> None:
    r = random.Random()
    targets = draw_targets(r, 2)
    originals = [f"{words(r, 250)} {' '.join(code(r, 300).split())} {words(r, 250)}" for _ in range(15)]
    documents = [
        Document(f"{n}", text, "") for n, text in enumerate(originals + [alike(r, text) for text in originals])
    ]
    truth = Truth(documents, targets[:1], targets[1:])
    kept: list[Document] = []
    for target, budget in ((0, 8), (1, 5)):
        ranking = iter(truth.ranking(target, (0, 1)))
        wanted = len(kept) + budget
        while len(kept) < wanted:
            document = next(ranking)
            if not any(jaccard(document.text, other.text) >= 0.8 for other in kept):
                kept.append(document)
    files = [write_lines(tmp_path / "a.jsonl", [line_of(r, document) for document in documents])]
    aims = [
        {
            "name": name,
            "source": [str(write_lines(tmp_path / name, [json.dumps({"text": text}).encode()]))],
            "share": share,
        }
        for name, text, share in zip(("a.t.jsonl", "b.t.jsonl"), targets, (8, 5), strict=True)
    ]
    settings = settings_of(files, aims, tmp_path / "out", budget={"documents": 13}, duplicates={"remove": "near"})
    select(settings, progress=QUIET)
    assert set(chosen_ids(tmp_path / "out")) == {document.id for document in kept}


def test_the_best_of_near_duplicates_is_chosen_and_others_take_their_place(tmp_path: Path) -> None:
    r = random.Random()
    targets = draw_targets(r, 4)
    originals = [f"{words(r, 200)} {' '.join(code(r, 300).split())} {words(r, 200)}" for _ in range(25)]
    texts = originals + [alike(r, text) for text in originals for _ in range(r.randrange(4))]
    texts += [words(r, r.randint(1, 80)) for _ in range(40)]
    r.shuffle(texts)
    documents = [Document(str(number), text, "") for number, text in enumerate(texts)]
    truth = Truth(documents, targets)
    kept: list[Document] = []
    for document in truth.ranking():
        similar = [jaccard(document.text, other.text) for other in kept]
        assert all(not 0.6 < value < 0.95 for value in similar), "no pair is a matter of chance"
        if not any(value >= 0.8 for value in similar):
            kept.append(document)
    lines = [line_of(r, document) for document in documents]
    files = [write_lines(tmp_path / "a.jsonl", lines[::2]), write_lines(tmp_path / "b.jsonl", lines[1::2])]
    aims = write_lines(tmp_path / "t.jsonl", [json.dumps({"text": text}).encode() + b"\n" for text in targets])
    near: dict[str, Any] = {"remove": "near"}
    for budget in (1, 30, 50):
        settings = settings_of(files, aims, tmp_path / str(budget), budget={"documents": budget}, duplicates=near)
        summary = select(settings, progress=QUIET)
        expected = take(kept, budget, lambda document: 1)
        assert set(chosen_ids(tmp_path / str(budget))) == expected
        places = [index for index, document in enumerate(truth.ranking()) if document in kept][: budget + 1]
        least, most = (place + 1 - count for place, count in zip(places[-2:], (budget, budget + 1), strict=True))
        assert least <= summary["pool"]["duplicates_near"] <= most
    every: dict[str, Any] = {"duplicates": {"remove": "none"}, "leaks": {"remove": False}}
    settings = settings_of(files, aims, tmp_path / "none", budget={"documents": len(texts)}, **every)
    select(settings, progress=QUIET)
    assert len(chosen_ids(tmp_path / "none")) == len(texts)


def test_one_copy_of_each_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """That with the smallest hash of its id, however many rounds of hashes memory allows."""
    rng = np.random.default_rng()
    views = []
    for shard in range(3):
        count = int(rng.integers(0, 200))
        columns = {
            "usable": rng.random(count) < 0.8,
            "bytes": np.ones(count, dtype=np.int64),
            "digest": rng.integers(0, 12, (count, 2)).astype(np.uint64),
            "id_digest": rng.integers(0, 50, count).astype(np.uint64),
        }
        views.append(View(shard, 0, columns))
    best: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for view in views:
        for row in np.flatnonzero(view.measured["usable"]):
            key = tuple(view.measured["digest"][row].tolist())
            place = int(view.measured["id_digest"][row]), view.shard, int(row)
            best[key] = min(best.get(key, place), place)
    kept = {place[1:] for place in best.values()}
    for rows in (1 << 22, 50, 7):
        monkeypatch.setattr("harness.selection.repeats.ROWS_AT_ONCE", rows)
        repeated = find_exact_repeats(lambda: views, sum(map(len, views)))
        for view in views:
            usable = view.measured["usable"].tolist()
            expected = [found and (view.shard, row) not in kept for row, found in enumerate(usable)]
            assert repeated[f"{view.shard}-0"].tolist() == expected


def test_leaks_by_runs_of_words() -> None:
    r = random.Random()
    for _ in range(30):
        forbidden = [words(r, r.randint(0, 60)) for _ in range(5)]
        least = r.choice([1, 5, 20])
        section = LeaksSection(words=r.choice([3, 5, 13]), share=r.choice([0.1, 0.3, 1.0]), least_words=least)
        check = LeakCheck([text.encode() for text in forbidden], section)
        target = r.choice(forbidden).split()
        start = r.randint(0, len(target))
        piece = " ... ".join(target[start : start + r.randint(0, 60)])
        document = f"{words(r, 9)}; {piece.upper()}\n{words(r, 9)}"
        found = check.share(document) >= section.share
        looked_for = [text for text in forbidden if len(text.split()) >= least]
        assert found == holds(document, looked_for, section.words, section.share)
    three = LeaksSection(least_words=3)
    assert LeakCheck([b"one two three"], three).share("One, two: three!") == 1
    assert LeakCheck([b"one two three"], three).share("one two four three") == 0
    assert LeakCheck([b"?!", b""], LeaksSection(least_words=1)).share("?!") == 0
    assert LeakCheck([b"one two three four"], LeaksSection()).share("one two three four five") == 0


def test_what_holds_a_target_is_left_out_and_what_shares_its_words_is_not(tmp_path: Path) -> None:
    r = random.Random()
    targets = [words(r, 40) for _ in range(3)]
    answers = [words(r, 30) for _ in range(2)]

    def shuffled(text: str) -> str:
        found = text.split()
        r.shuffle(found)
        return " ".join(found)

    leaking = [f"{words(r, 20)}\n{text.replace(' ', '  ')}, {words(r, 20)}" for text in targets]
    against = [f"{words(r, 20)} ({text}) {targets[0][:99]}" for text in answers]
    honest = [shuffled(text) + " " + words(r, 20) for text in targets] + [words(r, 60) for _ in range(20)]
    texts = {"leak": leaking, "against": against, "honest": honest}
    documents = [Document(f"{kind}-{n}", text, "") for kind, each in texts.items() for n, text in enumerate(each)]
    file = write_lines(tmp_path / "pool.jsonl", [line_of(r, document) for document in documents])
    aims, forbidden = (
        write_texts(tmp_path / name, each) for name, each in (("targets.jsonl", targets), ("answers.jsonl", answers))
    )
    sections = [{"name": "answers", "source": [str(forbidden)]}]
    for name, leaks, missing in [
        ("none", {"remove": False}, ()),
        ("targets", {}, ("leak",)),
        ("both", {"against": sections}, ("leak", "against")),
    ]:
        budget = {"documents": len(documents), "when_short": "take"}
        settings = settings_of([file], aims, tmp_path / name, budget=budget, leaks=leaks)
        summary = select(settings, progress=QUIET)
        expected = {document.id for document in documents if document.id.split("-")[0] not in missing}
        assert set(chosen_ids(tmp_path / name)) == expected
        assert summary["pool"]["leaks"] == len(documents) - len(expected)
