"""Windows, what is removed from the pool, draws of it, and what the arms take of a draw."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from harness.config import HarnessError
from harness.selection import gain
from harness.studies.selection import arms
from harness.studies.selection.arms import Chooser
from harness.studies.selection.config import ArmSection, SelectionStudySection
from harness.studies.selection.dsir import log_weights
from harness.studies.selection.items import read_items, target_texts
from harness.studies.selection.pool import Pool, cut, near_duplicates, open_pool, overlapping
from tests.studies.small_study import SIZES, language, small_study

ARMS = [
    {"name": "random", "kind": "random"},
    {"name": "gain", "kind": "score", "score": {"method": "gain", "window_bytes": None}},
    {"name": "dsir", "kind": "dsir"},
    {"name": "dsir-top", "kind": "dsir", "sampled": False},
    {"name": "lengths", "kind": "length-matched", "matches": "gain"},
    {"name": "file-type", "kind": "file-type"},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SelectionStudySection:
    return small_study(tmp_path_factory.mktemp("pool"), arms=ARMS)


@pytest.fixture(scope="module")
def pool(config: SelectionStudySection) -> Pool:
    return open_pool(config)


def test_windows_have_one_length_law_and_lose_nothing_inside() -> None:
    generator = random.Random()
    for longest_line in (30, 90):
        lines = ["x" * generator.randint(0, longest_line) + "\n" for _ in range(20_000)]
        text = "".join(lines)
        windows = list(cut([lines], (400, 600), generator, most=10**6))
        assert text.startswith("".join(windows))
        assert len(text) - len("".join(windows)) < 1200
        assert all(window.endswith("\n") for window in windows)
        assert np.mean([len(window) for window in windows]) == pytest.approx(500, abs=15)
        assert min(map(len, windows)) > 400 - longest_line
        assert max(map(len, windows)) < 600 + longest_line


def test_long_lines_are_cut_between_words() -> None:
    line = "ein Wort " * 1000
    windows = list(cut([[line]], (400, 600), random.Random(1), most=10**6))
    assert line.startswith("".join(windows))
    assert len(windows) > 10
    assert all(300 < len(window) < 700 and window.endswith(" ") for window in windows)
    assert all(150 <= len(window) <= 350 for window in cut([["ß" * 5000]], (400, 600), random.Random(1), most=10**6))


def test_a_document_gives_at_most_so_many_windows() -> None:
    documents = [[f"{number} {line}\n" for line in range(500)] for number in range(3)]
    windows = list(cut(documents, (100, 200), random.Random(2), most=4))
    assert [sum(window.startswith(f"{number} ") for window in windows) for number in range(3)] == [4, 4, 4]


def test_duplicates_are_found_and_others_kept() -> None:
    document = language("stars", 5)
    texts = [document(30) for _ in range(40)]
    words = texts[3].split(" ")
    nearly = " ".join(word if place != 20 else "other" for place, word in enumerate(words))
    assert near_duplicates([*texts, nearly, texts[7], "short", "short"], 0.6) == {40, 41, 43}


def test_overlap_is_of_consecutive_words_whatever_stands_between() -> None:
    benchmark = ["if the quick brown fox jumps over it", "short"]
    windows = ["The QUICK, brown\n(fox) jumps!", "the quick brown cat jumps", "fox brown quick the jumps", ""]
    assert overlapping(windows, benchmark, 5) == {0}


def test_the_pool_has_windows_of_all_sources_and_none_of_the_benchmark(config: SelectionStudySection) -> None:
    pool = open_pool(config)
    assert {window.source for window in pool.windows} == {"stars", "moons"}
    assert len({window.text for window in pool.windows}) == len(pool.windows) >= 2 * SIZES["windows_a_draw"]
    assert pool.tokens.tolist() == [window.size + 1 for window in pool.windows]  # bytes, and an end of text
    joined = [window.text for window in pool.windows if window.source == "moons"]
    assert any("\n\n" in text for text in joined)


@pytest.mark.parametrize("kind", ["target", "evaluation"])
def test_text_of_a_benchmark_is_dropped(tmp_path: Path, kind: str) -> None:
    config = small_study(tmp_path)
    items = read_items(config, getattr(config.targets[0], kind))
    for number in range(3):
        other = language("stars", number + 9)
        (tmp_path / "text" / "stars" / f"leak{number}.txt").write_text(other(4) + items[number] + other(9))
    assert open_pool(config).record["sources"]["stars"]["overlapping"] >= 3


def test_another_pool_is_refused(config: SelectionStudySection, pool: Pool) -> None:
    with pytest.raises(HarnessError, match="pool was made with other settings"):
        open_pool(config.model_copy(update={"seed": 99}))


def test_draws_differ_and_are_the_same_again(config: SelectionStudySection, pool: Pool) -> None:
    first, again, other = pool.draw(config, 0), pool.draw(config, 0), pool.draw(config, 1)
    assert first.tolist() == again.tolist()
    assert set(first) != set(other)
    for draw in (first, other):
        sources = [pool.windows[number].source for number in draw]
        assert (sources.count("stars"), sources.count("moons")) == (25, 25)
        assert len(set(draw.tolist())) == 50


def test_every_arm_fills_the_budget_and_no_more(config: SelectionStudySection, pool: Pool) -> None:
    chooser = Chooser(config, pool, config.targets[0], 0)
    for arm in config.arms:
        choice = chooser.choose(arm, 0)
        assert choice.tokens == pool.tokens[choice.windows].sum()
        assert config.budget_tokens - pool.tokens.max() < choice.tokens <= config.budget_tokens
        assert len(set(choice.windows.tolist())) == len(choice.windows)
        assert set(choice.windows) <= set(chooser.draw)
        assert (chooser.choose(arm, 0).windows == choice.windows).all()


def test_scores_rank_by_the_room_that_computes_them(config: SelectionStudySection, pool: Pool) -> None:
    chooser = Chooser(config, pool, config.targets[0], 0)
    texts = [pool.windows[number].text for number in chooser.draw]
    targets = target_texts(config, config.targets[0])
    for arm, expected in (("gain", gain(texts, targets)), ("dsir-top", log_weights(texts, targets))):
        order = chooser.order(config.arm(arm), 0)
        assert (np.diff(expected[order]) <= 0).all()
        assert sorted(order.tolist()) == list(range(50))
        assert chooser.describe(chooser.choose(config.arm(arm), 0))["in_domain"] == 1.0


def test_stochastic_arms_follow_the_seed_and_others_do_not(config: SelectionStudySection, pool: Pool) -> None:
    chooser = Chooser(config, pool, config.targets[0], 0)
    for arm in config.arms:
        same = chooser.order(arm, 0).tolist() == chooser.order(arm, 1).tolist()
        if arm.kind != "dsir":  # of which the weights may leave the noise no say
            assert same != arm.is_stochastic, arm.name


def test_file_type_is_of_the_domain_and_lengths_are_matched(config: SelectionStudySection, pool: Pool) -> None:
    chooser = Chooser(config, pool, config.targets[0], 0)
    choice = chooser.choose(config.arm("file-type"), 0)
    assert {pool.windows[number].source for number in choice.windows} == {"stars"}
    assert chooser.describe(choice)["sources"] == {"stars": len(choice.windows), "moons": 0}


def test_length_matched_windows_have_the_lengths_but_not_the_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched to an arm that takes the shortest only."""
    monkeypatch.setattr(arms, "NEAREST", 8)  # of 200: a draw of a real study has thousands
    sizes = {"windows": 300, "windows_a_draw": 200, "windows_a_document": 60}
    base = small_study(tmp_path)
    sources = [source.model_copy(update=sizes) for source in base.pool.sources[1:]]
    stars = language("moons", 8)
    lines = "".join(f'{{"first": "{stars(1).strip()}", "second": "{stars(3)!r}"}}\n' for _ in range(2000))
    (tmp_path / "text" / "moons.jsonl").write_text(lines.replace("'", ""))
    config = base.model_copy(update={"pool": base.pool.model_copy(update={"sources": tuple(sources)}), "targets": ()})
    pool = open_pool(config)
    chooser = Chooser(config, pool, None, 0)
    size = np.array([pool.windows[number].size for number in chooser.draw])
    shortest = chooser._fill(np.argsort(size))
    chosen = chooser._fill(chooser._match_lengths(shortest, np.random.default_rng()))
    means = [np.mean([pool.windows[n].size for n in windows]) for windows in (shortest.windows, chosen.windows)]
    assert means[1] == pytest.approx(means[0], abs=15) != pytest.approx(size.mean(), abs=15)
    assert len(set(shortest.windows) & set(chosen.windows)) < 0.8 * len(chosen.windows)


