"""A prepared folder is reused where nothing differs, and refused with what differs otherwise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError
from harness.data import DataSection, open_prepared, prepare, prepare_for_training
from harness.disk import locked
from harness.text import Progress
from tests.data.helpers import random_documents, write_jsonl

MakeConfig = Callable[..., DataSection]


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_reused_as_it_is(tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 60))
    config = make_config(corpora=[{"name": "a", "source": str(path)}], tokenizer={"vocab_size": 500})
    first = prepare(config, progress=quiet)
    before = stamps(tmp_path / "prepared")
    os.utime(path)  # the same content at another time, as after a checkout
    moved = make_config(
        corpora=[{"name": "a", "source": str(shutil.copy(path, tmp_path / "copy.jsonl")), "weight": 2.0}],
        tokenizer={"vocab_size": 500},
        sequence_length=32,
        document_masking=True,
    )
    for same in (config, moved):
        again = prepare(same, progress=quiet)
        assert again.corpora == first.corpora
        assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert stamps(tmp_path / "prepared") == before
    path.unlink()  # `require` does not look at the sources
    assert open_prepared(config).corpora == first.corpora
    required = config.model_copy(update={"prepare": "require"})
    assert prepare_for_training(required, progress=quiet).corpora == first.corpora
    for look in (prepare, prepare_for_training):
        with pytest.raises(HarnessError, match="no such file or folder"):
            look(config, progress=quiet)


def test_another_corpus_is_added(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress
) -> None:
    entries = [
        {"name": n, "source": str(write_jsonl(tmp_path / f"{n}.jsonl", random_documents(rng, 60)))} for n in "ab"
    ]
    prepare(make_config(corpora=entries[:1]), progress=quiet)
    before = stamps(tmp_path / "prepared" / "a")
    with pytest.raises(HarnessError, match="corpus 'b' not there; run `harness tokenize` first"):
        open_prepared(make_config(corpora=entries))
    assert list(prepare(make_config(corpora=entries), progress=quiet).corpora) == ["a", "b"]
    assert stamps(tmp_path / "prepared" / "a") == before


def change_source(path: Path, config: dict[str, Any]) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # the size stays
    path.write_bytes(data)


def add_source(path: Path, config: dict[str, Any]) -> None:
    write_jsonl(path.with_name("new.jsonl"), ["more"])


def damage_record(path: Path, config: dict[str, Any]) -> None:
    (Path(config["folder"]) / "a" / "prepared.json").write_text("{")


def cut_tokens(path: Path, config: dict[str, Any]) -> None:
    file = Path(config["folder"]) / "a" / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])


def set_fields(**fields: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, config: config.update(fields)


def set_corpus(**fields: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, config: config["corpora"][0].update(fields)


ADVICE = "; set data.folder to another folder, or delete {folder}"
TRAINED = "{folder}/tokenizer: the tokenizer was trained on something else: "
KEEP = " (to keep it, set data.tokenizer.path={folder}/tokenizer/tokenizer.model)"
DIFFERENCES = [
    (set_fields(validation_share=0.3), "{folder}/a: validation_share was 0.2, it is 0.3 now" + ADVICE),
    (set_corpus(text_field="body"), "{folder}/a: text_field was \"text\", it is \"body\" now" + ADVICE),
    (set_corpus(max_document_bytes=99), "{folder}/a: max_document_bytes was null, it is 99 now" + ADVICE),
    (change_source, "{folder}/a: the source {source}/a.jsonl has changed" + ADVICE),
    (
        add_source,
        "{folder}/a: it was made from 1 source files, there are 2 now, {source}/new.jsonl is new" + ADVICE,
    ),
    (
        set_fields(tokenizer={"vocab_size": 400}),
        "{folder}/tokenizer: the bytes tokenizer was not trained here, and tokenizer.path is null" + ADVICE,
    ),
    (damage_record, "{folder}/a/prepared.json: is damaged (JSONDecodeError("),
    (cut_tokens, "corpus 'a': {folder}/a/train.bin has "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), DIFFERENCES)
def test_differences_are_named(
    change: Callable[[Path, dict[str, Any]], None],
    line: str,
    tmp_path: Path,
    make_config: MakeConfig,
    rng: np.random.Generator,
    quiet: Progress,
) -> None:
    path = write_jsonl(tmp_path / "text" / "a.jsonl", random_documents(rng, 60))
    values: dict[str, Any] = {
        "folder": str(tmp_path / "prepared"),
        "corpora": [{"name": "a", "source": str(path.parent / "*.jsonl")}],
    }
    prepare(make_config(**values), progress=quiet)
    change(path, values)
    with pytest.raises(HarnessError) as caught:
        prepare(make_config(**values), progress=quiet)
    expected = line.format(folder=tmp_path / "prepared", source=path.parent)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_trained_tokenizer_is_not_kept_for_other_text(
    tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 60))
    corpora = [{"name": "a", "source": str(path)}]
    folder = tmp_path / "prepared"
    first = prepare(make_config(corpora=corpora, tokenizer={"vocab_size": 500}), progress=quiet)
    with pytest.raises(HarnessError) as caught:
        prepare(make_config(corpora=corpora, tokenizer={"vocab_size": 400}), progress=quiet)
    expected = TRAINED + "vocab_size was 500, it is 400 now" + KEEP + ADVICE
    assert str(caught.value) == expected.format(folder=folder)
    other = [*corpora, {"name": "b", "source": str(path)}]
    with pytest.raises(HarnessError, match=r'corpora was \["a"\], it is \["a", "b"\] now'):
        prepare(make_config(corpora=other, tokenizer={"vocab_size": 500}), progress=quiet)
    # What the line proposes works, and tokenizes the new corpus with the old model.
    kept = {"path": str(folder / "tokenizer" / "tokenizer.model")}
    again = prepare(make_config(corpora=other, tokenizer=kept), progress=quiet)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.split("b", "train").tokens == first.split("a", "train").tokens
    with pytest.raises(HarnessError, match=r"another one \(there: sentencepiece, 500 tokens; configured: bytes, 257"):
        prepare(make_config(corpora=corpora), progress=quiet)


def test_two_at_once(tmp_path: Path, make_config: MakeConfig, rng: np.random.Generator, quiet: Progress) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(rng, 20))
    config = make_config(corpora=[{"name": "a", "source": str(path)}])
    said = f"process {os.getpid()} is preparing data here; wait for it, or choose another data.folder"
    advice = "choose another data.folder"
    with locked(config.folder_path, "preparing data", advice), pytest.raises(HarnessError, match=said):
        prepare(config, progress=quiet)
    prepare(config, progress=quiet)
