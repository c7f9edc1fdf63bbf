"""Exact sizes of gzip.compress(source + target, level) for one source and many targets.

Three ways to the same numbers, of which the fastest that is right on this machine is used:

- `native`: harness.selection.deflate_sizes, built from native/. It runs zlib's deflate on the source once, continues
  with each target without writing output, and takes that back.
- `zlib`: the same with a copy of Python's own compressor for each target.
- `naive`: gzip.compress itself.

The first two promise the bytes of zlib as Mark Adler's library makes them. A Python may be linked to another library
of that interface (zlib-ng, Intel's, Cloudflare's), whose bytes differ: both are compared with gzip.compress on a fixed
set of inputs before their first use in a process, and refused, with a line in the log, if one size is wrong.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import logging
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .targets import Targets, check_level, joined

logger = logging.getLogger("harness.selection")

KERNEL = "harness.selection.deflate_sizes"
GZIP_BYTES = 18
"""A gzip file's header and trailer."""
MIN_LOOKAHEAD = 262
"""deflate looks for a repeat only with this many bytes ahead of it, until the input ends."""
LONGEST_NATIVE = 1 << 30
"""Bytes of source and target together that the kernel's 32-bit positions are good for."""


@dataclass(frozen=True)
class Implementation:
    """What computes sizes in this process, and why that."""

    name: str
    """native, zlib or naive."""
    reason: str


def compressed_sizes(
    source: bytes, targets: Targets, level: int, implementation: str | None = None
) -> tuple[int, np.ndarray]:
    """C(x) and C(x⊕y) for every target y, int64 [targets], where C(z) = len(gzip.compress(z, level)).

    `level` is 1 to 9, else HarnessError. `implementation` names one (for tests and measurements); by default it is
    that of `current_implementation()`. The GIL is released while the native one works.
    """
    alone, together = many_compressed_sizes([source], targets, level, implementation)
    return int(alone[0]), together[0]


