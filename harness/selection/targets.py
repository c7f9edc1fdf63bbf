"""The texts that documents are compared with."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from harness.config import HarnessError


def encode(text: bytes | str) -> bytes:
    """The bytes that are compressed: UTF-8. HarnessError for a string that has none (a lone surrogate)."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise HarnessError(f"text with a lone surrogate ({found}) has no UTF-8; give bytes instead") from None


def check_level(level: int) -> None:
    """HarnessError unless gzip really compresses at this level."""
    if level == 0:
        raise HarnessError(
            "level 0: gzip stores without compressing, so every score is a function of length alone and ranks the "
            "shortest first; choose 1 to 9"
        )
    if not 1 <= level <= 9:
        raise HarnessError(f"level {level}: gzip has levels 1 to 9")


def joined(texts: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    """Texts in one buffer, and where each begins and ends in it: int64, one more than there are texts."""
    return b"".join(texts), np.cumsum([0, *map(len, texts)], dtype=np.int64)


class Targets:
    """Target texts in one buffer, with their own compressed sizes; made once, used for every document.

    `buffer` holds them one behind the other; `offsets`, int64, one more than there are targets, says where each begins
    and ends. HarnessError where there is none. Pickles as these two; what is computed from them is computed again.
    """

    def __init__(self, texts: Iterable[bytes | str]) -> None:
        encoded = [encode(text) for text in texts]
        if not encoded:
            raise HarnessError("no targets: a score needs at least one text to compare with")
        self.buffer, self.offsets = joined(encoded)
        self._sizes: dict[int, np.ndarray] = {}
        self.prepared: dict[int, Any] = {}
        """By level: what sizes.py's native kernel keeps of them."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> bytes:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.buffer[self.offsets[index] : self.offsets[index + 1]]

    def __getstate__(self) -> dict[str, Any]:
        return {"buffer": self.buffer, "offsets": self.offsets, "_sizes": {}, "prepared": {}}

    @property
    def longest(self) -> int:
        """Bytes."""
        return int(np.diff(self.offsets).max())

    def sizes(self, level: int) -> np.ndarray:
        """C(y) of each target: int64 [targets], len(gzip.compress(y, level))."""
        check_level(level)
        if level not in self._sizes:
            self._sizes[level] = np.array([len(gzip.compress(text, level)) for text in self], dtype=np.int64)
            self._sizes[level].flags.writeable = False
        return self._sizes[level]

    def take(self, indices: Sequence[int] | np.ndarray) -> Targets:
        """Some of them, in the order given."""
        return Targets([self[int(index)] for index in indices])
