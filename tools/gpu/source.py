"""Finds harness.kernels in this repository, whether or not harness is installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_kernels() -> None:
    """Makes `import harness.kernels` take kernels/ of this repository, rather than of an installed harness."""
    sys.path.insert(0, str(ROOT))
    import harness

    if str(ROOT) not in harness.__path__:
        harness.__path__.append(str(ROOT))  # pyproject.toml maps kernels/ to harness.kernels