def test_a_budget_beyond_the_share_of_the_domain_is_refused(config: SelectionStudySection, pool: Pool) -> None:
    Chooser(config, pool, config.targets[0], 0).check_budget()
    greedy = config.model_copy(update={"largest_share": 0.2})
    with pytest.raises(HarnessError, match=r"budget_tokens: 1200 is more than 0\.2 of the \d+ tokens of stars"):
        Chooser(greedy, pool, config.targets[0], 0).check_budget()
    with pytest.raises(HarnessError, match="more than an arm can choose from"):
        Chooser(config.model_copy(update={"budget_tokens": 10**6}), pool, config.targets[0], 0).choose(
            ArmSection(name="random", kind="random"), 0
        )


def test_halves_are_of_one_shuffled_file(config: SelectionStudySection) -> None:
    section = config.targets[0].target.model_copy(update={"shuffle_seed": 4})
    parts = [
        read_items(config, section.model_copy(update={"part": part})) for part in ("all", "first half", "second half")
    ]
    assert parts[0] == parts[1] + parts[2]
    assert len(parts[1]) == 10
    assert parts[0] != read_items(config, config.targets[0].target.model_copy(update={"part": "all"}))
    assert read_items(config, section.model_copy(update={"most": 3})) == parts[1][:3]
    with pytest.raises(HarnessError, match="no items left"):
        read_items(config, section.model_copy(update={"least_bytes": 10**6}))
