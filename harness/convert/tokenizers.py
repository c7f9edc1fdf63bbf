"""Tokenizers as Hugging Face folders hold them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from harness.checkpoint import write_synced
from harness.config import HarnessError
from harness.data import Tokenizer, TokenizerSection, open_tokenizer
from harness.disk import sha256_of

from .records import read_json, write_json
from .sentencepiece_json import SentencePieceModel, write_tokenizer_json
from .tokenizer_check import compare

logger = logging.getLogger(__name__)

JSON = "tokenizer.json"
MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
GENERATION = "generation_config.json"
OURS = "harness"
"""The key of tokenizer_config.json under which we say what the folder's tokenizer was here; transformers reads no such
key."""
END_OF_TEXT = "<|endoftext|>"
_OTHER_FILES = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model")
"""What transformers makes tokenizers of where there is neither tokenizer.json nor tokenizer.model."""

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def export_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int | None) -> None:
    """Write what `transformers.AutoTokenizer` makes the same tokenizer of: the same ids and nothing added to them, the
    same text back, and the end-of-text token as `eos_token`.

    A tokenizer.json is kept as it is, so what its owner has it add (a token at the beginning, say), it adds there too.
    A text that spells a special token becomes that token there, as is the custom, and stays text here;
    `split_special_tokens=True` leaves it text there too. `max_length` in tokens is what transformers warns beyond.
    Where tokens or text are not all the same, which is looked for in a sample, a warning names a text. Raises
    HarnessError for a tokenizer that no tokenizer.json can express.
    """
    files = {}
    if tokenizer.kind == "sentencepiece":
        model = SentencePieceModel.parse(tokenizer.definition)
        text = write_tokenizer_json(model, MODEL)
        compare(tokenizer, text, model.tied)
        files = {MODEL: tokenizer.definition, JSON: text.encode()}
    elif tokenizer.kind == "bytes":
        text = _bytes_json()
        compare(tokenizer, text)
        files = {JSON: text.encode()}
    else:
        files = {JSON: tokenizer.definition}
    for name, content in files.items():
        write_synced(folder / name, content)
    end_of_text = tokenizer.end_of_text or END_OF_TEXT
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        values["model_max_length"] = max_length
    cutter = json.loads(files[JSON]).get("pre_tokenizer") or {}
    if "add_prefix_space" in cutter:  # or transformers 4 sets it to false
        values["add_prefix_space"] = cutter["add_prefix_space"]
    if tokenizer.kind != "huggingface":
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        values[OURS] = {"kind": tokenizer.kind, "sha256": digests}
    write_json(folder / CONFIG, values)
    if _read_optional(folder / "config.json").get("model_type") == "qwen2" and not _cuts_as_qwen2(cutter):
        logger.warning(
            "%s: AutoTokenizer of transformers 5 cuts texts as Qwen 2 does wherever config.json has model_type qwen2, "
            "whatever else the folder says; there, load this tokenizer with PreTrainedTokenizerFast.from_pretrained",
            JSON,
        )


def import_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer beside a model whose config.json is `config`; None where there is none.

    One that `export_tokenizer` wrote is what it was. Others are read from tokenizer.json, or else tokenizer.model, and
    end documents with the `eos_token` that the folder names, the first token of `eos_token_id`, or, where it says
    neither, what `harness.data` looks for. Raises HarnessError, naming the file, where one is damaged or says what
    cannot be.
    """
    values = _read_optional(folder / CONFIG)
    kind = _recorded_kind(folder, values)
    if kind == "bytes":
        return open_tokenizer(TokenizerSection(kind="bytes"))
    if kind is None:
        kind = next(
            (kind for name, kind in ((JSON, "huggingface"), (MODEL, "sentencepiece")) if (folder / name).exists()), None
        )
    if kind is None:
        other = next((name for name in _OTHER_FILES if (folder / name).exists()), None)
        if other is not None:
            logger.warning(
                "%s: only %s and %s can be read, so the model has no tokenizer here; to have one, run "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) with transformers",
                folder / other,
                JSON,
                MODEL,
            )
        return None
    file = folder / (JSON if kind == "huggingface" else MODEL)
    name = _named_end(folder, values, file) or _numbered_end(folder, config, file)
    return open_tokenizer(
        TokenizerSection.model_validate({"kind": kind, "path": str(file.absolute()), "end_of_text": name})
    )


