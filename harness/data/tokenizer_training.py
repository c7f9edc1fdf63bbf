"""Training a sentencepiece model, and choosing the text for it."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterator

from harness.config import HarnessError

from .config import TokenizerSection
from .sentencepiece_tokenizer import SPACE, SentencePieceTokenizer

PART_CHARACTERS = 1 << 16
SENTENCE_CHARACTERS = 2000
END_OF_TEXT = "<|endoftext|>"


class TrainingSample:
    """At most `max_bytes` of the text that is added, chosen by content hash: the same whatever the order.

    Documents are taken in parts, so that one huge file gives a sample of its text too. Holds the sample in memory.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._parts: list[tuple[int, str]] = []  # a heap, the part with the largest hash on top
        self._keys: set[int] = set()
        self._limit = 1 << 64  # hashes from here on have been dropped: a later part may not take their place

    def add(self, text: str) -> None:
        """Offer a document."""
        for start in range(0, len(text), PART_CHARACTERS):
            part = text[start : start + PART_CHARACTERS]
            key = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big")
            if key >= self._limit or key in self._keys:
                continue
            heapq.heappush(self._parts, (-key, part))
            self._keys.add(key)
            self._bytes += len(part.encode())
            while self._bytes > self._max_bytes and len(self._parts) > 1:
                negative, dropped = heapq.heappop(self._parts)
                self._limit = -negative
                self._keys.remove(-negative)
                self._bytes -= len(dropped.encode())

    def texts(self) -> list[str]:
        """The sample, in an order that depends on its content alone."""
        return [part for _, part in sorted(self._parts, reverse=True)]


def train_sentencepiece(texts: list[str], config: TokenizerSection) -> SentencePieceTokenizer:
    """A sentencepiece model of `config.vocab_size` pieces over `texts`.

    Nothing is lost in it: no normalisation, no added or removed spaces, and bytes for characters without a piece. Runs
    of spaces and a line's end may be pieces of their own, which keeps indented code short. The same texts give the
    same model, byte for byte. Raises HarnessError where the texts are too few for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # Every character in 10,000 that is left over is spelled in bytes, which cost 256 pieces already.
            character_coverage=0.9999,
            max_sentence_length=8 * SENTENCE_CHARACTERS,
            # A tenth of the library's default: four times faster, and not a byte per token lost on code.
            seed_sentencepiece_size=100_000,
            # Unigram sums its expectations by thread, so the number of threads is part of the result.
            num_threads=8,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        characters = sum(map(len, texts))
        reason = " ".join(str(error).split())
        raise HarnessError(
            f"data.tokenizer.vocab_size: a sentencepiece model of {config.vocab_size} pieces cannot be trained on "
            f"{characters} characters of text; set a smaller vocab_size or give more text ({reason})"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: list[str]) -> Iterator[str]:
    """Stretches of a few dozen lines, so that line ends and the indentation after them are seen together.

    U+2581 is left out because sentencepiece would learn it as a space, and NUL because it is its own end of string.
    """
    for text in texts:
        held: list[str] = []
        length = 0
        for line in text.replace(SPACE, "").replace("\0", "").split("\n"):
            for start in range(0, max(len(line), 1), SENTENCE_CHARACTERS):
                part = line[start : start + SENTENCE_CHARACTERS]
                held.append(part)
                length += len(part) + 1
                if length >= SENTENCE_CHARACTERS:
                    yield "\n".join(held)
                    held, length = [], 0
        if held:
            yield "\n".join(held)
