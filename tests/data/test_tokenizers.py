"""Every tokenizer gives text back byte for byte and says honestly how many bytes a token stands for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError
from harness.data import Tokenizer, TokenizerSection, load_tokenizer, open_tokenizer
from harness.data.byte_tokenizer import ByteTokenizer
from harness.data.encoding import PIECE_CHARACTERS, encode_texts
from harness.data.huggingface_tokenizer import HuggingFaceTokenizer
from harness.data.sentencepiece_tokenizer import SentencePieceTokenizer
from harness.data.tokenizer_training import TrainingSample, train_sentencepiece
from tests.data.helpers import random_documents, random_text

WEIRD = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n\r\n",
    "  two leading, two trailing  ",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "nul \x00 inside",
    "\x01\x02\x1b[0m\x7f",
    "👩‍👩‍👧‍👦 🇩🇪",
    "e\u0301 is not é",
    "\ufeffbom",
    "<|endoftext|></s><unk><s><0x41>",
    "\U0010ffff\ufffe",
    "def f(x):\n\tif x:\n        return x  # ok\n",
]
TRAINING = [f"def name_{n}(self, value):\n    if value > {n}:\n        return self.other[{n}]\n\n" for n in range(300)]


def byte_level_bpe() -> bytes:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TRAINING, trainer)
    library.add_tokens(["plain added é"])
    library.enable_truncation(4)
    library.enable_padding(length=50)
    text: str = library.to_str()
    return text.encode()


@pytest.fixture(scope="module")
def tokenizers_by_kind() -> dict[str, Tokenizer]:
    small = TokenizerSection(vocab_size=500)
    return {
        "bytes": ByteTokenizer(),
        "bpe": train_sentencepiece(TRAINING, small),
        "unigram": train_sentencepiece(TRAINING, TokenizerSection(vocab_size=400, model_type="unigram")),
        "huggingface": HuggingFaceTokenizer(byte_level_bpe()),
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "huggingface"])
def test_text_comes_back_and_is_counted(
    tokenizers_by_kind: dict[str, Tokenizer], kind: str, rng: np.random.Generator
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    table = tokenizer.token_bytes()
    assert table.dtype == np.int32
    assert table.shape == (tokenizer.vocab_size,)
    assert table[tokenizer.eod] == 0
    texts = WEIRD + [random_text(rng, int(rng.integers(1, 300))) for _ in range(100)] + TRAINING[:5]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert sum(int(table[token]) for token in ids) == len(text.encode())
        assert tokenizer.eod not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    # The end of text has no bytes, a cut character becomes U+FFFD, an unknown id is refused.
    ids = tokenizer.encode("a")
    assert tokenizer.decode([*ids, tokenizer.eod, *ids]) == "aa"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ByteTokenizer().decode_bytes([-1])
    assert ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "huggingface"])
def test_saved_tokenizer_is_the_same(tokenizers_by_kind: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers_by_kind[kind]
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.eod == tokenizer.eod
    assert loaded.pieces == tokenizer.pieces
    assert loaded.unique_identifiers == tokenizer.unique_identifiers
    assert loaded.pad < 0  # no id of the vocabulary
    fingerprints = {other.fingerprint for other in tokenizers_by_kind.values()}
    assert len(fingerprints) == len(tokenizers_by_kind)
    if tokenizer.file_name is not None:
        config = TokenizerSection(kind=tokenizer.kind, path=str(tmp_path / "t" / tokenizer.file_name))
        assert open_tokenizer(config).fingerprint == tokenizer.fingerprint
        changed = (
            tokenizer.definition + b"\n" if kind == "huggingface" else tokenizer.definition.replace(b"self", b"sulf")
        )
        (tmp_path / "t" / tokenizer.file_name).write_bytes(changed)
        with pytest.raises(HarnessError, match=r"not the one that description.json describes"):
            load_tokenizer(tmp_path / "t")


def test_trained_model_is_short_on_code_and_deterministic(rng: np.random.Generator) -> None:
    config = TokenizerSection(vocab_size=500)
    first, second = (train_sentencepiece(TRAINING, config) for _ in range(2))
    assert first.definition == second.definition
    assert first.end_of_text == "<|endoftext|>"
    ids = first.encode("        return self.other")
    assert first.decode([ids[0]]).strip(" ") in ("", "return")  # the indentation is one token
    assert len(first.decode([ids[0]])) >= 7
    unigram = TokenizerSection(vocab_size=400, model_type="unigram")
    assert train_sentencepiece(TRAINING, unigram).definition == train_sentencepiece(TRAINING, unigram).definition
    # The sample does not depend on the order of documents, and respects its limit.
    lengths = rng.choice([5, 50, 4000], 60)  # where a long one has made way, a short one would fit
    documents = [f"{number} {random_text(rng, int(length))}" for number, length in enumerate(lengths)]
    samples = []
    for _ in range(8):
        sample = TrainingSample(15_000)
        for place in rng.permutation(len(documents)):
            sample.add(documents[place])
        sample.add(documents[0])  # a duplicate counts once
        samples.append(sample.texts())
    assert all(sample == samples[0] for sample in samples)
    assert sum(len(text.encode()) for text in samples[0]) <= 15_000
    assert set(samples[0]) <= set(documents)
    sample = TrainingSample(sum(len(text.encode()) for text in documents))
    for text in documents * 2:
        sample.add(text)
    assert sorted(sample.texts()) == sorted(documents)


def test_loaded_sentencepiece_of_another_kind(tmp_path: Path) -> None:
    """A model with the library's defaults: a space before the text, no byte pieces, normalisation."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=model, vocab_size=120, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "self\u2581value  日"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.eod == reference.eos_id()
    assert tokenizer.token_bytes()[reference.unk_id()] == 0
    with pytest.raises(HarnessError, match=r"has no piece <eot> .* one that it has \(<s>, </s>\)"):
        SentencePieceTokenizer(model.getvalue(), "<eot>")
    assert SentencePieceTokenizer(model.getvalue(), "<s>").eod == reference.bos_id()


