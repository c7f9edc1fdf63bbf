"""A tokenizer beside an exported model is ours in `transformers`, and comes back as what it was."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError
from harness.convert.tokenizers import export_tokenizer, import_tokenizer
from harness.data import Tokenizer, TokenizerSection, open_tokenizer
from harness.data.huggingface_tokenizer import HuggingFaceTokenizer
from harness.data.sentencepiece_tokenizer import SentencePieceTokenizer
from harness.data.tokenizer_training import train_sentencepiece
from tests.data.helpers import random_text

CODE = [f"def name_{n}(self, value):\n    if value > {n}:\n        return self.other[{n}]  # é\n\n" for n in range(200)]
NASTY = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n\r\n",
    "  two leading, two trailing  ",
    "a        b",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "nul \x00 inside",
    "\x01\x02\x1b[0m\x7f",
    "👩‍👩‍👧‍👦 🇩🇪",
    "e\u0301\u0308\u0302 is not é",
    "\ufeffbom",
    "<|endoftext|></s><unk><s><0x41><pad>",
    "\U0010ffff\ufffe",
    "0123456789 3.14",
    "a bad badge, abbadd",
    "日本語中文한국어",
    *(letter * count for letter in " a=\n" for count in range(2, 30)),
]
KINDS = ["bytes", "bpe", "unigram", "byte-level", "prefix", "unknowns", "symbols-bpe", "symbols-unigram", "defaults"]
SPECIALS = {"control_symbols": ["<|im|>"], "user_defined_symbols": ["\n", "self", "bad", "Ω≈", "two  words"]}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


@cache
def make(kind: str) -> Tokenizer:
    texts = CODE + [random_text(np.random.default_rng(1), 300) for _ in range(100)]
    if kind == "bytes":
        return open_tokenizer(TokenizerSection(kind="bytes"))
    if kind == "byte-level":
        return HuggingFaceTokenizer(byte_level_bpe(texts))
    if kind in ("bpe", "unigram"):
        return train_sentencepiece(texts, TokenizerSection(vocab_size=500, model_type=kind))  # type: ignore[arg-type]
    plain = {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}
    options: dict[str, Any] = {
        "prefix": plain | {"model_type": "bpe"},  # as Llama 2
        "unknowns": plain | {"model_type": "bpe", "byte_fallback": False, "add_dummy_prefix": False},
        "symbols-bpe": plain | SPECIALS | {"model_type": "bpe", "add_dummy_prefix": False},
        "symbols-unigram": plain | SPECIALS | {"add_dummy_prefix": False},
        "defaults": {},  # nmt_nfkc, a space before the text, spaces removed, no byte pieces
        "word": {"model_type": "word"},
    }[kind]
    if kind == "symbols-unigram":  # it knows every letter of "<unk>", the plain one does not
        texts += 20 * ["The quick brown fox jumps over the lazy dog; a < b | c > d / 40"]
    return SentencePieceTokenizer(train_directly(texts, **options))


def train_directly(texts: Iterable[str], **options: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=800,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def byte_level_bpe(texts: list[str], *, prefix_space: bool = False, adds: str | None = None) -> bytes:
    """A tokenizer.json with what ours leaves out: truncation, padding, a token that it would add."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    library.add_tokens(["plain added é"])
    library.enable_truncation(4)
    library.enable_padding(length=50, pad_token="<pad>")
    if adds is not None:
        token = (adds, library.token_to_id(adds))
        library.post_processor = processors.TemplateProcessing(single=f"{adds} $A", special_tokens=[token])
    text: str = library.to_str()
    return text.encode()


def export(tokenizer: Tokenizer, folder: Path, model_type: str = "llama", max_length: int | None = 77) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    export_tokenizer(tokenizer, folder, max_length=max_length)
    return folder


