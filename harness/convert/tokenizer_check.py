"""Whether a tokenizer.json that was made of a tokenizer does as that does, on a sample of texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.data import Tokenizer

logger = logging.getLogger(__name__)

SAMPLE = (
    "",
    " ",
    "       ",
    "a  b   c    d",
    " leading",
    "trailing ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t\tif x:\n        return y\n",
    "\u2581",
    "a\u2581\u2581 b",
    "0 12 345 6789 3.14159",
    "The quick brown fox, 'quoted' & <tagged/>; e.g. #1!",
    "éàü ß Ω ж",
    "e\u0301 a\u0308\u0302 \ufb01 Å",
    "日本語 中文 한국어",
    "😀👩‍👩‍👧‍👦🇩🇪",
    "\x00\x01\x7f\ufeff\ufffd\u00a0\u3000\u2028",
    "<unk><s></s><pad><0x41><|endoftext|>",
)
"""What tokenizers are known to treat differently."""
_STRETCH = 64
_SHOWN = 60


def compare(
    tokenizer: Tokenizer, definition: str, tied: Callable[[Sequence[int], Sequence[int]], bool] | None = None
) -> None:
    """Log a warning, naming a text, where the tokenizer.json `definition` gives other ids than `tokenizer`, or other
    text for the same ids. `tied` says of two ways to split a text whether the tokenizer finds neither better."""
    import tokenizers

    library: Any = tokenizers.Tokenizer.from_str(definition)
    library.encode_special_tokens = True  # as text that spells a special token is text here
    texts = sorted({*SAMPLE, *_own_texts(tokenizer)}, key=lambda text: (len(text), text))
    ours = tokenizer.encode_batch(texts)
    theirs = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    ties: list[str] = []
    other_ids: list[str] = []
    other_texts: list[str] = []
    for text, one, other in zip(texts, ours, theirs, strict=True):
        if one != other:
            (ties if tied is not None and tied(one, other) else other_ids).append(text)
        if library.decode(one) != tokenizer.decode(one):
            other_texts.append(text)
    for problem, found in (
        ("gives other tokens", other_ids),
        ("gives other tokens, which are as likely: its arithmetic breaks ties differently,", ties),
        ("gives other text for the same tokens", other_texts),
    ):
        if found:
            logger.warning(
                "tokenizer.json %s than %s in %d of %d texts, such as %r",
                problem,
                tokenizer.file_name,
                len(found),
                len(texts),
                found[0][:_SHOWN],
            )


def _own_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The vocabulary as text, piece by piece and in longer stretches."""
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces]
    yield from pieces
    for start in range(0, len(pieces), _STRETCH):
        yield "".join(pieces[start : start + _STRETCH])