def many_compressed_sizes(
    sources: Sequence[bytes], targets: Targets | None, level: int, implementation: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same of many sources in one call, which costs less: C(x), int64 [sources], and C(x⊕y), int64 [sources,
    targets]; without targets, the second has no columns.
    """
    check_level(level)
    name = implementation or current_implementation().name
    if name == "native":
        longest = max(map(len, sources), default=0) + (targets.longest if targets else 0)
        if longest <= LONGEST_NATIVE:
            return _sizes_by_kernel(sources, targets, level)
        _say_too_long()
    sizes = _sizes_naively if name == "naive" else _sizes_by_copies
    rows = [sizes(source, targets or (), level) for source in sources]
    both = np.array(rows, dtype=np.int64).reshape(len(sources), 1 + (len(targets) if targets else 0))
    return both[:, 0], both[:, 1:]


@functools.cache
def current_implementation() -> Implementation:
    """The fastest implementation that gives this Python's own sizes; found and logged once in a process."""
    library = f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
    against = []
    module = _load_kernel()
    if isinstance(module, ImportError):
        against.append(_why_no_kernel(module))
    elif _agrees("native"):
        found = Implementation("native", f"it agrees with {library} on the inputs of the check")
        logger.info("compressed sizes by %s: %s", found.name, found.reason)
        return found
    else:
        against.append(f"the native kernel's sizes are not those of {library}, another deflate than it follows")
    if not _agrees("zlib"):
        against.append(f"{library} compresses a stream in parts to another size than in one call")
    found = Implementation("naive" if len(against) > 1 else "zlib", "; ".join(against))
    logger.warning("compressed sizes by %s, slower than by the native kernel: %s", found.name, found.reason)
    return found


@functools.cache
def _say_too_long() -> None:
    logger.warning(
        "a document and a target of more than %d MiB together: their compressed sizes come from Python's zlib, slower",
        LONGEST_NATIVE >> 20,
    )


def kernel() -> ModuleType | None:
    """The native module, where it was built."""
    module = _load_kernel()
    return None if isinstance(module, ImportError) else module


def _load_kernel() -> ModuleType | ImportError:
    try:
        return importlib.import_module(KERNEL)
    except ImportError as error:
        return error


def _why_no_kernel(error: ImportError) -> str:
    """What is known: not why a kernel that is not there was not built."""
    if isinstance(error, ModuleNotFoundError):
        return (
            "the native kernel is not in this installation (`pip install -v` of harness compiles it, or says why it "
            "cannot)"
        )
    return f"the native kernel is there but cannot be loaded ({' '.join(str(error).split())})"


def _sizes_by_kernel(sources: Sequence[bytes], targets: Targets | None, level: int) -> tuple[np.ndarray, np.ndarray]:
    deflate_sizes = kernel()
    assert deflate_sizes is not None  # what is named native has been found
    if targets is None:
        prepared = _prepare_nothing(deflate_sizes, level)
    elif level in targets.prepared:
        prepared = targets.prepared[level]
    else:
        prepared = targets.prepared[level] = deflate_sizes.prepare(targets.buffer, targets.offsets, level)
    alone = np.empty(len(sources), dtype=np.int64)
    together = np.empty((len(sources), len(targets) if targets else 0), dtype=np.int64)
    deflate_sizes.sizes(prepared, *joined(sources), alone, together)
    return alone, together


@functools.cache
def _prepare_nothing(deflate_sizes: ModuleType, level: int) -> Any:
    return deflate_sizes.prepare(b"", np.zeros(1, dtype=np.int64), level)


def _sizes_naively(source: bytes, targets: Iterable[bytes], level: int) -> list[int]:
    return [len(gzip.compress(source + target, level)) for target in (b"", *targets)]


def _sizes_by_copies(source: bytes, targets: Iterable[bytes], level: int) -> list[int]:
    texts = [b"", *targets]
    primed, written, rest = _prime(source, max(map(len, texts)), level)

    def size(text: bytes) -> int:
        stream = primed.copy()
        return GZIP_BYTES + written + len(stream.compress(rest + text)) + len(stream.flush())

    return [size(text) for text in texts]


def _prime(source: bytes, longest: int, level: int) -> tuple[zlib._Compress, int, bytes]:
    """A raw stream that holds the source, how many bytes it has written, and the end of the source that it lacks."""
    # A copy costs what its window costs. A window in which no repeat can be too far away gives the same bytes, if its
    # hash table stays as large (memLevel).
    fits = (bits for bits in range(9, 15) if (1 << bits) - MIN_LOOKAHEAD >= len(source) + longest)
    stream = zlib.compressobj(level, zlib.DEFLATED, -next(fits, 15), zlib.DEF_MEM_LEVEL)
    # deflate moves its window at these positions or behind them, a byte earlier where input runs out just then; and a
    # window's first byte cannot be found again. So input must not run out there.
    window = 1 << 15
    first = 2 * window - MIN_LOOKAHEAD
    end = len(source)
    if end >= first and (end - first) % window < MIN_LOOKAHEAD:
        end -= MIN_LOOKAHEAD
    return stream, len(stream.compress(source[:end])), source[end:]


def _agrees(implementation: str) -> bool:
    """Whether an implementation gives gzip.compress's sizes on some hundred fixed inputs, in about 40 ms."""
    for source, targets, level in _check_inputs():
        found, expected = (compressed_sizes(source, targets, level, name) for name in (implementation, "naive"))
        if found[0] != expected[0] or not np.array_equal(found[1], expected[1]):
            return False
    return True


def _check_inputs() -> Iterator[tuple[bytes, Targets, int]]:
    """Texts and bytes, short and long, over the ends of blocks and windows, at every level."""
    generator = random.Random(8)
    words = ["".join(generator.choices("etaoinshrdlu_(", k=generator.randint(1, 9))) for _ in range(150)]

    def text(count: int) -> bytes:
        return " ".join(generator.choices(words, k=count)).replace("u ", "\n    ").encode()

    sources = [b"", b"a", text(50), text(350), generator.randbytes(400), b"ab" * 900 + text(9), text(60) * 5]
    targets = Targets([b"", b"xy", text(45), text(110), sources[3][-200:] + text(5), sources[4][50:330]])
    for level in range(1, 10):
        for source in sources:
            yield source, targets, level
    few = Targets([text(60)])
    skewed = bytes(byte & 31 for byte in generator.randbytes(16_380)) + text(20)
    for level in (1, 4, 9):
        yield skewed, few, level
        yield generator.randbytes(300) * 220, few, level
