"""A trained model put to use: losses and bits per byte, per-token losses, generation, baselines, the closing summary.

In: a run or checkpoint folder and the sections of config.py. Out: numbers and text. Read restore.py first.
"""

from .baselines import gzip_bits_per_byte, order2_bits_per_byte
from .config import EvaluateSection, GenerateSection, SummarySection
from .evaluate import evaluate
from .generate import complete, generate
from .restore import Restored, restore
from .summary import Summary

__all__ = [
    "EvaluateSection",
    "GenerateSection",
    "Restored",
    "Summary",
    "SummarySection",
    "complete",
    "evaluate",
    "generate",
    "gzip_bits_per_byte",
    "order2_bits_per_byte",
    "restore",
]
