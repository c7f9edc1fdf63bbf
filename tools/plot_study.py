"""Draw the differences of a selection study from its report.json.

python tools/plot_study.py runs/studies/selection/report.json docs/images/selection_study.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """A panel for each target, an arm a line, the modes side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    baseline = report["settings"]["arms"][0]["name"]
    key = f"minus_{baseline}"
    rows = [row for row in report["rows"] if key in row]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(1, len(targets), figsize=(5.2 * len(targets), 4), squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        mine = [row for row in rows if row["target"] == target]
        first = {row["arm"]: row[key]["mean"] for row in mine if row["mode"] == modes[0]}
        arms = sorted(first, key=lambda arm: -first[arm])
        for place, mode in enumerate(modes):
            some = [row for row in mine if row["mode"] == mode and row["arm"] in first]
            height = [arms.index(row["arm"]) + 0.2 * (place - (len(modes) - 1) / 2) for row in some]
            mean = [row[key]["mean"] for row in some]
            bars = [
                [row[key]["mean"] - row[key]["low"] for row in some],
                [row[key]["high"] - row[key]["mean"] for row in some],
            ]
            axis.errorbar(mean, height, xerr=bars, fmt="o", ms=4, capsize=2, label=mode)
        axis.axvline(0, color="0.6", lw=0.8)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_xlabel(f"bits per byte minus {baseline}'s")
        axis.set_title(target)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(modes))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    arguments.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.image, dpi=110)


if __name__ == "__main__":
    main()
