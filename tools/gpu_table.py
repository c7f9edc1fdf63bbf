"""Writes README's table of GPU figures from the newest result of tools/gpu_check.py.

    python tools/gpu_table.py            # writes it
    python tools/gpu_table.py --check    # exit status 1 where README says something else

The newest is the one with the latest date inside, of those in benchmarks/ that a GPU made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu.goals import readme_lines

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu table: written by tools/gpu_table.py -->", "<!-- end of gpu table -->"


def newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest GPU result and its file; None where there is none."""
    found = []
    for path in sorted(folder.glob("gpu_check_*.json")):
        document = json.loads(path.read_text())
        if document["machine"].get("kind") == "cuda" and document["speed"]:
            found.append((document["date"], path, document))
    return (found[-1][2], found[-1][1]) if (found := sorted(found, key=lambda each: each[:2])) else None


def with_table(readme: str, lines: list[str]) -> str:
    """The text with what stands between the markers replaced. Raises ValueError where they are not there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the two lines {BEGIN!r} and {END!r}")
    return "\n".join([before + begin, *lines, end + after])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    result = newest(chosen.results)
    lines = readme_lines(None, "") if result is None else readme_lines(result[0], f"benchmarks/{result[1].name}")
    before = chosen.readme.read_text()
    after = with_table(before, lines)
    if chosen.check:
        return int(before != after)
    chosen.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
