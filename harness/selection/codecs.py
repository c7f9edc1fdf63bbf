"""The compressors that a score may be taken with, and their levels: C(z) is the length of what each makes of z.

gzip's sizes come from sizes.py, which continues one compression for many targets. lz4 and zstd have no form of that
whose bytes would be those of the concatenated text, so for them every pair is compressed whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np

from harness.config import HarnessError

from .sizes import many_compressed_sizes
from .targets import Targets, check_level

Compressor = Literal["gzip", "lz4", "zstd"]
DEFAULT_LEVELS: dict[Compressor, int] = {"gzip": 9, "lz4": 0, "zstd": 3}
"""Each compressor's own default, in the package that is used."""


def check_compressor_level(compressor: Compressor, level: int) -> None:
    """HarnessError, with the reason, unless this compressor has this level."""
    if compressor == "gzip":
        check_level(level)
    elif compressor == "lz4" and not 0 <= level <= 12:
        raise HarnessError(
            f"level {level}: lz4 has levels 0 to 12, of which 0 to 2 are its fast form and 3 to 12 its thorough one; "
            "negative ones search less and less and come near to storing, whose scores rank by length alone"
        )
    elif compressor == "zstd" and not 1 <= level <= 22:
        raise HarnessError(
            f"level {level}: zstd has levels 1 to 22; its 0 means the default, 3, and negative ones leave what does "
            "not repeat uncompressed, so that scores come near to ranking by length alone"
        )


@dataclass(frozen=True)
class Codec:
    """A compressor at a level. C(z) is `len(gzip.compress(z, level))`, `len(lz4.frame.compress(z,
    compression_level=level))` or `len(zstandard.ZstdCompressor(level=level).compress(z))`.

    HarnessError for a level that the compressor lacks, and for lz4 where its package is not installed.
    """

    compressor: Compressor
    level: int

    def __post_init__(self) -> None:
        check_compressor_level(self.compressor, self.level)
        if self.compressor == "lz4":
            _lz4_frame()

    def sizes(self, texts: Sequence[bytes]) -> np.ndarray:
        """C(x) of every text: int64 [texts]."""
        if self.compressor == "gzip":
            return many_compressed_sizes(texts, None, self.level)[0]
        size = self._size()
        return np.array([size(text) for text in texts], dtype=np.int64)

    def pair_sizes(self, sources: Sequence[bytes], targets: Targets) -> tuple[np.ndarray, np.ndarray]:
        """C(x), int64 [sources], and C(x⊕y) of all pairs, int64 [sources, targets]."""
        if self.compressor == "gzip":
            return many_compressed_sizes(sources, targets, self.level)
        size, texts = self._size(), list(targets)
        together = [[size(source + target) for target in texts] for source in sources]
        return self.sizes(sources), np.array(together, dtype=np.int64).reshape(len(sources), len(targets))

    def _size(self) -> Callable[[bytes], int]:
        level = self.level
        if self.compressor == "lz4":
            compress = _lz4_frame().compress
            return lambda text: len(compress(text, compression_level=level))
        import zstandard

        stream = zstandard.ZstdCompressor(level=level)  # one a call: two threads may not share it
        return lambda text: len(stream.compress(text))


def _lz4_frame() -> ModuleType:
    try:
        return importlib.import_module("lz4.frame")
    except ImportError:
        raise HarnessError("compressor lz4 needs the package lz4: pip install lz4") from None
