"""Compare harness.studies' reimplementation of DSIR with the authors' package, in a Python that has it installed.

python -m venv dsir && dsir/bin/pip install data-selection==1.0.3 "nltk<3.9"
python tools/check_dsir.py dsir/bin/python corpus.jsonl targets.jsonl     # the key `text`, a document a line
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from harness.studies.selection.dsir import log_weights

THEIRS = """
import sys
import numpy as np
from data_selection import HashedNgramDSIR
pool, targets, folder = sys.argv[1:]
dsir = HashedNgramDSIR([pool], [targets], folder, num_proc=1, min_example_length=0)
dsir.fit_importance_estimator(num_tokens_to_fit="all")
dsir.compute_importance_weights()
np.save(folder + "/weights.npy", np.load(dsir.log_importance_weights_dir / "0.npy"))
"""


def main(python: str, pool: str, targets: str) -> int:
    """Exit status 1 where a weight differs by more than rounding."""
    texts, wanted = (
        [json.loads(line)["text"] for line in Path(path).read_text().splitlines()] for path in (pool, targets)
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-c", THEIRS, pool, targets, folder], check=True, stderr=subprocess.DEVNULL)
        theirs = np.load(Path(folder) / "weights.npy")
    ours = log_weights(texts, wanted)
    worst = float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1.0)))
    print(f"{len(ours):,} documents, {len(wanted)} targets: largest relative difference {worst:.1e}")
    return int(worst > 1e-9)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:4]))
