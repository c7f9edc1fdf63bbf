"""Small models of every kind, for tests."""

from __future__ import annotations

from harness.model import ModelSection, RopeScalingSection

SECTIONS: dict[str, ModelSection] = {
    "gpt2": ModelSection(family="gpt2", layers=2, hidden_size=48, heads=3, vocab_size=211, max_positions=40),
    "gpt2-untied": ModelSection(
        family="gpt2", layers=1, hidden_size=32, heads=4, vocab_size=130, max_positions=40, tied_head=False
    ),
    "llama": ModelSection(layers=2, hidden_size=48, heads=3, vocab_size=211, max_positions=40, mlp_size=100),
    "llama-gqa-tied": ModelSection(
        layers=2, hidden_size=64, heads=4, kv_heads=2, vocab_size=128, max_positions=40, tied_head=True, rope_theta=5e5
    ),
    "llama-mqa-wide-heads": ModelSection(
        layers=1, hidden_size=48, heads=3, kv_heads=1, head_size=24, vocab_size=97, max_positions=40
    ),
    "llama-qk-norm": ModelSection(
        layers=2, hidden_size=64, heads=4, kv_heads=2, vocab_size=211, max_positions=40, qk_norm=True
    ),
    "llama-qkv-bias": ModelSection(
        layers=2, hidden_size=64, heads=4, kv_heads=2, vocab_size=211, max_positions=40, qkv_bias=True
    ),
    "llama-rope-scaling": ModelSection(
        layers=2,
        hidden_size=64,
        heads=4,
        kv_heads=2,
        vocab_size=97,
        max_positions=80,
        rope_scaling=RopeScalingSection(factor=8.0, original_max_positions=32),  # pairs of all three kinds
    ),
}
