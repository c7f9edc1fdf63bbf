"""A sentencepiece model as a tokenizer.json of the `tokenizers` library.

Its vocabulary is written with spaces where sentencepiece has U+2581, so that a text that holds that character keeps it,
as in our own encoding (`harness.data`). A bpe model is the same there, id for id; a unigram model is but for ties (see
`SentencePieceModel.tied`). The algorithms: Kudo and Richardson 2018, "SentencePiece".
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import HarnessError

SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = (_UNKNOWN, _CONTROL, _BYTE)
_SWAPPED = str.maketrans({SPACE: " ", " ": SPACE})
_UNREACHABLE = -1e6
"""The score of what no text may become; any other way to spell a piece is likelier."""


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: int

    @property
    def spaced(self) -> str:
        """As a text spells it."""
        return self.text if self.type in _SPECIAL else self.text.translate(_SWAPPED)

    @property
    def occurs(self) -> bool:
        """Whether a text can become it: no space is left when sentencepiece looks for pieces."""
        return self.type in (_NORMAL, _USER_DEFINED) and " " not in self.text


@dataclass(frozen=True)
class SentencePieceModel:
    """What encoding with a model depends on."""

    pieces: Sequence[Piece]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    adds_space: bool
    removes_spaces: bool

    @classmethod
    def parse(cls, serialized: bytes) -> SentencePieceModel:
        """Read a serialised ModelProto (sentencepiece_model.proto); the model has been loaded by sentencepiece before.

        Its generated classes would tie us to the release of protobuf that they were generated with.
        """
        pieces: list[Piece] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(serialized):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, _NORMAL)))
            elif number == 2:
                trainer |= dict(_fields(value))
            elif number == 3:
                normalizer |= dict(_fields(value))
        return cls(
            pieces,
            algorithm=trainer.get(3, _UNIGRAM),
            byte_fallback=bool(trainer.get(35, False)),
            charsmap=normalizer.get(2, b""),
            adds_space=bool(normalizer.get(3, True)),
            removes_spaces=bool(normalizer.get(4, True)),
        )

    @property
    def keeps_space_symbol(self) -> bool:
        """Whether our encoding spells a literal U+2581 in bytes; elsewhere sentencepiece takes it for a space."""
        return not self.adds_space and sum(piece.type == _BYTE for piece in self.pieces) == 256

    def tied(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether these split the same text, in ways that a unigram model finds equally likely up to rounding.

        sentencepiece adds in fp32, `tokenizers` in fp64, so that each breaks ties by its own rounding errors.
        """
        ways = [[self.pieces[token] for token in ids] for ids in (one, other)]
        texts = ["".join(piece.text for piece in pieces) for pieces in ways]
        scores = [sum(piece.score for piece in pieces) for pieces in ways]
        return self.algorithm == _UNIGRAM and texts[0] == texts[1] and math.isclose(*scores, rel_tol=1e-5)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message of protocol buffers: an int, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[place : place + size]
        place += size


def write_tokenizer_json(model: SentencePieceModel, label: str) -> str:
    """The tokenizer.json of a model. Raises HarnessError, naming `label`, for one that is neither bpe nor unigram."""
    from tokenizers import AddedToken, Tokenizer, decoders

    if model.algorithm not in (_BPE, _UNIGRAM):
        raise HarnessError(f"{label}: is neither a bpe nor a unigram model, and no other can be a tokenizer.json")
    is_bpe = model.algorithm == _BPE
    tokenizer: Any = Tokenizer(_bpe(model) if is_bpe else _unigram(model))
    if (normalizer := _normalizer(model)) is not None:
        tokenizer.normalizer = normalizer
    if not is_bpe and (cutter := _split_unknown(model)) is not None:
        tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    hidden = [piece.text for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in hidden])
    if is_bpe:  # in unigram models these are pieces with scores that win
        symbols = [piece.spaced for piece in model.pieces if piece.type == _USER_DEFINED and piece.occurs]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in symbols])
    text: str = tokenizer.to_str()
    return text


def _bpe(model: SentencePieceModel) -> Any:
    """sentencepiece merges any neighbours that make a piece, the best piece first: every way to make it is a merge."""
    from tokenizers import models

    ids = {piece.spaced: token for token, piece in enumerate(model.pieces)}
    scores = {piece.spaced: piece.score for piece in model.pieces if piece.type in (_NORMAL, _UNUSED)}
    merges = [
        (score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda merge: -merge[0])  # keeps the order of equals
    return models.BPE(
        ids,
        [(left, right) for _, left, right in merges],
        unk_token=next((piece.text for piece in model.pieces if piece.type == _UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> Any:
    from tokenizers import models

    best = max((piece.score for piece in model.pieces if piece.type == _NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if not piece.occurs:
            return _UNREACHABLE
        if piece.type == _USER_DEFINED:  # by sentencepiece's unigram_model.cc, longer ones first and before all others
            return len(piece.text.encode()) * best - 0.1
        return piece.score

    return models.Unigram(
        [(piece.spaced, score(piece)) for piece in model.pieces],
        unk_id=next(token for token, piece in enumerate(model.pieces) if piece.type == _UNKNOWN),
        byte_fallback=model.byte_fallback,
    )


def _normalizer(model: SentencePieceModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.removes_spaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if not model.keeps_space_symbol:
        steps.append(normalizers.Replace(SPACE, " "))
    if model.adds_space:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None


def _split_unknown(model: SentencePieceModel) -> Any:
    """Texts are cut at characters that only those pieces have which no text may become.

    `tokenizers` would find "<unk>" or "<0x41>" in a text otherwise: nothing there is worse than an unknown character.
    No other piece reaches over such a character, so the cut changes nothing else.
    """
    from tokenizers import Regex, pre_tokenizers

    known = {character for piece in model.pieces if piece.occurs for character in piece.spaced}
    others = (piece.spaced for piece in model.pieces if not piece.occurs)
    unknown = sorted(set().union(*others) - known)
    if not unknown:
        return None
    return pre_tokenizers.Split(Regex(f"[{re.escape(''.join(unknown))}]+"), "isolated")
