"""TransformerLens's states: their logits by its documented arithmetic and by itself, both ways, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, einsum

from harness.config import HarnessError
from harness.convert import open_source, streamed_logits
from harness.convert.source import decoder_shapes
from harness.convert.transformer_lens import CONFIG, TENSORS, TransformerLensSource, write_transformer_lens
from harness.data import TokenizerSection, open_tokenizer
from harness.model import ModelSection, RopeScalingSection, build_decoder
from harness.parallel import Fragment
from tests.convert.sources import DecoderSource, read_all
from tests.model.sections import SECTIONS

KINDS: dict[str, ModelSection] = {
    **SECTIONS,
    "qwen2": ModelSection(layers=2, hidden_size=32, heads=4, kv_heads=2, vocab_size=53, qkv_bias=True),
    "llama-3.1": ModelSection(
        layers=1, hidden_size=32, heads=2, vocab_size=53, rope_theta=123.5,
        rope_scaling=RopeScalingSection(factor=4.0, high_freq_factor=3.0, original_max_positions=16),
    ),
    "softcap-no-bias": ModelSection(
        family="gpt2", layers=1, hidden_size=32, heads=2, vocab_size=53, max_positions=30, bias=False, logit_softcap=0.7
    ),
    "rope-layernorm-gqa": ModelSection(
        family="gpt2", layers=2, hidden_size=32, heads=4, kv_heads=2, vocab_size=53, positions="rope", qk_norm=True,
        norm_epsilon=1e-3, max_positions=30,
    ),
    "rmsnorm-learned": ModelSection(
        layers=1, hidden_size=32, heads=4, vocab_size=53, positions="learned", norm="rmsnorm", max_positions=30
    ),
}  # fmt: skip
REAL = "transformer-lens 3 is no dependency: pip install 'transformer-lens<4' into an environment of its own"


def hooked_logits(state: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """What a HookedTransformer computes of float64 tensors, by the documentation of its classes."""
    state = {name.replace("attn._", "attn."): tensor for name, tensor in state.items()}
    count, heads, width = tokens.shape[1], config["n_heads"], config["d_head"]

    def norm(x: Tensor, name: str, *, centre: bool) -> Tensor:
        if config["normalization_type"] is None:
            return x
        x = x - x.mean(-1, keepdim=True) if centre else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + config["eps"]).sqrt() * state[f"{name}.w"]
        return x + state[f"{name}.b"] if centre else x

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.arange(width // 2, dtype=torch.float64)
        frequencies = 1 / config["rotary_base"] ** (2 * pairs / width)
        if config.get("use_NTK_by_parts_rope"):
            for pair, frequency in enumerate(frequencies.tolist()):
                length, original = 2 * math.pi / frequency, config["NTK_original_ctx_len"]
                low, high = config["NTK_by_parts_low_freq_factor"], config["NTK_by_parts_high_freq_factor"]
                if length > original / low:
                    frequencies[pair] = frequency / config["NTK_by_parts_factor"]
                elif length > original / high:
                    share = (original / length - low) / (high - low)
                    frequencies[pair] = (1 - share) * frequency / config["NTK_by_parts_factor"] + share * frequency
        angles = (torch.arange(count)[:, None] * frequencies).repeat(1, 2)[:, None]
        flipped = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
        return x * angles.cos() + flipped * angles.sin()

    x = state["embed.W_E"][tokens]
    if config["positional_embedding_type"] == "standard":
        x = x + state["pos_embed.W_pos"][:count]
    centre = config["normalization_type"] == "LN"
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}."
        attn = block + "attn."
        before = norm(x, block + "ln1", centre=centre)
        q, k, v = (
            einsum("bpm,hmd->bphd", before, state[f"{attn}W_{part}"]) + state[f"{attn}b_{part}"] for part in "QKV"
        )
        if config.get("use_qk_norm"):
            q, k = norm(q, attn + "q_norm", centre=False), norm(k, attn + "k_norm", centre=False)
        if config["positional_embedding_type"] == "rotary":
            q, k = rotate(q), rotate(k)
        shared = heads // k.shape[2]
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        scores = einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
        pattern = scores.masked_fill(future, -math.inf).softmax(-1)
        z = einsum("bhqk,bkhd->bqhd", pattern, v)
        x = x + einsum("bqhd,hdm->bqm", z, state[attn + "W_O"]) + state[attn + "b_O"]
        before, mlp = norm(x, block + "ln2", centre=centre), block + "mlp."
        if config["gated_mlp"]:
            inner = F.silu(before @ state[mlp + "W_gate"]) * (before @ state[mlp + "W_in"]) + state[mlp + "b_in"]
        else:
            inner = before @ state[mlp + "W_in"] + state[mlp + "b_in"]
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + inner @ state[mlp + "W_out"] + state[mlp + "b_out"]
    logits = norm(x, "ln_final", centre=centre) @ state["unembed.W_U"] + state["unembed.b_U"]
    cap = config.get("output_logits_soft_cap", -1.0)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def tokens_for(section: ModelSection, *, count: int = 25) -> Tensor:
    assert section.vocab_size is not None
    return torch.randint(section.vocab_size, (3, count), generator=torch.Generator().manual_seed(5))


def written(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> DecoderSource:
    folder.mkdir()
    source = DecoderSource(KINDS[kind], seed=3)
    assert set(write_transformer_lens(folder, source, dtype)) == {TENSORS}
    return source


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


def save(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / TENSORS, metadata)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untied model with grouped queries, and none of the biases."""
    folder = tmp_path_factory.mktemp("written") / "llama"
    written("llama-mqa-wide-heads", folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "gpt2"
    written("gpt2", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_the_decoders(kind: str, tmp_path: Path) -> None:
    source = written(kind, tmp_path / "target")
    state, config = load(tmp_path / "target")
    tokens = tokens_for(source.section)
    expected = hooked_logits({name: tensor.double() for name, tensor in state.items()}, config, tokens)
    logits = source.decoder.logits(tokens)[..., : source.section.vocab_size]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_bit_equal(kind: str, tmp_path: Path) -> None:
    source = written(kind, tmp_path / "target")
    back = open_source(tmp_path / "target")
    assert isinstance(back, TransformerLensSource)
    assert back.section.architecture() == source.section.architecture()
    weights = read_all(back, decoder_shapes(source.section))
    assert weights.keys() == source.weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, source.weights[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_biases_are_not_taken_for_none(kind: str, tmp_path: Path) -> None:
    """A model at its start has biases that are zero, as those are that it does not have."""
    source = DecoderSource(KINDS[kind])
    source.weights = {name: torch.zeros_like(tensor) for name, tensor in source.weights.items()}
    write_transformer_lens(tmp_path, source, torch.float32)
    assert open_source(tmp_path).section.architecture() == source.section.architecture()


def test_any_slice_can_be_read(llama: Path) -> None:
    source, original = open_source(llama), DecoderSource(KINDS["llama-mqa-wide-heads"], seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, weight in original.weights.items():
        for _ in range(4):
            ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in weight.shape]
            box = torch.full([stop - start for start, stop in ends], math.nan)
            source.read([Fragment(name, "master", tuple(weight.shape), tuple(start for start, _ in ends), box)])
            assert torch.equal(box, weight[tuple(slice(*end) for end in ends)]), name


def test_the_state_has_their_names_and_shapes(llama: Path, gpt2: Path) -> None:
    state, config = load(llama)
    block = {name.removeprefix("blocks.0."): tuple(t.shape) for name, t in state.items() if name.startswith("blocks")}
    assert block == {
        "attn.W_Q": (3, 48, 24), "attn._W_K": (1, 48, 24), "attn._W_V": (1, 48, 24), "attn.W_O": (3, 24, 48),
        "attn.b_Q": (3, 24), "attn._b_K": (1, 24), "attn._b_V": (1, 24), "attn.b_O": (48,), "ln1.w": (48,),
        "ln2.w": (48,), "mlp.W_in": (48, 128), "mlp.W_gate": (48, 128), "mlp.b_in": (128,), "mlp.W_out": (128, 48),
        "mlp.b_out": (48,),
    }  # fmt: skip
    assert {"embed.W_E", "ln_final.w", "unembed.W_U", "unembed.b_U"} == {n for n in state if not n.startswith("blocks")}
    assert not any(tensor.any() for name, tensor in state.items() if "b_" in name)
    assert (config["n_key_value_heads"], config["rotary_dim"], config["rotary_adjacent_pairs"]) == (1, 24, False)
    state, config = load(gpt2)
    assert state["blocks.1.attn.W_K"].shape == (3, 48, 16)
    assert state["pos_embed.W_pos"].shape == (40, 48)
    assert torch.equal(state["unembed.W_U"], state["embed.W_E"].T)
    assert (config["n_key_value_heads"], config["tie_word_embeddings"], config["act_fn"]) == (None, True, "gelu_new")
    with safe_open(gpt2 / TENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_rounded_weights(tmp_path: Path) -> None:
    source = written("llama-gqa-tied", tmp_path / "target", dtype=torch.bfloat16)
    back = open_source(tmp_path / "target")
    assert back.dtype == torch.bfloat16
    for name, weight in read_all(back, decoder_shapes(source.section)).items():
        assert torch.equal(weight, source.weights[name].bfloat16().float()), name


def test_a_state_of_theirs(tmp_path: Path) -> None:
    """As HookedTransformer.state_dict() and its cfg.to_dict() give them: buffers, every field, no metadata."""
    section = KINDS["qwen2"]
    state, config = _of_theirs(tmp_path / "first", "qwen2")
    source = open_source(save(tmp_path / "theirs", state, config))
    assert source.section.architecture() == section.architecture()  # b_Q, b_K and b_V are not zero
    tokens = tokens_for(section, count=20)
    expected = hooked_logits({name: tensor.double() for name, tensor in state.items()}, config, tokens)
    logits = streamed_logits(source, tokens, torch.arange(20).expand(3, 20))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_llama_of_theirs_has_no_biases(tmp_path: Path) -> None:
    state, config = _of_theirs(tmp_path / "first", "llama-gqa-tied")
    config["tie_word_embeddings"] = False  # their default, although it is
    source = open_source(save(tmp_path / "theirs", state, config))
    assert not source.section.has_qkv_bias
    assert not source.section.bias
    assert not source.section.tied_head


def test_a_gpt2_of_theirs_has_biases_even_where_all_are_zero(tmp_path: Path) -> None:
    state, config = _of_theirs(tmp_path / "first", "gpt2")
    for name in state:
        if ".b_" in name:
            state[name] = torch.zeros_like(state[name])
    source = open_source(save(tmp_path / "theirs", state, config))
    assert source.section.architecture() == KINDS["gpt2"].architecture()


def test_grouped_heads_that_are_as_many_as_query_heads(tmp_path: Path) -> None:
    """Their names follow the configuration, not the numbers."""
    source = written("llama", tmp_path / "first")
    state, config = load(tmp_path / "first")
    for name in list(state):
        if name.endswith(("_K", "_V")):
            state[name[:-3] + "_" + name[-3:]] = state.pop(name)
    config["n_key_value_heads"] = config["n_heads"]
    back = open_source(save(tmp_path / "theirs", state, config))
    for name, weight in read_all(back, decoder_shapes(source.section)).items():
        assert torch.equal(weight, source.weights[name]), name


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    source = DecoderSource(ModelSection(layers=1, hidden_size=16, heads=2, vocab_size=257))
    source.tokenizer = open_tokenizer(TokenizerSection(kind="bytes"))
    write_transformer_lens(tmp_path, source, torch.float32)
    tokenizer = open_source(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.fingerprint == source.tokenizer.fingerprint


def _of_theirs(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    written(kind, folder)
    state, config = load(folder)
    for layer in range(config["n_layers"]):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(4, 4).tril().bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-math.inf)
        state[f"blocks.{layer}.attn.rotary_sin"] = torch.ones(4, 8)
        state[f"blocks.{layer}.attn.rotary_cos"] = torch.ones(4, 8)
    config |= {"device": "cpu", "dtype": "torch.float32", "attn_scale": math.sqrt(config["d_head"]), "seed": None}
    return state, config | {"d_vocab_out": config["d_vocab"], "attn_scores_soft_cap": -1.0, "clip_qkv": None}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("blocks.0.attn.W_Q", None, "tensor blocks.0.attn.W_Q: not there"),
        ("embed.W_E", None, "tensor embed.W_E: not there"),
        ("blocks.0.ln1.w", None, "tensor blocks.0.ln1.w: not there"),
        ("blocks.0.attn.W_Q", lambda t: t[:, :, :-1], r"W_Q has shape \(3, 48, 23\), and \(3, 48, 24\)"),
        ("unembed.W_U", lambda t: t.T, r"W_U has shape \(97, 48\)"),
        ("ln_final.w", lambda t: t.double(), "ln_final.w is F64"),
        ("blocks.0.attn.b_O", lambda t: t + 1e-30, "b_O must be zeros"),
        ("blocks.0.mlp.b_in", lambda t: t - 1, "mlp.b_in must be zeros"),
        ("blocks.0.attn._b_V", lambda t: t + 1, "_b_V must be zeros"),
        ("unembed.b_U", lambda t: t + torch.eye(97)[96], "unembed.b_U must be zeros"),
        ("unembed.b_U", lambda t: t[1:], r"unembed.b_U must be zeros of shape \(97,\)"),
        ("unembed.b_U", lambda t: t.int(), "unembed.b_U must be zeros"),
    ],
)
def test_wrong_tensors_are_refused(llama: Path, tmp_path: Path, name: str, change: Any, said: str) -> None:
    state, config = load(llama)
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    folder = save(tmp_path / "wrong", state, config, {"model.bias": "false", "model.qkv_bias": "false"})
    with pytest.raises(HarnessError, match=said) as raised:
        open_source(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_tensor_is_refused(gpt2: Path, tmp_path: Path) -> None:
    state, config = load(gpt2)
    state["blocks.0.ln1_post.w"] = torch.ones(48)
    with pytest.raises(HarnessError, match=r"tensor blocks\.0\.ln1_post\.w: there, and the model"):
        open_source(save(tmp_path / "wrong", state, config))


def test_biases_may_be_left_out(llama: Path, tmp_path: Path) -> None:
    state, config = load(llama)
    state = {name: tensor for name, tensor in state.items() if "b_" not in name}
    assert not open_source(save(tmp_path / "theirs", state, config)).section.has_qkv_bias


@pytest.mark.parametrize("row", [0, 210])
def test_a_tied_head_must_be_the_embedding(gpt2: Path, tmp_path: Path, row: int) -> None:
    state, config = load(gpt2)
    state["unembed.W_U"][17, row] += 1e-3
    with pytest.raises(HarnessError, match=r"W_U is not embed\.W_E transposed, although .* tie_word_embeddings"):
        open_source(save(tmp_path / "wrong", state, config))
    config["tie_word_embeddings"] = False
    source = open_source(save(tmp_path / "untied", state, config))
    assert torch.equal(read_all(source, decoder_shapes(source.section))["head.weight"], state["unembed.W_U"].T)


def test_a_tied_head_is_compared_in_blocks(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.convert.transformer_lens._BLOCK_ELEMENTS", 5 * 211)
    assert open_source(gpt2).section.tied_head
    state, config = load(gpt2)
    state["unembed.W_U"][47, 210] += 1
    with pytest.raises(HarnessError, match="transposed"):
        open_source(save(tmp_path / "wrong", state, config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "solu_ln"), ("act_fn", "gelu_new"), ("attention_dir", "bidirectional"), ("attn_only", True),
        ("attn_scale", 1.0), ("attn_scores_soft_cap", 50.0), ("clip_qkv", 8.0), ("d_head", 0), ("d_model", "48"),
        ("d_vocab_out", 10), ("n_ctx", None), ("n_heads", 2), ("n_layers", None), ("normalization_type", "RMSPre"),
        ("normalization_type", None), ("num_experts", 8), ("original_architecture", "Olmo2ForCausalLM"),
        ("parallel_attn_mlp", True), ("positional_embedding_type", "shortformer"), ("post_embedding_ln", True),
        ("rotary_adjacent_pairs", True), ("rotary_dim", 12), ("rotary_scaling_factor", 8.0),
        ("scale_attn_by_inverse_layer_idx", True), ("use_attention_sinks", True), ("use_attn_scale", False),
        ("use_local_attn", True), ("use_normalization_before_and_after", True), ("use_yarn_rope", True),
    ],
)  # fmt: skip
def test_what_the_decoder_lacks_is_refused_by_its_key(llama: Path, tmp_path: Path, key: str, value: Any) -> None:
    state, config = load(llama)
    said = r"W_Q has shape \(3, .*by the configuration" if key == "n_heads" else f"{CONFIG}: {key} is"
    with pytest.raises(HarnessError, match=said) as raised:
        open_source(save(tmp_path / "wrong", state, config | {key: value}))
    assert "\n" not in str(raised.value)


def test_a_last_norm_of_another_kind_is_refused(gpt2: Path, tmp_path: Path) -> None:
    state, config = load(gpt2)
    with pytest.raises(HarnessError, match="final_rms is True"):
        open_source(save(tmp_path / "wrong", state, config | {"final_rms": True}))


def test_biases_of_a_gated_mlp_cannot_be_written(tmp_path: Path) -> None:
    section = ModelSection(layers=1, hidden_size=16, heads=2, vocab_size=11, bias=True)
    with pytest.raises(HarnessError, match=r"model\.bias is true with swiglu"):
        write_transformer_lens(tmp_path, DecoderSource(section), torch.float32)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.pt", "state.pth"])
def test_pickled_weights_are_not_read(gpt2: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_bytes((gpt2 / CONFIG).read_bytes())
    torch.save({}, tmp_path / name)
    with pytest.raises(HarnessError, match=rf"{name}: pickled weights .* safetensors.torch.save_file"):
        open_source(tmp_path)


def test_missing_and_damaged_files(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((gpt2 / CONFIG).read_bytes())
    with pytest.raises(HarnessError, match=r"has no model\.safetensors"):
        open_source(tmp_path)
    (tmp_path / TENSORS).write_bytes((gpt2 / TENSORS).read_bytes()[:-1])
    with pytest.raises(HarnessError, match="is not a safetensors file"):
        open_source(tmp_path)
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(HarnessError, match="not a mapping"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_computes_the_same(kind: str, tmp_path: Path) -> None:
    lens = pytest.importorskip("transformer_lens", reason=REAL, exc_type=ImportError)
    if "HookedTransformer" not in dir(lens):
        pytest.skip(REAL)
    source = written(kind, tmp_path / "target")
    state, config = load(tmp_path / "target")
    model = lens.HookedTransformer(lens.HookedTransformerConfig.from_dict(config | {"device": "cpu"}))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos")) for name in missing)
    tokens = tokens_for(source.section)
    with torch.inference_mode():
        logits = source.decoder.logits(tokens)[..., : source.section.vocab_size]
        difference = (model(tokens) - logits).abs().max().item()
        print(f"{kind}: {difference:.3g} of {logits.abs().max().item():.3g}")  # with -s, for the record
        assert difference < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_library_is_read(kind: str, tmp_path: Path) -> None:
    """Its own parameters, all random but for biases that the decoder lacks."""
    lens = pytest.importorskip("transformer_lens", reason=REAL, exc_type=ImportError)
    if "HookedTransformer" not in dir(lens):
        pytest.skip(REAL)
    written(kind, tmp_path / "shape")
    _, config = load(tmp_path / "shape")
    lacking = {name for name, tensor in load(tmp_path / "shape")[0].items() if not tensor.any()}
    model = lens.HookedTransformer(lens.HookedTransformerConfig.from_dict(config | {"device": "cpu"}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in lacking:
                weight.add_(torch.randn_like(weight), alpha=0.2)
        if config["tie_word_embeddings"]:
            model.unembed.W_U.copy_(model.embed.W_E.T)
    bias = KINDS[kind].bias
    metadata = {"model.bias": str(bias).lower(), "model.qkv_bias": str(KINDS[kind].has_qkv_bias).lower()}
    everything = {key: value for key, value in model.cfg.to_dict().items() if key != "dtype"} | {"dtype": "float32"}
    folder = save(tmp_path / "theirs", model.state_dict(), json.loads(json.dumps(everything, default=float)), metadata)
    source = open_source(folder)
    decoder = build_decoder(source.section.model_copy(update={"vocab_multiple": 1}), seed=0).eval()
    source.read([Fragment.whole(name, "master", decoder.get_parameter(name).detach()) for name in decoder.placements()])
    tokens = tokens_for(source.section)
    with torch.inference_mode():
        difference = (model(tokens) - decoder.logits(tokens)).abs().max().item()
    print(f"{kind}: {difference:.3g}")
    assert difference < 1e-4
