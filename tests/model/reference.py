"""transformers' models with our weights copied over: the independent truth for the decoder.

The mapping is written out by hand here, so that a mistake in the harness's own conversion cannot hide.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from harness.model import Decoder, ModelSection


def reference_model(section: ModelSection, model: Decoder) -> PreTrainedModel:
    """An eager transformers model of the section's shape with the weights of `model`."""
    reference = _empty(section)
    weights = _gpt2(model) if section.positions == "learned" else _llama(model)
    reference.load_state_dict({**weights, "lm_head.weight": _rows(model, model.head.weight)}, strict=True)
    return reference


def _empty(section: ModelSection) -> PreTrainedModel:
    if section.positions == "learned":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=section.vocab_size, n_positions=section.max_positions, n_embd=section.hidden_size,
                n_layer=section.layers, n_head=section.heads, n_inner=section.mlp_width, resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0, layer_norm_epsilon=section.norm_epsilon, tie_word_embeddings=section.tied_head,
            )
        )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": section.rope_theta}
    if section.rope_scaling is not None:
        scaling = section.rope_scaling
        rope |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }  # fmt: skip
    shared = dict(  # noqa: C408
        vocab_size=section.vocab_size, hidden_size=section.hidden_size, intermediate_size=section.mlp_width,
        num_hidden_layers=section.layers, num_attention_heads=section.heads, head_dim=section.head_width,
        num_key_value_heads=section.key_value_heads, max_position_embeddings=section.max_positions or 4096,
        rms_norm_eps=section.norm_epsilon, tie_word_embeddings=section.tied_head, rope_parameters=rope,
    )  # fmt: skip
    if section.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**shared))
    if section.has_qkv_bias and not section.bias:
        return Qwen2ForCausalLM(Qwen2Config(**shared))
    return LlamaForCausalLM(LlamaConfig(**shared))


def _rows(model: Decoder, weight: nn.Parameter) -> torch.Tensor:
    return weight.detach()[: model.section.vocab_size]


def _gpt2(model: Decoder) -> dict[str, torch.Tensor]:
    """GPT-2 keeps its matrices transposed, and q, k, v as three blocks of columns."""
    names = {
        "transformer.wte.weight": _rows(model, model.token_embedding.weight),
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.final_norm.weight,
        "transformer.ln_f.bias": model.final_norm.bias,
    }
    width = model.section.head_width
    for number, block in enumerate(model.layers):
        prefix = f"transformer.h.{number}."
        weight = block.attention.qkv.weight.view(-1, 3, width, model.section.hidden_size)
        bias = block.attention.qkv.bias.view(-1, 3, width)
        names |= {
            prefix + "ln_1.weight": block.attention_norm.weight,
            prefix + "ln_1.bias": block.attention_norm.bias,
            prefix + "attn.c_attn.weight": torch.cat([weight[:, part].flatten(0, 1) for part in range(3)]).T,
            prefix + "attn.c_attn.bias": torch.cat([bias[:, part].flatten() for part in range(3)]),
            prefix + "attn.c_proj.weight": block.attention.output.weight.T,
            prefix + "attn.c_proj.bias": block.attention.output.bias,
            prefix + "ln_2.weight": block.mlp_norm.weight,
            prefix + "ln_2.bias": block.mlp_norm.bias,
            prefix + "mlp.c_fc.weight": block.mlp.up.weight.T,
            prefix + "mlp.c_fc.bias": block.mlp.up.bias,
            prefix + "mlp.c_proj.weight": block.mlp.down.weight.T,
            prefix + "mlp.c_proj.bias": block.mlp.down.bias,
        }
    return names


def _llama(model: Decoder) -> dict[str, torch.Tensor]:
    section = model.section
    names = {
        "model.embed_tokens.weight": _rows(model, model.token_embedding.weight),
        "model.norm.weight": model.final_norm.weight,
    }
    per_group = section.heads // section.key_value_heads
    for number, block in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        qkv = block.attention.qkv.weight.view(-1, per_group + 2, section.head_width, section.hidden_size)
        names |= {
            prefix + "self_attn.q_proj.weight": qkv[:, :per_group].flatten(0, 2),
            prefix + "self_attn.k_proj.weight": qkv[:, per_group].flatten(0, 1),
            prefix + "self_attn.v_proj.weight": qkv[:, per_group + 1].flatten(0, 1),
            prefix + "self_attn.o_proj.weight": block.attention.output.weight,
            prefix + "input_layernorm.weight": block.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": block.mlp_norm.weight,
            prefix + "mlp.gate_proj.weight": block.mlp.gate.weight,
            prefix + "mlp.up_proj.weight": block.mlp.up.weight,
            prefix + "mlp.down_proj.weight": block.mlp.down.weight,
        }
        if section.has_qkv_bias:
            bias = block.attention.qkv.bias.view(-1, per_group + 2, section.head_width)
            names |= {
                prefix + "self_attn.q_proj.bias": bias[:, :per_group].flatten(),
                prefix + "self_attn.k_proj.bias": bias[:, per_group].flatten(),
                prefix + "self_attn.v_proj.bias": bias[:, per_group + 1].flatten(),
            }
        if section.qk_norm:
            names[prefix + "self_attn.q_norm.weight"] = block.attention.q_norm.weight
            names[prefix + "self_attn.k_norm.weight"] = block.attention.k_norm.weight
    return names
