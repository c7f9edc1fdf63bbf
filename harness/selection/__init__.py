"""Which documents are most like the targets, by what compresses well together with them (ZIP-FIT, arXiv 2410.18194).

In: documents and target texts. Out: a score for each document, exact to the byte, and the chosen documents with all
that they came with. Read scores.py first (the formulas), methods.py (the `score` section and the scorer of batches),
sizes.py (compressed sizes and what computes them; native/ is the kernel in C); then select.py (the passes of a
selection), choice.py and racing.py (who is chosen, and who need not be scored for it).
"""

from .config import SelectSettings
from .methods import Scorer, ScoreSection, open_scorer
from .scores import coverage, gain, ncd_alignment
from .select import select
from .sizes import Implementation, compressed_sizes, current_implementation
from .targets import Targets

__all__ = [
    "Implementation",
    "ScoreSection",
    "Scorer",
    "SelectSettings",
    "Targets",
    "compressed_sizes",
    "coverage",
    "current_implementation",
    "gain",
    "ncd_alignment",
    "open_scorer",
    "select",
]
