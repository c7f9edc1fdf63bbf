"""Cross-entropy of a linear head: hidden (..., D), weight (V, D) and targets (...) in, a `LossOutput` out.

The logits of the whole batch never exist, unless the float64 reference is asked for.
Read interface.py first (what it computes), then blocked.py (how the gradients are formed) and sweep.py (one chunk).
"""

from .interface import linear_cross_entropy
from .sweep import chunk_length
from .types import IGNORE_INDEX, OUTPUTS, LossOutput, VocabShard

__all__ = ["IGNORE_INDEX", "OUTPUTS", "LossOutput", "VocabShard", "chunk_length", "linear_cross_entropy"]
