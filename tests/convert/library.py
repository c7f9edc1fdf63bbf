"""Folders that `transformers` itself wrote: random weights of every architecture that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_GPT2 = {"vocab_size": 211, "n_positions": 50, "n_embd": 48, "n_layer": 2, "n_head": 3}
_LLAMA = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

MODELS: dict[str, tuple[type[PreTrainedModel], type[Any], dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "gpt2-untied": (GPT2LMHeadModel, GPT2Config, {**_GPT2, "n_inner": 70, "tie_word_embeddings": False}),
    "llama": (LlamaForCausalLM, LlamaConfig, {**_LLAMA, "num_key_value_heads": 4}),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "llama-gqa-tied-wide-heads": (
        LlamaForCausalLM, LlamaConfig, {**_LLAMA, "tie_word_embeddings": True, "head_dim": 24}
    ),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {**_LLAMA, "rope_parameters": _LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _LLAMA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_LLAMA, "head_dim": 16, "sliding_window": None}),
}  # fmt: skip


def library_model(name: str, **changes: Any) -> PreTrainedModel:
    """A model of the library with random weights: biases and gains too, which it would begin as zeros and ones."""
    model_class, config_class, values = MODELS[name]
    model = model_class(config_class(**{**values, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.15)
            if weight.dim() == 1:
                weight += 0.5
    return model


def save_library_model(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """The same, saved by the library in several files."""
    model = library_model(name, **changes)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model
