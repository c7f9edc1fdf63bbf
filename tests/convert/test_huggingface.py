"""Folders of the `transformers` library, which writes and reads them here with its own code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.convert import Conversion, convert, open_source, streamed_logits
from harness.parallel import Fragment
from tests.convert.library import MODELS, library_model, save_library_model
from tests.convert.refusals import refusal


def library_logits(model: torch.nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    return logits.float()


def some_tokens(vocabulary: int, length: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randint(vocabulary, (3, length)), torch.arange(length)[None].expand(3, -1)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again(tmp_path: Path, name: str) -> None:
    model = save_library_model(tmp_path / "theirs", name)
    convert(tmp_path / "theirs", tmp_path / "run")
    conversion = convert(tmp_path / "run", tmp_path / "back")
    assert conversion.proof is not None
    assert conversion.proof.left_out is None, "the library was asked"
    assert conversion.proof.comparisons[0].max_difference == 0

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    theirs, back = model.state_dict(), loaded.state_dict()
    assert theirs.keys() == back.keys()
    for key, value in theirs.items():
        assert torch.equal(value, back[key]), f"{key}: bits differ"

    tokens, positions = some_tokens(211)
    expected = library_logits(model, tokens, positions)
    for folder in ("theirs", "run", "back"):
        found = streamed_logits(open_source(tmp_path / folder), tokens, positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(library_logits(loaded.eval(), tokens, positions), expected, rtol=0, atol=1e-5)
    assert loaded.config.eos_token_id is None, "there was no tokenizer to say it"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path: Path, dtype: str) -> None:
    model = library_model("llama-gqa").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    source = open_source(tmp_path / "theirs")
    assert source.dtype == getattr(torch, dtype)
    convert(tmp_path / "theirs", tmp_path / "run")  # fp32 masters hold them exactly
    exact = convert(tmp_path / "run", tmp_path / "back", dtype=dtype)
    assert exact.proof is not None
    assert exact.proof.rounding is not None
    assert exact.proof.rounding.max_difference == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    theirs = model.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in loaded.state_dict().items())


def test_rounding_is_told_from_the_proof(tmp_path: Path) -> None:
    save_library_model(tmp_path / "theirs", "llama-gqa")
    convert(tmp_path / "theirs", tmp_path / "run")
    conversion = convert(tmp_path / "run", tmp_path / "rounded", dtype="bfloat16")
    assert conversion.proof is not None
    assert conversion.proof.comparisons[0].max_difference == 0, "against the rounded source"
    assert conversion.proof.rounding is not None
    assert conversion.proof.rounding.max_difference > 1e-4
    expected = {name: value.bfloat16() for name, value in load_state(tmp_path / "theirs").items()}
    assert all(torch.equal(expected[name], value) for name, value in load_state(tmp_path / "rounded").items())


def load_state(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama-gqa-tied-wide-heads", "qwen2", "qwen3"])
def test_any_part_of_any_tensor(tmp_path: Path, name: str) -> None:
    """What a rank reads: boxes of rows and columns, and the boxes that flat ranges are made of."""
    save_library_model(tmp_path / "theirs", name)
    convert(tmp_path / "theirs", tmp_path / "run", proof="streamed")
    source, run = open_source(tmp_path / "theirs"), open_source(tmp_path / "run")
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    from harness.convert.source import decoder_shapes

    def pick(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for tensor, shape in decoder_shapes(source.section).items():
        for _ in range(4):
            starts = [pick(size) for size in shape]
            sizes = [1 + pick(size - start) for size, start in zip(shape, starts, strict=True)]
            views = [torch.full(sizes, 9.0), torch.full(sizes[::-1], 9.0).permute(*reversed(range(len(sizes))))]
            for where, view in zip((source, run), views, strict=True):
                where.read([Fragment(tensor, "master", shape, tuple(starts), view)])
            assert torch.equal(*views), (tensor, starts, sizes)


def test_first_gpt2_names_and_buffers(tmp_path: Path) -> None:
    """The released GPT-2 files have no prefix, and hold the causal mask as if it were a weight."""
    model = library_model("gpt2")
    weights = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    weights |= {f"h.{number}.attn.bias": torch.ones(1, 1, 50, 50).tril() for number in range(2)}
    model.config.save_pretrained(tmp_path)
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "model.safetensors")
    tokens, positions = some_tokens(211)
    found = streamed_logits(open_source(tmp_path), tokens, positions)
    torch.testing.assert_close(found, library_logits(model, tokens, positions), rtol=0, atol=1e-4)


def test_a_tied_head_that_was_saved_twice(tmp_path: Path) -> None:
    model = library_model("llama-gqa-tied-wide-heads")
    model.config.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in weights
    save_file(weights, tmp_path / "model.safetensors")
    assert open_source(tmp_path).section.tied_head
    weights["lm_head.weight"][3, 5] += 1
    save_file(weights, tmp_path / "model.safetensors")
    assert "lm_head.weight is not model.embed_tokens.weight" in refusal(lambda: open_source(tmp_path))


def test_shards_have_an_index_that_the_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.convert import huggingface

    model = save_library_model(tmp_path / "theirs", "gpt2-untied")
    convert(tmp_path / "theirs", tmp_path / "run", proof="streamed")
    monkeypatch.setattr(huggingface.write_huggingface, "__kwdefaults__", {"max_file_bytes": 50_000})
    convert(tmp_path / "run", tmp_path / "back")
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.state_dict().values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_no_architecture_expresses_is_named(tmp_path: Path) -> None:
    save_library_model(tmp_path / "theirs", "llama-gqa")
    first = convert(tmp_path / "theirs", tmp_path / "run", proof=None)
    edit_model(first, logit_softcap=30.0)
    said = refusal(lambda: convert(tmp_path / "run", tmp_path / "back"))
    assert "LlamaForCausalLM comes closest, but it has model.logit_softcap 30.0 for None" in said
    assert not (tmp_path / "back").exists()


def edit_model(conversion: Conversion, **changes: object) -> None:
    """Another model section in a converted run's checkpoint, which is then signed again."""
    import hashlib

    folder = conversion.target / "checkpoints" / "step-00000000"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state"]["settings"]["model"] |= changes
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
