"""Any Hugging Face tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.config import HarnessError

from .tokenizer import END_OF_TEXT_NAMES, Tokenizer, read_definition

SPACE = "\u2581"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Its post-processor's special tokens, truncation and padding are left out."""

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, definition: bytes, end_of_text: str | None = None, *, label: str = "tokenizer.json") -> None:
        """`definition` is the content of a tokenizer.json; `label` is how messages name it."""
        import tokenizers

        self._definition = definition
        try:
            text = definition.decode()
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(text)
            self._json: dict[str, Any] = json.loads(text)
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise HarnessError(f"{label}: not a tokenizer.json of the `tokenizers` library ({reason})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells <|endoftext|> is text about it, not its end.
        self._tokenizer.encode_special_tokens = True
        self._added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self._eod = self._find_end_of_text(end_of_text, label)
        self._is_byte_level = "ByteLevel" in _types(self._json.get("decoder"))

    @classmethod
    def load(cls, path: Path, end_of_text: str | None = None) -> HuggingFaceTokenizer:
        """The tokenizer in a tokenizer.json, or in a folder that holds one."""
        file, definition = read_definition(path, cls.file_name)
        return cls(definition, end_of_text, label=str(file))

    @property
    def eod(self) -> int:
        return self._eod

    @property
    def end_of_text(self) -> str:
        return str(self._tokenizer.id_to_token(self._eod))

    @property
    def definition(self) -> bytes:
        return self._definition

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._is_byte_level:
            return super().decode_bytes(ids)
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text.encode()

    def _find_end_of_text(self, name: str | None, label: str) -> int:
        for candidate in END_OF_TEXT_NAMES if name is None else (name,):
            token: int | None = self._tokenizer.token_to_id(candidate)
            if token is not None:
                return token
        special = [added.content for _, added in sorted(self._added.items()) if added.special]
        raise HarnessError(
            f"{label}: has no token {name or ' or '.join(END_OF_TEXT_NAMES)} to end documents with; "
            f"set data.tokenizer.end_of_text to one that it has ({', '.join(special[:10]) or 'no token is special'})"
        )

    def _read_pieces(self) -> list[bytes]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocabulary.values()) + 1)  # ids may have holes
        unknown = self._json["model"].get("unk_token")
        to_bytes = self._piece_reader()
        for piece, token in vocabulary.items():
            added = self._added.get(token)
            if token == self._eod or piece == unknown or (added is not None and added.special):
                continue
            pieces[token] = piece.encode() if added is not None else to_bytes(piece)
        return pieces

    def _piece_reader(self) -> Any:
        decoders = _types(self._json.get("decoder"))
        if self._is_byte_level:
            return _byte_level_bytes
        if "WordPiece" in decoders:
            prefix = self._json["model"].get("continuing_subword_prefix") or "##"
            # A piece that begins a word stands for the space before it too.
            return lambda piece: piece[len(prefix) :].encode() if piece.startswith(prefix) else b" " + piece.encode()
        if "Metaspace" in decoders or "ByteFallback" in decoders or "Replace" in decoders:
            return _metaspace_bytes
        return str.encode


def _types(part: Any) -> set[str]:
    """Names of a tokenizer.json component and of those inside it."""
    if not isinstance(part, dict):
        return set()
    inner = [_types(item) for key in ("decoders", "pretokenizers", "normalizers") for item in part.get(key, [])]
    return {part.get("type", "")}.union(*inner)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable characters by which GPT-2's byte-level BPE writes the 256 bytes.

    Bytes that print in Latin-1 stand for themselves, the others are numbered from U+0100 on (Radford et al. 2019).
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
