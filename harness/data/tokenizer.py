"""What the rest of harness asks of a tokenizer, and how one is kept in a folder."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from harness.config import HarnessError

from .config import TokenizerSection

DESCRIPTION = "description.json"
END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(ABC):
    """Text to token ids and back; also the tokenizer object that megatron-core's datasets ask for.

    Ids run from 0 to vocab_size - 1. `eod` ends a document and never comes out of `encode`.
    """

    kind: str
    file_name: str | None
    """What `definition` is called in a saved folder; None where nothing needs keeping."""

    pad = -1
    """megatron-core replaces and masks this id wherever it meets it, so it is one that no text contains."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id of the end-of-text token."""

    @property
    @abstractmethod
    def definition(self) -> bytes:
        """The bytes that define this tokenizer."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; text that looks like a special token is ordinary text."""

    @abstractmethod
    def _read_pieces(self) -> list[bytes]:
        """The bytes that each id stands for; empty for special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 (a token may end inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`: the pieces joined, special tokens left out. Raises ValueError for an id outside the
        vocabulary."""
        pieces = self.pieces
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < len(pieces):
                raise ValueError(f"token id {token} is outside the vocabulary of {len(pieces)}")
        return b"".join([pieces[token] for token in ids])

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for."""
        return self._read_pieces()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of kind, end-of-text id and definition: equal exactly for equal tokenizers."""
        head = f"{self.kind}\0{self.eod}\0".encode()
        return hashlib.sha256(head + self.definition).hexdigest()

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What megatron-core puts in the description of a dataset."""
        return OrderedDict(kind=self.kind, fingerprint=self.fingerprint)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for, 0 for special tokens.

        Summed over a document's ids this is its length in bytes, exactly, for bytes, for sentencepiece models trained
        here and for byte-level BPE. A tokenizer that changes text (normalisation, a leading space, unknown characters)
        is counted by the bytes of its tokens; `prepare` counts the documents where that differs. Read-only.
        """
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = np.array([len(piece) for piece in self.pieces], dtype=np.int32)
        sizes.flags.writeable = False
        return sizes

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.file_name is not None:
            (folder / self.file_name).write_bytes(self.definition)
        description = {
            "kind": self.kind,
            "eod": self.eod,
            "end_of_text": self.end_of_text,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        (folder / DESCRIPTION).write_text(
            json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @property
    def end_of_text(self) -> str | None:
        """Name of the end-of-text token in the vocabulary, where it has one."""
        return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`. Raises HarnessError where it is missing or was changed."""
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        kind, fingerprint = description["kind"], description["fingerprint"]
        tokenizer = _load(kind, folder, description["end_of_text"])
    except FileNotFoundError:
        raise HarnessError(f"{file}: no such file; a folder that holds a tokenizer has one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{file}: does not describe a tokenizer ({error!r})") from None
    if tokenizer.fingerprint != fingerprint:
        raise HarnessError(f"{folder}: the tokenizer is not the one that {DESCRIPTION} describes; restore or delete it")
    return tokenizer


def open_tokenizer(config: TokenizerSection) -> Tokenizer:
    """The tokenizer that a configuration names: raw bytes, or what lies at `path`."""
    if config.is_trained_here:
        raise ValueError("a tokenizer without a path is trained by `prepare`")
    return _load(config.kind, None if config.path is None else Path(config.path).expanduser(), config.end_of_text)


def _load(kind: str, path: Path | None, end_of_text: str | None) -> Tokenizer:
    """The tokenizer of `kind` at `path`, a file or a folder that holds one."""
    if kind == "bytes":
        from .byte_tokenizer import ByteTokenizer

        return ByteTokenizer()
    assert path is not None
    if kind == "sentencepiece":
        from .sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.load(path, end_of_text)
    if kind == "huggingface":
        from .huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(path, end_of_text)
    raise ValueError(f"unknown kind {kind!r}")


def read_definition(path: Path, file_name: str) -> tuple[Path, bytes]:
    """The file of a tokenizer and its bytes; `path` is the file or a folder that holds it as `file_name`."""
    file = path / file_name if path.is_dir() else path
    try:
        return file, file.read_bytes()
    except OSError as error:
        raise HarnessError(f"{file}: the tokenizer cannot be read: {error.strerror or error}") from None
