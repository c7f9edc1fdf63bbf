"""Named model shapes: what a family or a published model says of the fields that a configuration leaves out."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "tied_head": True},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_head": False},
}


def _gpt2(layers: int, hidden_size: int, heads: int) -> dict[str, Any]:
    return {"family": "gpt2", "layers": layers, "hidden_size": hidden_size, "heads": heads, "max_positions": 1024}


def _ladder(layers: int, hidden_size: int, heads: int) -> dict[str, Any]:
    """One rung: Llama family, tied head, so that at small widths the vocabulary does not outweigh the blocks."""
    return {"family": "llama", "layers": layers, "hidden_size": hidden_size, "heads": heads, "tied_head": True}


SHAPES: dict[str, dict[str, Any]] = {
    # Radford et al. 2019, table 2; parameter counts as released.
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # Llama 3.2 1B without its rope scaling for long contexts, and Llama 3 8B (Grattafiori et al., arXiv 2407.21783).
    "llama-1b": {
        "family": "llama", "layers": 16, "hidden_size": 2048, "heads": 32, "kv_heads": 8, "mlp_size": 8192,
        "rope_theta": 500000.0, "max_positions": 8192, "tied_head": True,
    },
    "llama-8b": {
        "family": "llama", "layers": 32, "hidden_size": 4096, "heads": 32, "kv_heads": 8, "mlp_size": 14336,
        "rope_theta": 500000.0, "max_positions": 8192,
    },
    # A ladder for studies; the names count the blocks' parameters, without embeddings. A test counts them.
    "ladder-0.1m": _ladder(2, 64, 2),
    "ladder-0.4m": _ladder(4, 96, 3),
    "ladder-0.8m": _ladder(4, 128, 4),
    "ladder-1.5m": _ladder(5, 160, 5),
    "ladder-4m": _ladder(5, 256, 8),
    "ladder-10m": _ladder(8, 320, 5),
    "ladder-25m": _ladder(8, 512, 8),
    "ladder-60m": _ladder(12, 640, 10),
    "ladder-150m": _ladder(12, 1024, 16),
    "ladder-400m": _ladder(14, 1536, 24),
}  # fmt: skip
