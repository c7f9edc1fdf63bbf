"""Models of other formats in and out, each conversion with a proof; and any model's weights, read from where they lie.

`convert` makes a folder of one format of a folder of another; `open_source` gives what `evaluate`, `generate` and
`train.init_from` read. Read source.py first, then names.py and rules.py (the tables), then convert.py.
"""

from .convert import Conversion, convert
from .formats import FORMATS, open_source
from .harness_run import RunSource, is_run, locate_run
from .proof import Comparison, Proof, streamed_logits
from .source import ModelSource, decoder_shapes, refuse_frozen

__all__ = [
    "FORMATS",
    "Comparison",
    "Conversion",
    "ModelSource",
    "Proof",
    "RunSource",
    "convert",
    "decoder_shapes",
    "is_run",
    "locate_run",
    "open_source",
    "refuse_frozen",
    "streamed_logits",
]