def load_there(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def score(tokenizer: Tokenizer, ids: list[int]) -> float:
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.definition)
    return sum(processor.get_score(token) for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids(
    kind: str, tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make(kind)
    model_type = str(rng.choice(["gpt2", "llama", "mistral", "qwen3"]))
    there = load_there(export(tokenizer, tmp_path / model_type, model_type))
    expected = {"unigram": 1, "symbols-unigram": 1, "defaults": 2}  # ties; and how normalisation joins characters
    assert len(caplog.records) <= expected.get(kind, 0), caplog.text
    assert there.eos_token_id == there.bos_token_id == tokenizer.eod
    assert len(there) == tokenizer.vocab_size
    assert there.model_max_length == 77
    texts = NASTY + CODE[:5] + [random_text(rng, int(rng.integers(1, 300))) for _ in range(100)]
    if kind == "defaults":
        texts = [*CODE[:5], "  two   words ", "", "ﬁ Å 日本語", "tab\tand\nline", "e\u0301"]
    ours = tokenizer.encode_batch(texts)
    theirs = there(texts, split_special_tokens=True).input_ids  # what spells a special token is text here
    ties = [(one, other) for one, other in zip(ours, theirs, strict=True) if one != other]
    if "unigram" in kind or kind == "defaults":
        assert len(ties) < len(texts) / 2
        for one, other in ties:
            assert score(tokenizer, one) == pytest.approx(score(tokenizer, other), rel=1e-5)
            assert tokenizer.decode(one) == tokenizer.decode(other)
    else:
        assert not ties
    for text, ids in zip(texts, ours, strict=True):
        assert there.decode([*ids, tokenizer.eod], skip_special_tokens=True) == tokenizer.decode(ids)
        if kind not in ("prefix", "unknowns", "defaults"):
            assert there.decode(ids) == text
    # By custom the token itself can be had of its name.
    assert there("<|endoftext|></s>").input_ids.count(tokenizer.eod) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make(kind)
    folder = export(tokenizer, tmp_path / "ours")
    if tokenizer.file_name is not None:
        assert (folder / tokenizer.file_name).read_bytes() == tokenizer.definition
    back = import_tokenizer(folder, {"eos_token_id": 3})  # the name goes first
    assert back is not None
    assert back.fingerprint == tokenizer.fingerprint
    # Written again by transformers, it is another file with the same ids.
    load_there(folder).save_pretrained(tmp_path / "theirs")
    caplog.clear()
    back = import_tokenizer(tmp_path / "theirs", {})
    assert back is not None
    assert back.kind == "huggingface"
    assert back.eod == tokenizer.eod
    assert ("was changed since" in caplog.text) == (kind != "byte-level")
    text = CODE[7] + "日本 a"
    assert len(back.encode(text)) == len(tokenizer.encode(text))
    assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_other_end_of_text_comes_back(tmp_path: Path) -> None:
    tokenizers = [
        HuggingFaceTokenizer(byte_level_bpe(CODE), "<pad>"),
        SentencePieceTokenizer(make("symbols-bpe").definition, "<|im|>"),
    ]
    for number, tokenizer in enumerate(tokenizers):
        folder = export(tokenizer, tmp_path / str(number), max_length=None)
        assert load_there(folder).eos_token_id == tokenizer.eod
        assert "model_max_length" not in json.loads((folder / "tokenizer_config.json").read_text())
        back = import_tokenizer(folder, {})
        assert back is not None
        assert back.fingerprint == tokenizer.fingerprint


def test_foreign_conventions_are_kept(tmp_path: Path) -> None:
    """A file that adds a token at the beginning, and one that puts a space there."""
    tokenizer = HuggingFaceTokenizer(byte_level_bpe(CODE, prefix_space=True, adds="<|endoftext|>"))
    folder = export(tokenizer, tmp_path / "model", "gpt2")
    there, ids = load_there(folder), tokenizer.encode("self, value")
    assert there("self, value").input_ids == [tokenizer.eod, *ids]
    assert there("self, value", add_special_tokens=False).input_ids == ids
    assert there.decode(ids) == " self, value"
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_prefix_space"] is True


def test_end_of_text_of_foreign_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, by id, or as we look for it; in a tokenizer.json and in a tokenizer.model."""
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tokenizer.json").write_bytes(byte_level_bpe(CODE))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(make("prefix").definition)
    names = {"json": ("<pad>", 0, "<|endoftext|>"), "model": ("<s>", 1, "</s>")}
    for place, (name, number, default) in names.items():
        folder = tmp_path / place

        def end_of_text(config: dict[str, Any], folder: Path = folder, **files: dict[str, Any]) -> Any:
            for file, values in files.items():
                (folder / f"{file}.json").write_text(json.dumps(values))
            tokenizer = import_tokenizer(folder, config)
            for file in files:
                (folder / f"{file}.json").unlink()
            assert tokenizer is not None
            return tokenizer.end_of_text  # type: ignore[return-value]

        assert end_of_text({}) == default
        assert end_of_text({"eos_token_id": number}) == name
        assert end_of_text({"eos_token_id": [number, 7]}) == name
        assert end_of_text({"eos_token_id": 7}, generation_config={"eos_token_id": number}) == name
        assert end_of_text({"eos_token_id": 7}, tokenizer_config={"eos_token": name}) == name
        assert end_of_text({}, tokenizer_config={"eos_token": {"content": name, "lstrip": False}}) == name
        assert end_of_text({}, tokenizer_config={"eos_token": None}, special_tokens_map={"eos_token": name}) == name
        assert not caplog.records
        assert end_of_text({"eos_token_id": 50256}) == default
        assert "eos_token_id is 50256, and tokenizer." in caplog.text
        caplog.clear()


def test_no_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert import_tokenizer(tmp_path, {"eos_token_id": 2}) is None
    assert not caplog.records
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert import_tokenizer(tmp_path, {}) is None
    assert "vocab.json: only tokenizer.json and tokenizer.model can be read" in caplog.text
    assert "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)" in caplog.text


def test_what_differs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        export(make("defaults"), tmp_path / "defaults")
    assert "gives other tokens than tokenizer.model in" in caplog.text
    caplog.clear()
    export(make("unigram"), tmp_path / "unigram")
    assert all("which are as likely" in record.message for record in caplog.records)
    caplog.clear()
    export(make("bpe"), tmp_path / "qwen", "qwen2")
    assert "PreTrainedTokenizerFast.from_pretrained" in caplog.text
    from transformers import PreTrainedTokenizerFast

    there = PreTrainedTokenizerFast.from_pretrained(tmp_path / "qwen")
    assert there(CODE[3]).input_ids == make("bpe").encode(CODE[3])
    with pytest.raises(HarnessError, match=r"^tokenizer\.model: is neither a bpe nor a unigram model"):
        export(make("word"), tmp_path / "word")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    def refuse(message: str, config: dict[str, Any] | None = None) -> None:
        with pytest.raises(HarnessError, match=message) as refused:
            import_tokenizer(folder, config or {})
        assert "\n" not in str(refused.value)
        assert str(folder) in str(refused.value)

    folder = export(make("bpe"), tmp_path / "model")
    said = json.loads((folder / "tokenizer_config.json").read_text())

    def say(**values: Any) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said | values))

    say(eos_token="<eot>")
    refuse(r"tokenizer_config.json: eos_token is '<eot>', and tokenizer.model has no such token")
    say(eos_token=["<eot>"])
    refuse(r"tokenizer_config.json: eos_token is \['<eot>'\]")
    for entry in (7, {}, {"kind": "bytes"}, {"kind": "words", "sha256": {}}, {"kind": "bytes", "sha256": 4}):
        say(harness=entry)
        refuse(r"tokenizer_config.json: harness is not as harness writes it")
    say()
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model.replace(b"self", b"sulf"))
    refuse(r"tokenizer.model: is not the file that tokenizer.json was made of")
    (folder / "tokenizer.model").unlink()
    refuse(r"tokenizer.model: the tokenizer cannot be read: No such file")
    (folder / "tokenizer.json").unlink()
    for broken in (b"", model[: len(model) // 2], b"\xff\xff\xff"):
        (folder / "tokenizer.model").write_bytes(broken)
        refuse(r"tokenizer.model: not a sentencepiece model", {"eos_token_id": 1})
    for text in ("", "{}", '{"model":', "[1]"):
        (folder / "tokenizer.json").write_text(text)
        refuse(r"tokenizer.json: not a tokenizer.json of the `tokenizers` library", {"eos_token_id": 1})
    (folder / "tokenizer_config.json").write_text("[]")
    refuse(r"tokenizer_config.json: is not a mapping")
