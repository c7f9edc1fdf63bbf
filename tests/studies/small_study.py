"""A study small enough for tests: invented languages for text, byte tokens, a model of one narrow layer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from harness.config import validate
from harness.studies.selection.config import SelectionStudySection

ALPHABETS = {"stars": "abcde+*", "moons": "vwxyz=/"}
SIZES = {"windows": 40, "windows_a_draw": 25, "windows_a_document": 3}


def language(name: str, seed: int) -> Any:
    """A function that gives documents of lines of the words of a language, always others."""
    words_of = random.Random(name)
    words = ["".join(words_of.choices(ALPHABETS[name], k=words_of.randint(2, 7))) for _ in range(60)]
    generator = random.Random(f"{name} {seed}")

    def document(lines: int) -> str:
        return "".join(" ".join(generator.choices(words, k=generator.randint(3, 8))) + "\n" for _ in range(lines))

    return document


def write_texts(folder: Path) -> None:
    """A source of each language, as text files and as jsonl, and a benchmark in the first."""
    stars, moons = language("stars", 1), language("moons", 1)
    (folder / "stars").mkdir(parents=True)
    for number in range(20):
        (folder / "stars" / f"{number:02}.txt").write_text(stars(40))
    lines = [json.dumps({"first": moons(2), "second": moons(2)}) for _ in range(150)]
    (folder / "moons.jsonl").write_text("\n".join(lines) + "\n")
    items = language("stars", 2)
    (folder / "items.jsonl").write_text("".join(json.dumps({"text": items(3)}) + "\n" for _ in range(20)))


def small_study(folder: Path, **changes: Any) -> SelectionStudySection:
    """A study under `folder`, on text that is written there; `changes` replace whole keys."""
    if not (folder / "text").exists():
        write_texts(folder / "text")
    items = {"name": "items", "source": ["{data}/items.jsonl"], "part": "first half"}
    recipe = {"seen_tokens": 2000, "optimizer": {"learning_rate": 1e-2}, "schedule": {"kind": "constant"}}
    values: dict[str, Any] = {
        "kind": "selection",
        "folder": str(folder / "study"),
        "data_folder": str(folder / "text"),
        "draws": 1,
        "seeds": 1,
        "budget_tokens": 1200,
        "pool": {
            "window_bytes": [150, 250],
            "overlap_words": 6,
            "sources": [
                {"name": "stars", "source": ["{data}/stars"], "suffixes": [".txt"], **SIZES},
                {
                    "name": "moons",
                    "source": ["{data}/moons.jsonl"],
                    "text_field": ["first", "second"],
                    "joined": True,
                    **SIZES,
                },
            ],
        },
        "targets": [
            {"name": "sky", "target": items, "evaluation": {**items, "part": "second half"}, "in_domain": "stars"},
            {"name": "late", "target": items, "evaluation": {**items, "part": "second half"}, "held_back": True},
        ],
        "arms": [
            {"name": "random", "kind": "random"},
            {"name": "gain", "kind": "score", "score": {"method": "gain", "window_bytes": None}},
        ],
        "tokenizer": {"kind": "bytes"},
        "sequence_length": 32,
        "batch_sequences": 8,
        "model": {"family": "llama", "layers": 1, "hidden_size": 16, "heads": 2},
        "scratch": recipe,
        "resamples": 200,
    }
    return validate(SelectionStudySection, {**values, **changes}, "small_study")
