"""Norm-free models in every format: the libraries' own norms stand in, and reading finds that there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.convert import ModelSource, convert, open_source, streamed_logits
from harness.convert.convert import DTYPES
from harness.model import ModelSection, SiteState
from harness.normfree import FoldedSource, folded_section
from tests.convert.refusals import refusal
from tests.convert.test_transformer_lens import hooked_logits
from tests.normfree.frozen import KINDS, FrozenSource, fresh, frozen_decoder, residual_inputs

LIBRARY = {
    "gpt2": "GPT2LMHeadModel", "gpt2-no-bias": "GPT2LMHeadModel", "gpt2-no-qkv-bias": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM", "llama-biases": "LlamaForCausalLM", "llama-gqa-tied-wide-heads": "LlamaForCausalLM",
    "llama-qk-norm-mqa": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
}  # fmt: skip


def frozen_logits(source: FrozenSource, tokens: Tensor) -> Tensor:
    """float64, by the model that was not folded."""
    model = frozen_decoder(source.section, source.weights, source.norm_states)
    with torch.no_grad():
        found = model.hidden_states(tokens) @ model.head.weight[: source.section.vocab_size].T
    return found if source.section.logit_softcap is None else torch.tanh(found / source.section.logit_softcap)


def our_logits(source: ModelSource, tokens: Tensor) -> Tensor:
    return streamed_logits(source, tokens, torch.arange(tokens.shape[1])[None].expand(len(tokens), -1))


def library_logits(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        return model(tokens).logits.float()  # type: ignore[no-any-return]


def frozen(kind: str) -> tuple[FrozenSource, Tensor]:
    generator = fresh()
    source = FrozenSource(KINDS[kind], generator)
    return source, residual_inputs(source.section, generator)


def same_section(one: ModelSection, other: ModelSection) -> bool:
    return one.architecture() == other.architecture()


@pytest.mark.parametrize("kind", LIBRARY)
def test_transformers_and_back(tmp_path: Path, kind: str) -> None:
    source, tokens = frozen(kind)
    expected = frozen_logits(source, tokens)
    conversion = convert(FoldedSource(source), tmp_path / "hf", to="huggingface")
    assert conversion.proof is not None
    assert conversion.proof.left_out is None, "the library was asked"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [LIBRARY[kind]]
    assert config.get("layer_norm_epsilon", config.get("rms_norm_eps")) == 2.0**60
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    found = library_logits(tmp_path / "hf", tokens)
    assert (found - expected).abs().max() <= 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))

    back = open_source(tmp_path / "hf")
    assert back.section.norm_free
    assert same_section(back.section, folded_section(source.section))
    convert(tmp_path / "hf", tmp_path / "run")  # compares every bit
    again = convert(tmp_path / "run", tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    assert again.proof is not None
    torch.testing.assert_close(our_logits(open_source(tmp_path / "run"), tokens).double(), expected, rtol=0, atol=1e-4)

    # What the library itself saves again is still recognised.
    loaded.save_pretrained(tmp_path / "saved")
    assert same_section(open_source(tmp_path / "saved").section, back.section)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path: Path, kind: str, dtype: str) -> None:
    """Finite where the library computes in 16 bits too, and no further from the truth than rounded weights are."""
    source, tokens = frozen(kind)
    source.norm_states["final"] = SiteState(1.0, 2.5)  # its weight times 2^15 must be in float16's range
    expected = frozen_logits(source, tokens)
    conversion = convert(FoldedSource(source), tmp_path / "hf", to="huggingface", dtype=dtype)
    assert conversion.proof is not None
    assert conversion.proof.comparisons[0].max_difference == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(weight.dtype == DTYPES[dtype] and weight.isfinite().all() for weight in weights.values())
    rounding = (our_logits(open_source(tmp_path / "hf"), tokens) - expected).abs().max()
    in_fp32 = library_logits(tmp_path / "hf", tokens, dtype=torch.float32)
    # LayerNorm takes a mean away that rounded matrices do not wholly ignore.
    allowed = rounding.item() if kind == "gpt2" else 2e-4
    torch.testing.assert_close(in_fp32, our_logits(open_source(tmp_path / "hf"), tokens), rtol=0, atol=allowed)
    in_16_bits = library_logits(tmp_path / "hf", tokens, dtype=DTYPES[dtype])
    assert in_16_bits.isfinite().all()
    assert (in_16_bits - expected).abs().max() < 6 * rounding + 0.02 * expected.abs().max()


def test_too_large_for_float16(tmp_path: Path) -> None:
    source = FrozenSource(KINDS["gpt2"])
    source.weights["final_norm.weight"][3] = 9.0
    said = refusal(lambda: convert(FoldedSource(source), tmp_path / "hf", to="huggingface", dtype="float16"))
    assert "the final norm's weight, up to" in said
    assert "times 32768 is too large for float16: choose another --dtype" in said
    assert not (tmp_path / "hf").exists()


def test_stand_ins_that_were_changed(tmp_path: Path) -> None:
    convert(FoldedSource(FrozenSource(KINDS["gpt2"])), tmp_path / "hf", to="huggingface", proof="streamed")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    for name, change in (("transformer.h.1.ln_2.weight", 128.0), ("transformer.h.0.ln_1.bias", 1e-3)):
        changed = {**weights, name: weights[name].clone()}
        changed[name][5] += change
        save_file(changed, file)
        said = refusal(lambda: open_source(tmp_path / "hf"))
        assert f"tensor {name}: an epsilon of 1152921504606846976 in config.json means a model without norms" in said
    del weights["transformer.h.0.ln_1.bias"]
    save_file(weights, file)
    assert "tensor transformer.h.0.ln_1.bias: an epsilon of" in refusal(lambda: open_source(tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied-narrow-heads", "layernorm-rope-gqa-qk-norm", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformer_lens(tmp_path: Path, kind: str, dtype: str) -> None:
    source, tokens = frozen(kind)
    expected = frozen_logits(source, tokens)
    convert(FoldedSource(source), tmp_path / "lens", to="transformer-lens", dtype=dtype)
    config = json.loads((tmp_path / "lens" / "hooked_transformer_config.json").read_text())
    assert config["normalization_type"] is None
    state = load_file(tmp_path / "lens" / "model.safetensors")
    theirs = {name: value.double() for name, value in state.items() if not name.startswith("harness.")}
    assert not any("ln" in name for name in theirs)
    found = hooked_logits(theirs, config, tokens)
    assert (found - expected).abs().max() <= (1e-5 if dtype == "float32" else 0.05) * expected.abs().max()
    back = open_source(tmp_path / "lens")
    assert same_section(back.section, folded_section(source.section))
    ours = our_logits(back, tokens)
    assert (ours - found).abs().max() <= (1e-5 if dtype == "float32" else 0.05) * expected.abs().max()
    convert(tmp_path / "lens", tmp_path / "run", proof="streamed")


def test_transformer_lens_itself(tmp_path: Path) -> None:
    library = pytest.importorskip("transformer_lens", reason="transformer-lens 3 is no dependency")
    if not hasattr(library, "HookedTransformer"):
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    for kind in ("gpt2", "llama-gqa-tied-wide-heads"):
        source, tokens = frozen(kind)
        convert(FoldedSource(source), tmp_path / kind, to="transformer-lens")
        config = json.loads((tmp_path / kind / "hooked_transformer_config.json").read_text())
        model = library.HookedTransformer(library.HookedTransformerConfig.from_dict(config)).eval()
        missing, _ = model.load_state_dict(load_file(tmp_path / kind / "model.safetensors"), strict=False)
        assert all(name.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")) for name in missing)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).double(), frozen_logits(source, tokens), rtol=0, atol=1e-4)


def test_a_transformer_lens_state_that_was_changed(tmp_path: Path) -> None:
    convert(FoldedSource(FrozenSource(KINDS["gpt2"])), tmp_path / "lens", to="transformer-lens", proof="streamed")
    file = tmp_path / "lens" / "model.safetensors"
    said = {"format": "pt", "model.bias": "true", "model.qkv_bias": "true"}
    state = load_file(file)
    for name in ("unembed.W_U", "unembed.b_U"):
        changed = {**state, name: state[name].clone()}
        changed[name].view(-1)[77] += 1e-3
        save_file(changed, file, {**said, "model.norm": "layernorm"})
        assert f"tensor {name} is not what the tensors harness.… beside it make" in refusal(
            lambda: open_source(tmp_path / "lens")
        )
    save_file(state, file, {**said, "model.norm": "layernorm"})
    assert open_source(tmp_path / "lens").section.norm_free
    save_file(state, file, said)
    assert "normalization_type is None, and what the final norm was is not in" in refusal(
        lambda: open_source(tmp_path / "lens")
    )


def test_megatron_has_no_such_model(tmp_path: Path) -> None:
    said = refusal(lambda: convert(FoldedSource(FrozenSource(KINDS["llama"])), tmp_path / "there", to="megatron"))
    assert "Megatron-core cannot express model.norm_free: its layers have norms" in said
    assert not (tmp_path / "there").exists()