def _bytes_json() -> str:
    """Ids are the bytes, and the end of text follows them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The library writes bytes as characters: printing ones as themselves, the others in order from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter([letter for letter in letters if ord(letter) >= 256])
    ids = {chr(byte) if chr(byte) in letters else next(others): byte for byte in range(256)}
    tokenizer: Any = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    text: str = tokenizer.to_str()
    return text


def _cuts_as_qwen2(cutter: dict[str, Any]) -> bool:
    parts = [cutter, *cutter.get("pretokenizers", [])]
    return any(part.get("pattern") == {"Regex": _QWEN2_PATTERN} for part in parts)


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _recorded_kind(folder: Path, values: dict[str, Any]) -> str | None:
    """What the tokenizer was here before it was written; None where we did not write it, or it was changed since."""
    entry = values.get(OURS)
    if entry is None or not (folder / JSON).exists():
        return None
    try:
        kind, digests = entry["kind"], dict(entry["sha256"])
        known = {"sentencepiece": {JSON, MODEL}, "bytes": {JSON}}[kind] == digests.keys()
    except (TypeError, KeyError, ValueError):
        known = False
    if not known:
        raise HarnessError(f"{folder / CONFIG}: {OURS} is not as harness writes it; restore it, or remove it")
    if _digest(folder / JSON) != digests[JSON]:
        logger.warning(
            "%s: was changed since harness wrote it, and is read as it is: no longer the tokenizer (kind %s) that it "
            "was made of",
            folder / JSON,
            kind,
        )
        return None
    if MODEL in digests and _digest(folder / MODEL) != digests[MODEL]:
        raise HarnessError(
            f"{folder / MODEL}: is not the file that {JSON} was made of; restore it, or remove {OURS} from {CONFIG} to "
            f"read {JSON} alone"
        )
    return str(kind)


def _digest(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as error:
        raise HarnessError(f"{file}: the tokenizer cannot be read: {error.strerror or error}") from None


def _named_end(folder: Path, values: dict[str, Any], file: Path) -> str | None:
    """The end-of-text token by its name."""
    for source, said in ((CONFIG, values), (SPECIAL, _read_optional(folder / SPECIAL))):
        token = said.get("eos_token")
        if token is None:
            continue
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str):
            raise HarnessError(f"{folder / source}: eos_token is {token!r}, and should be a token's text")
        tokens = _vocabulary(file)
        if tokens is not None and name not in tokens:
            raise HarnessError(f"{folder / source}: eos_token is {name!r}, and {file.name} has no such token")
        return name
    return None


def _numbered_end(folder: Path, config: dict[str, Any], file: Path) -> str | None:
    """The end-of-text token by its id."""
    for source, said in ((GENERATION, _read_optional(folder / GENERATION)), ("config.json", config)):
        asked = said.get("eos_token_id")
        token = asked[0] if isinstance(asked, list) and asked else asked
        if token is None:
            continue
        tokens = _vocabulary(file)
        if tokens is None:
            return None
        name = next((name for name, number in tokens.items() if number == token), None)
        if name is not None:
            return name
        logger.warning("%s: eos_token_id is %r, and %s has no such token", folder / source, asked, file.name)
    return None


def _vocabulary(file: Path) -> dict[str, int] | None:
    """Ids by token; None where the file is no good: whoever opens it next says how."""
    try:
        if file.name == MODEL:
            import sentencepiece

            processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
            return {processor.id_to_piece(token): token for token in range(processor.get_piece_size())} or None
        import tokenizers

        vocabulary: dict[str, int] = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        return vocabulary
    except Exception:  # `tokenizers` raises nothing narrower
        return None
