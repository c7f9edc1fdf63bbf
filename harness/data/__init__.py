"""Text files or Megatron datasets in; tokenizers, .bin/.idx corpora and batches of tokens out.

`prepare` makes a `Prepared` folder, `TokenStream` reads it for training and `EvaluationWindows` for evaluation. Read
prepare.py first (how text becomes tokens), then stream.py (how tokens become batches).
"""

from .batch import IGNORED, Batch
from .config import CorpusSection, DataSection, TokenizerSection
from .evaluation import EvaluationWindows, text_bytes
from .prepare import prepare, prepare_for_training
from .prepared import Prepared, PreparedSplit, open_prepared
from .stream import TokenStream
from .tokenizer import Tokenizer, load_tokenizer, open_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "CorpusSection",
    "DataSection",
    "EvaluationWindows",
    "Prepared",
    "PreparedSplit",
    "TokenStream",
    "Tokenizer",
    "TokenizerSection",
    "load_tokenizer",
    "open_prepared",
    "open_tokenizer",
    "prepare",
    "prepare_for_training",
    "text_bytes",
]
