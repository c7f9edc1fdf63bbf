"""Whether Triton's interpreter can run the kernels here, and how tests force small tiles and blocks on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from unittest import mock

import numpy

FIRST_WITH_NUMPY_2_4 = (3, 7)


def why_not() -> str | None:
    """The reason to skip; None: the interpreter works."""
    try:
        triton = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "triton is not installed"
    if triton < FIRST_WITH_NUMPY_2_4 and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"the interpreter of triton {version('triton')} fails with numpy {numpy.__version__} (fixed in 3.7)"
    return None


@contextmanager
def sizes(
    *, descriptors: bool, chunk: int | None = None, strip: int = 64, tiles_a_split: int | None = None
) -> Iterator[None]:
    """Tiles of 32 tokens by 64 columns, fetched through descriptors where the matrices allow it; blocks of `chunk`
    tokens by `strip` columns (multiples of the tile; None: as planned); so many tiles of columns a range."""
    from harness.kernels.linear_cross_entropy.fused import launch, passes, tilings
    from harness.kernels.linear_cross_entropy.fused.plan import Plan

    with mock.patch.object(tilings, "_read_cache", return_value={}):
        plain = [t for t in tilings.candidates(tilings.ProblemClass("facts", 0, 4, False, True)) if t.tokens == 32]
        order = sorted(plain, key=lambda tiling: tiling.descriptors != descriptors)
        patches = [mock.patch.object(tilings, "candidates", return_value=order if descriptors else order[:1])]
        if chunk is not None:
            patches.append(mock.patch.object(passes, "plan_blocks", return_value=Plan(chunk, strip)))
        if tiles_a_split is not None:
            patches.append(mock.patch.object(launch, "_tiles_a_split", return_value=tiles_a_split))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
