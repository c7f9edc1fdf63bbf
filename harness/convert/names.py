"""Hugging Face's names of our parameters, one table a family, read in both directions (see rules.py)."""

from __future__ import annotations

from .rules import Row, heads, transposed

# transformers' Conv1D keeps its matrices as (in, out), and the three parts of attention side by side.
GPT2 = (
    Row("token_embedding.weight", "transformer.wte.weight"),
    Row("position_embedding.weight", "transformer.wpe.weight"),
    Row("layers.{i}.attention_norm.weight", "transformer.h.{i}.ln_1.weight"),
    Row("layers.{i}.attention_norm.bias", "transformer.h.{i}.ln_1.bias"),
    *(
        row
        for part in "qkv"
        for row in (
            Row(
                "layers.{i}.attention.qkv.weight",
                "transformer.h.{i}.attn.c_attn.weight",
                heads(part, fused=True, flipped=True),
            ),
            Row("layers.{i}.attention.qkv.bias", "transformer.h.{i}.attn.c_attn.bias", heads(part, fused=True)),
        )
    ),
    Row("layers.{i}.attention.output.weight", "transformer.h.{i}.attn.c_proj.weight", transposed),
    Row("layers.{i}.attention.output.bias", "transformer.h.{i}.attn.c_proj.bias"),
    Row("layers.{i}.mlp_norm.weight", "transformer.h.{i}.ln_2.weight"),
    Row("layers.{i}.mlp_norm.bias", "transformer.h.{i}.ln_2.bias"),
    Row("layers.{i}.mlp.up.weight", "transformer.h.{i}.mlp.c_fc.weight", transposed),
    Row("layers.{i}.mlp.up.bias", "transformer.h.{i}.mlp.c_fc.bias"),
    Row("layers.{i}.mlp.down.weight", "transformer.h.{i}.mlp.c_proj.weight", transposed),
    Row("layers.{i}.mlp.down.bias", "transformer.h.{i}.mlp.c_proj.bias"),
    Row("final_norm.weight", "transformer.ln_f.weight"),
    Row("final_norm.bias", "transformer.ln_f.bias"),
    Row("head.weight", "lm_head.weight"),
)

# Also Mistral, Qwen 2 (biases at queries, keys and values) and Qwen 3 (norms of each head).
LLAMA = (
    Row("token_embedding.weight", "model.embed_tokens.weight"),
    Row("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    *(
        Row(f"layers.{{i}}.attention.qkv.{kind}", f"model.layers.{{i}}.self_attn.{part}_proj.{kind}", heads(part))
        for part in "qkv"
        for kind in ("weight", "bias")
    ),
    Row("layers.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("layers.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Row("layers.{i}.attention.output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row("layers.{i}.attention.output.bias", "model.layers.{i}.self_attn.o_proj.bias"),
    Row("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    *(
        Row(f"layers.{{i}}.mlp.{part}.{kind}", f"model.layers.{{i}}.mlp.{part}_proj.{kind}")
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    Row("final_norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
)
