"""A trained model put to use: losses and bits per byte, per-token losses, generation, splicing, baselines, the
closing summary.

In: a run or checkpoint folder and the sections of config.py. Out: numbers and text. Read restore.py first.
"""

from .baselines import gzip_bits_per_byte, order2_bits_per_byte
from .config import EvaluateSection, GenerateSection, SummarySection
from .evaluate import evaluate
from .generate import complete, generate
from .restore import Restored, read_model, restore
from .splice import splice
from .splice_result import ArmResult, SpliceResult
from .summary import Summary

__all__ = [
    "ArmResult",
    "EvaluateSection",
    "GenerateSection",
    "Restored",
    "SpliceResult",
    "Summary",
    "SummarySection",
    "complete",
    "evaluate",
    "generate",
    "gzip_bits_per_byte",
    "order2_bits_per_byte",
    "read_model",
    "restore",
    "splice",
]
