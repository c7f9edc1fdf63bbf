"""Random text and files of documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ALPHABETS = [
    "abcdefghij ",
    "  \t\n\r",
    "(){}[]:=+-_.,'\"\\/<>|",
    "0123456789",
    "éüßñçøåÀ",
    "日本語中文한국어",
    "😀👩‍👩‍👧‍👦🇩🇪\u200d\ufe0f",
    "\u2581\u2582\u2585\ufffd\ufeff\u00a0\u3000\u2028\u0085",
    "e\u0301\u0308a\u0302",
    "\x00\x01\x02\x07\x1b\x7f",
]


def random_text(rng: np.random.Generator, length: int) -> str:
    """Runs of characters from one alphabet after another."""
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        alphabet = ALPHABETS[rng.integers(len(ALPHABETS))] if rng.random() < 0.6 else ALPHABETS[0]
        parts.append("".join(rng.choice(list(alphabet), int(rng.integers(1, 12)))))
    return "".join(parts)[:length]


def random_documents(rng: np.random.Generator, count: int, longest: int = 200) -> list[str]:
    """Distinct documents that are not empty."""
    return [f"{number} {random_text(rng, int(rng.integers(1, longest)))}" for number in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path
