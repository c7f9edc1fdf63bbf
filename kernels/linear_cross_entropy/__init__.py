"""Cross-entropy of a linear head: hidden (..., D), weight (V, D) and targets (...) in, a `LossOutput` out.

The logits of the whole batch never exist, unless the float64 reference is asked for.
Read interface.py first (what it computes), then blocked.py (where the gradients are formed), sweep.py (one pass over
the tokens), chunk.py and gradient.py (the arithmetic); operator.py registers it all with torch.
"""

from .choice import machine_problem
from .comp_sum import CompSum, CrossEntropy
from .fused.plan import block_bytes
from .interface import linear_cross_entropy
from .sweep import chunk_length
from .types import IGNORE_INDEX, OUTPUTS, LossOutput, VocabShard

__all__ = [
    "IGNORE_INDEX",
    "OUTPUTS",
    "CompSum",
    "CrossEntropy",
    "LossOutput",
    "VocabShard",
    "block_bytes",
    "chunk_length",
    "linear_cross_entropy",
    "machine_problem",
]
