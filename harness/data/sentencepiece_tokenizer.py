"""Sentencepiece models, trained here or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config import HarnessError

from .tokenizer import END_OF_TEXT_NAMES, Tokenizer, read_definition

SPACE = "\u2581"
"""Sentencepiece writes a space as this character, so it cannot tell the two apart in its input."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Where it has byte pieces and adds no leading space, encoding loses nothing."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, end_of_text: str | None = None, *, label: str = "sentencepiece model") -> None:
        """`model` is a serialised model; `label` is how messages name it."""
        import sentencepiece

        self._model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError):
            loaded = False
        if not loaded:
            raise HarnessError(f"{label}: not a sentencepiece model; data.tokenizer.path should name a .model file")
        self._eod = _find_end_of_text(self._processor, end_of_text, label)
        self._byte_ids = {
            int(self._processor.id_to_piece(token)[3:5], 16): token
            for token in range(self._processor.get_piece_size())
            if self._processor.is_byte(token)
        }
        # A model with a dummy prefix would put a space before every part that follows a literal U+2581.
        adds_space = self._processor.id_to_piece(self._processor.encode("a"))[0].startswith(SPACE)
        self._keeps_space_symbol = len(self._byte_ids) == 256 and not adds_space

    @classmethod
    def load(cls, path: Path, end_of_text: str | None = None) -> SentencePieceTokenizer:
        """The model in a .model file, or in a folder as tokenizer.model."""
        file, model = read_definition(path, cls.file_name)
        return cls(model, end_of_text, label=str(file))

    @property
    def eod(self) -> int:
        return self._eod

    @property
    def end_of_text(self) -> str:
        return str(self._processor.id_to_piece(self._eod))

    @property
    def definition(self) -> bytes:
        return self._model

    def encode(self, text: str) -> list[int]:
        if SPACE in text and self._keeps_space_symbol:
            literal = [self._byte_ids[byte] for byte in SPACE.encode()]
            first, *rest = text.split(SPACE)
            ids = self._encode(first)
            for part in rest:
                ids += literal
                ids += self._encode(part)
            return ids
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _read_pieces(self) -> list[bytes]:
        return [_piece_bytes(self._processor, token) for token in range(self._processor.get_piece_size())]


def _piece_bytes(processor: Any, token: int) -> bytes:
    piece: str = processor.id_to_piece(token)
    if processor.is_control(token) or processor.is_unknown(token):
        return b""
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _find_end_of_text(processor: Any, name: str | None, label: str) -> int:
    def find(piece: str) -> int | None:
        token: int = processor.piece_to_id(piece)
        return None if processor.is_unknown(token) else token

    if name is None and processor.eos_id() >= 0:
        eos: int = processor.eos_id()
        return eos
    for candidate in END_OF_TEXT_NAMES if name is None else (name,):
        token = find(candidate)
        if token is not None:
            return token
    controls = [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if processor.is_control(i)]
    raise HarnessError(
        f"{label}: has no piece {name or ' or '.join(END_OF_TEXT_NAMES)} to end documents with; "
        f"set data.tokenizer.end_of_text to one that it has ({', '.join(controls[:10]) or 'it has no control pieces'})"
    )
