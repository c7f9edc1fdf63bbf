"""What Megatron-core has to be told of a model: nothing in its checkpoints says all of it."""

from __future__ import annotations

from typing import Any

from harness.config import HarnessError
from harness.model import ModelSection

_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
"""Fixed in Megatron-core; only the factor can be set."""


def describe_for_megatron(section: ModelSection) -> dict[str, dict[str, Any]]:
    """Arguments of its TransformerConfig and GPTModel that make the model, as JSON has them.

    `activation_func` is named: "silu", or "gelu_tanh" for torch.nn.functional.gelu in its tanh form. Raises
    HarnessError, naming the key, where Megatron-core cannot express the model.
    """
    _check(section)
    gated = section.activation == "swiglu"
    model: dict[str, Any] = {
        "vocab_size": section.vocab_size,
        "max_sequence_length": section.max_positions,
        "position_embedding_type": "rope" if section.positions == "rope" else "learned_absolute",
        "share_embeddings_and_output_weights": section.tied_head,
    }
    if section.positions == "rope":
        scaling = section.rope_scaling
        model |= {"rotary_base": section.rope_theta, "rotary_percent": 1.0, "rope_scaling": scaling is not None}
        if scaling is not None:
            model["rope_scaling_factor"] = scaling.factor
    config = {
        "num_layers": section.layers,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.heads,
        "num_query_groups": section.key_value_heads,
        "kv_channels": section.head_width,
        "ffn_hidden_size": section.mlp_width,
        "normalization": "RMSNorm" if section.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": section.norm_epsilon,
        "gated_linear_unit": gated,
        "activation_func": "silu" if gated else "gelu_tanh",
        "add_bias_linear": section.bias,
        "add_qkv_bias": section.has_qkv_bias,
        "qk_layernorm": section.qk_norm,
    }
    return {"transformer_config": config, "gpt_model": model}


def _check(section: ModelSection) -> None:
    problem = None
    if section.norm_free:
        problem = "norm_free: its layers have norms; --to huggingface writes stand-ins for them"
    elif section.logit_softcap is not None:
        problem = f"logit_softcap {section.logit_softcap}: it has none"
    elif section.bias and not section.has_qkv_bias:
        problem = "qkv_bias false: where it has biases, queries, keys and values have them too"
    elif section.qk_norm and section.norm != "rmsnorm":
        problem = f"qk_norm with norm {section.norm}: all its norms are of one kind, and ours of heads is rmsnorm"
    elif section.rope_scaling is not None:
        said = section.rope_scaling.model_dump()
        other = next((key for key, value in _ROPE_SCALING.items() if said[key] != value), None)
        if other is not None:
            problem = f"rope_scaling.{other} {said[other]}: it is {_ROPE_SCALING[other]} there"
    if problem is not None:
        raise HarnessError(f"Megatron-core cannot express model.{problem}")
