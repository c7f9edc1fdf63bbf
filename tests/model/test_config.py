"""Which sections are the same architecture: weights of the one do in the other what they did."""

from __future__ import annotations

from typing import Any

import pytest

from harness.model import ModelSection

GPT2: dict[str, Any] = {
    "family": "gpt2", "layers": 2, "hidden_size": 48, "heads": 3, "vocab_size": 211, "max_positions": 40,
}  # fmt: skip
LLAMA: dict[str, Any] = {"layers": 2, "hidden_size": 48, "heads": 3, "vocab_size": 211, "max_positions": 40}
SAID = {"kv_heads": 3, "head_size": 16, "qkv_bias": None, "init_std": 0.5, "vocab_multiple": 8, "dropout": 0.3}


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        (GPT2, {**SAID, "mlp_size": 192, "rope_theta": 3.0, "qkv_bias": True}),
        (LLAMA, {**SAID, "mlp_size": 128, "max_positions": 99, "qkv_bias": False}),
        (LLAMA, {"max_positions": None}),
    ],
)
def test_the_same_said_in_other_words(values: dict[str, Any], changes: dict[str, Any]) -> None:
    assert ModelSection(**values).architecture() == ModelSection(**{**values, **changes}).architecture()


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (GPT2, "max_positions", 41), (GPT2, "norm_epsilon", 1e-6), (GPT2, "tied_head", False), (GPT2, "bias", False),
        (LLAMA, "rope_theta", 5e5), (LLAMA, "kv_heads", 1), (LLAMA, "qk_norm", True), (LLAMA, "vocab_size", 212),
        (LLAMA, "logit_softcap", 30.0), (LLAMA, "qkv_bias", True), (LLAMA, "rope_scaling", {"factor": 8.0}),
        (LLAMA, "mlp_size", 112), (LLAMA, "norm", "layernorm"),
    ],
)  # fmt: skip
def test_another_model(values: dict[str, Any], key: str, value: Any) -> None:
    assert ModelSection(**values).architecture() != ModelSection(**{**values, key: value}).architecture()


def test_stretched_frequencies_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="rope_scaling is said, but positions are learned"):
        ModelSection(**GPT2, rope_scaling={"factor": 2.0})
    with pytest.raises(ValueError, match=r"high_freq_factor 1\.0 is not above low_freq_factor 1\.0"):
        ModelSection(**LLAMA, rope_scaling={"factor": 2.0, "high_freq_factor": 1.0})
