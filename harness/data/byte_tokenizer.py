"""Raw bytes as tokens."""

from __future__ import annotations

from .tokenizer import Tokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 is the end of text."""

    kind = "bytes"
    file_name = None
    eod = 256
    definition = b""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _read_pieces(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [b""]
