"""Draw a run's curves from its metrics.jsonl.

python tools/plot_run.py runs/quickstart docs/images/quickstart.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from harness import runs

PANELS = [
    ("loss", "loss (nats a token)"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    run = runs.read(arguments.run)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.4), constrained_layout=True)
    for axis, (column, label) in zip(axes, PANELS, strict=True):
        axis.plot(run.steps, run.column(column), linewidth=1, color="#2060a0", label="training")
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    validation = run.column("validation_loss")
    seen = ~np.isnan(validation)
    axes[0].plot(np.asarray(run.steps)[seen], validation[seen], "o-", color="#c04020", label="validation")
    axes[0].legend(frameon=False)
    figure.savefig(arguments.image, dpi=110)


if __name__ == "__main__":
    main()