def test_huggingface_kinds(rng: np.random.Generator) -> None:
    """Pieces of each family of decoders against the library's own decoding."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    byte_pieces = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words = {"\u2581he": 256, "\u2581": 257, "<unk>": 258, "</s>": 260}  # 259 is a hole
    library: Any = Library(models.BPE(byte_pieces | words, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["</s>"])
    llama = HuggingFaceTokenizer(library.to_str().encode())
    assert llama.eod == 260
    assert llama.vocab_size == 261
    assert llama.pieces[256] == b" he"
    assert llama.pieces[258:261] == [b"", b"", b""]
    text = "a b é"
    assert llama.decode(llama.encode(text)) == text
    assert sum(len(llama.pieces[token]) for token in llama.encode(text)) == len(text.encode()) + 1  # its own space

    library = Library(models.WordPiece({"[UNK]": 0, "un": 1, "##able": 2, "[SEP]": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[SEP]"])
    with pytest.raises(HarnessError, match=r"set data.tokenizer.end_of_text to one that it has \(\[SEP\]\)"):
        HuggingFaceTokenizer(library.to_str().encode())
    pieces = HuggingFaceTokenizer(library.to_str().encode(), "[SEP]").pieces
    assert pieces == [b"", b" un", b"able", b""]


def test_special_tokens_in_text_are_text() -> None:
    tokenizer = HuggingFaceTokenizer(byte_level_bpe())
    ids = tokenizer.encode("a <|endoftext|> b plain added é <pad>")
    assert tokenizer.eod not in ids
    assert len(ids) > 4  # the file's truncation and padding are off
    assert tokenizer.decode(ids) == "a <|endoftext|> b plain added é <pad>"
    other = HuggingFaceTokenizer(byte_level_bpe(), "<pad>")
    assert other.fingerprint != tokenizer.fingerprint  # the same file with another end of text is another tokenizer


def test_long_documents_are_encoded_in_pieces(rng: np.random.Generator) -> None:
    text = "".join(f"line {n} of a long document\n" for n in range(80_000)) + "x" * (PIECE_CHARACTERS + 5)
    tokenizer = train_sentencepiece(TRAINING, TokenizerSection(vocab_size=400))
    short = random_documents(rng, 3)
    batch = encode_texts(tokenizer, [short[0], text, short[1]])
    assert len(text) > 3 * PIECE_CHARACTERS
    assert tokenizer.decode(batch.ids) == short[0] + text + short[1]
    assert batch.lengths.sum() == len(batch.ids)
    assert batch.sizes.tolist() == [len(part.encode()) for part in (short[0], text, short[1])]
