"""A decoder whose norms are in any states, written out in float64 from the definitions: no shared projection, each site
its own norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.model import Decoder, SiteState
from harness.model.attention import rotate, rotation_tables


def norm(x: Tensor, module: torch.nn.Module, epsilon: float, state: SiteState) -> Tensor:
    """(1 - alpha) of the norm and alpha of its stand-in, plus the bias."""
    bias = getattr(module, "bias", None)
    centred = x - x.mean(-1, keepdim=True) if bias is not None else x
    sigma = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    scale = (1 - state.alpha) / sigma
    if state.sigma is not None:
        scale = scale + state.alpha / state.sigma
    y = centred * scale * module.weight.double()
    return y if bias is None else y + bias.double()


def sigmas(x: Tensor, layernorm: bool, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if layernorm else x
    return (centred.square().mean(-1) + epsilon).sqrt()


def reference_logits(
    model: Decoder, tokens: Tensor, states: dict[str, SiteState], seen: dict[str, Tensor] | None = None
) -> Tensor:
    """float64 logits (batch, sequence, vocab_size); into `seen` go the inputs of the norms, by site."""
    section, eps, real = model.section, model.section.norm_epsilon, SiteState()
    seen = {} if seen is None else seen
    x = F.embedding(tokens, model.token_embedding.weight.double())
    positions = torch.arange(tokens.shape[1])[None]
    rotation = None
    if section.positions == "learned":
        x = x + F.embedding(positions, model.position_embedding.weight.double())
    else:
        rotation = rotation_tables(positions, section, torch.float64)

    def linear(x: Tensor, module: torch.nn.Module, rows: slice | Tensor = slice(None)) -> Tensor:
        bias = None if module.bias is None else module.bias.double()[rows]
        return F.linear(x, module.weight.double()[rows], bias)

    for number, block in enumerate(model.layers):
        attention, width = block.attention, section.head_width
        per_group = section.heads // section.key_value_heads + 2
        head = torch.arange(section.key_value_heads * per_group)[:, None] * width + torch.arange(width)
        head = head.view(section.key_value_heads, per_group, width)
        rows = {"q": head[:, :-2], "k": head[:, -2:-1], "v": head[:, -1:]}
        parts = {}
        for part in "qkv":
            site = f"layers.{number}.{'v' if part == 'v' else 'qk'}"
            seen[site] = x
            normed = norm(x, block.attention_norm, eps, states.get(site, real))
            y = linear(normed, attention.qkv, rows[part].flatten()).unflatten(-1, (-1, width))
            if part != "v" and section.qk_norm:
                site = f"layers.{number}.{part}_norm"
                seen[site] = y
                y = norm(y, getattr(attention, f"{part}_norm"), eps, states.get(site, real))
            y = y.transpose(1, 2)
            parts[part] = rotate(y, *rotation) if rotation is not None and part != "v" else y
        mixed = F.scaled_dot_product_attention(
            parts["q"], parts["k"], parts["v"], is_causal=True, enable_gqa=per_group > 3
        )
        x = x + linear(mixed.transpose(1, 2).flatten(2), attention.output)
        site = f"layers.{number}.mlp"
        seen[site] = x
        normed = norm(x, block.mlp_norm, eps, states.get(site, real))
        if section.activation == "gelu":
            inner = F.gelu(linear(normed, block.mlp.up), approximate="tanh")
        else:
            inner = F.silu(linear(normed, block.mlp.gate)) * linear(normed, block.mlp.up)
        x = x + linear(inner, block.mlp.down)
    seen["final"] = x
    normed = norm(x, model.final_norm, eps, states.get("final", real))
    return normed @ model.head.weight[: section.vocab_size].double().T
