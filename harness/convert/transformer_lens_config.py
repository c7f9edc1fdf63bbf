"""The fields of a HookedTransformerConfig and our `model` section, each made from the other.

What each field means is in TransformerLens's documentation of that class (up to release 3; 4.0 removed it). A field
that is missing has their default.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose, sqrt
from typing import Any

from harness.config import HarnessError, validate
from harness.model import ModelSection

from .records import Fields

Config = Mapping[str, Any]

_NORMS = {"LN": "layernorm", "RMS": "rmsnorm"}
_THEIR_NORMS = {ours: theirs for theirs, ours in _NORMS.items()}
_FOLDED = "the norms' weights must be there (from_pretrained_no_processing keeps them)"
_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""One function, computed in three ways."""
_OTHER_BLOCKS = ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""What TransformerLens computes otherwise by this name alone, and no other field."""

# What is theirs by default, and must be so for the decoder to compute the same.
_FIXED: dict[str, Any] = {
    "attention_dir": "causal",
    "attn_only": False,
    "clip_qkv": None,
    "load_in_4bit": False,
    "num_experts": None,
    "parallel_attn_mlp": False,
    "post_embedding_ln": False,
    "rotary_adjacent_pairs": False,
    "rotary_scaling_factor": 1.0,
    "scale_attn_by_inverse_layer_idx": False,
    "use_attention_sinks": False,
    "use_attn_scale": True,
    "use_dynamic_ntk_rope": False,
    "use_local_attn": False,
    "use_logn_attn": False,
    "use_normalization_before_and_after": False,
    "use_yarn_rope": False,
}


def read_config(config: Config, label: str) -> dict[str, Any]:
    """Values of our section but for those of which a HookedTransformerConfig says nothing: bias, qkv_bias, and, of a
    model without norms, which kind there was.

    Raises HarnessError, naming the key, where the decoder cannot express the model.
    """
    fields = Fields(config, label)
    for key, wanted in _FIXED.items():
        fields.expect(key, wanted, default=wanted)
    free = config.get("normalization_type", "LN") is None
    norm = fields.expect("normalization_type", *_NORMS, default="LN", why=_FOLDED)
    if norm == "LN" and not free:
        fields.expect("final_rms", False, default=False, why="one kind of norm all through")
    rotary = fields.expect("positional_embedding_type", "standard", "rotary", default="standard") == "rotary"
    gated = fields.expect("gated_mlp", False, True, default=False)
    fields.expect("act_fn", *(("silu",) if gated else _GELUS), why=f"the decoder's MLP where gated_mlp is {gated}")
    if config.get("original_architecture") in _OTHER_BLOCKS:
        raise fields.refusal("original_architecture", "its norms stand elsewhere")
    width, head, vocab = fields.number("d_model"), fields.number("d_head"), fields.number("d_vocab")
    heads, scale = fields.number("n_heads", -1), fields.number("attn_scale", -1.0)
    if head < 1:
        raise fields.refusal("d_head", "heads have a width")
    if rotary:
        fields.expect("rotary_dim", head, default=head, why="the decoder turns whole heads, of d_head")
    if scale != -1.0 and not isclose(scale, sqrt(head), rel_tol=1e-6):
        raise fields.refusal("attn_scale", "the decoder divides by the square root of d_head")
    if fields.number("attn_scores_soft_cap", -1.0) > 0:
        raise fields.refusal("attn_scores_soft_cap", "the decoder has no such thing")
    if fields.number("d_vocab_out", -1) != -1:
        fields.expect("d_vocab_out", vocab, why="as many tokens out as in, d_vocab")
    softcap, init_std = fields.number("output_logits_soft_cap", -1.0), fields.number("initializer_range", -1.0)
    return {
        "family": "llama" if rotary else "gpt2",
        "layers": fields.number("n_layers"),
        "hidden_size": width,
        "heads": heads if heads != -1 else width // head,
        "kv_heads": config.get("n_key_value_heads"),
        "head_size": head,
        "mlp_size": fields.number("d_mlp", 4 * width),
        "max_positions": fields.number("n_ctx"),
        "positions": "rope" if rotary else "learned",
        "rope_theta": fields.number("rotary_base", 10000),
        "rope_scaling": _read_scaling(fields) if rotary else None,
        **({"norm_free": True} if free else {"norm": _NORMS[norm], "norm_epsilon": fields.number("eps", 1e-5)}),
        "activation": "swiglu" if gated else "gelu",
        "qk_norm": fields.expect("use_qk_norm", False, True, default=False),
        "logit_softcap": softcap if softcap > 0 else None,
        "tied_head": fields.expect("tie_word_embeddings", False, True, default=False),
        "vocab_size": vocab,
        **({"init_std": init_std} if init_std > 0 else {}),
    }


def _read_scaling(fields: Fields) -> dict[str, Any] | None:
    if not fields.expect("use_NTK_by_parts_rope", False, True, default=False):
        return None
    return {
        "factor": fields.number("NTK_by_parts_factor", 8.0),
        "low_freq_factor": fields.number("NTK_by_parts_low_freq_factor", 1.0),
        "high_freq_factor": fields.number("NTK_by_parts_high_freq_factor", 4.0),
        "original_max_positions": fields.number("NTK_original_ctx_len", 8192),
    }


def as_section(values: dict[str, Any], label: str) -> ModelSection:
    """Raises HarnessError."""
    return validate(ModelSection, values, f"{label} as our model section")


def write_config(section: ModelSection) -> dict[str, Any]:
    """What `HookedTransformerConfig.from_dict` takes; fields that only late releases know are said where they matter.

    Raises HarnessError, naming the key, where a HookedTransformer cannot be the model.
    """
    if section.activation == "swiglu" and section.bias:
        raise HarnessError(
            "model.bias is true with swiglu: TransformerLens adds b_in after the product of gate and input, and has no "
            "bias of the gate"
        )
    rotary = section.positions == "rope"
    grouped = section.key_value_heads != section.heads
    config: dict[str, Any] = {
        "model_name": "custom",
        "n_layers": section.layers,
        "d_model": section.hidden_size,
        "n_heads": section.heads,
        "n_key_value_heads": section.key_value_heads if grouped else None,
        "d_head": section.head_width,
        "d_mlp": section.mlp_width,
        "d_vocab": section.vocab_size,
        "n_ctx": section.max_positions,
        "act_fn": "silu" if section.activation == "swiglu" else "gelu_new",
        "gated_mlp": section.activation == "swiglu",
        "normalization_type": None if section.norm_free else _THEIR_NORMS[section.norm],
        "eps": section.norm_epsilon,
        "positional_embedding_type": "rotary" if rotary else "standard",
        "initializer_range": section.init_std,
        "tie_word_embeddings": section.tied_head,
    }
    if rotary:
        theta = section.rope_theta
        config |= {
            "rotary_dim": section.head_width,
            "rotary_base": int(theta) if theta.is_integer() else theta,
            "rotary_adjacent_pairs": False,
        }
    if section.rope_scaling is not None:
        config |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": section.rope_scaling.factor,
            "NTK_by_parts_low_freq_factor": section.rope_scaling.low_freq_factor,
            "NTK_by_parts_high_freq_factor": section.rope_scaling.high_freq_factor,
            "NTK_original_ctx_len": section.rope_scaling.original_max_positions,
        }
    if section.qk_norm:
        config["use_qk_norm"] = True
    if section.logit_softcap is not None:
        config["output_logits_soft_cap"] = section.logit_softcap
    return config
