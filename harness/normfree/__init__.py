"""Normalisation removal: a fine-tuning that takes a model's norms away, site by site; what folds them into the weights,
and what proves that nothing is left of them.

In: a `norm_removal` section and a model with switchable norms. Out: a callback of the training loop, whose state in a
checkpoint says what is gone and at which sigma; of such a checkpoint a source for `harness.convert` of the model
without norms; a proof. Read removal.py first, then folding.py and proof.py.
"""

from .config import NormRemovalSection
from .folding import Folding, folded_section
from .proof import NormFreeProof, prove
from .quality import freezing_cost, measure, site_statistics
from .removal import NormRemoval, check_schedule
from .source import FoldedSource, open_folded

__all__ = [
    "FoldedSource",
    "Folding",
    "NormFreeProof",
    "NormRemoval",
    "NormRemovalSection",
    "check_schedule",
    "folded_section",
    "freezing_cost",
    "measure",
    "open_folded",
    "prove",
    "site_statistics",
]
