"""Which documents are most like the targets, by what compresses well together with them (ZIP-FIT, arXiv 2410.18194).

In: documents and target texts. Out: a score for each document, exact to the byte. Read scores.py first (the formulas),
then methods.py (the `score` section and the scorer of batches) and sizes.py (compressed sizes and what computes them);
native/ is the kernel in C.
"""

from .methods import Scorer, ScoreSection, open_scorer
from .scores import coverage, gain, ncd_alignment
from .sizes import Implementation, compressed_sizes, current_implementation
from .targets import Targets

__all__ = [
    "Implementation",
    "ScoreSection",
    "Scorer",
    "Targets",
    "compressed_sizes",
    "coverage",
    "current_implementation",
    "gain",
    "ncd_alignment",
    "open_scorer",
]
