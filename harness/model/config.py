"""The configuration of the decoder and of its loss."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from harness.config import ConfigError, Section

from .shapes import FAMILIES, SHAPES

if TYPE_CHECKING:
    import torch


class RopeScalingSection(Section):
    """Rotary frequencies stretched for longer contexts than a model was first trained on, as Llama 3.1 does it
    (Grattafiori et al., arXiv 2407.21783; its released code has the formula)."""

    factor: float = Field(..., ge=1)
    """How much slower the slowest pairs turn."""

    low_freq_factor: float = Field(1.0, gt=0)
    """Pairs that turn less often than this over original_max_positions are slowed by the whole factor."""

    high_freq_factor: float = Field(4.0, gt=0)
    """Pairs that turn more often than this are left as they are; those between, in part."""

    original_max_positions: int = Field(8192, ge=1, le=1 << 31)
    """Longest sequence of the training before."""

    @model_validator(mode="after")
    def _check(self) -> RopeScalingSection:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelSection(Section):
    """The decoder. `shape` or `family` fill in what is not said; what is said wins; the resolved file says all."""

    shape: str | None = None
    """A named shape, which fills in what is not said: gpt2-124m, gpt2-355m, gpt2-774m, gpt2-1.5b, llama-1b, llama-8b,
    ladder-0.1m to ladder-400m. null in a resolved file, whose values stand below."""

    family: Literal["gpt2", "llama"] = "llama"
    """Which published architecture the unsaid fields follow. gpt2: learned positions, LayerNorm, GELU, biases, tied
    head. llama: rope, RMSNorm, SwiGLU, no biases, untied head."""

    layers: int = Field(..., ge=1, le=10_000)
    """Number of blocks."""

    hidden_size: int = Field(..., ge=1, le=1 << 20)
    """Width of the residual stream."""

    heads: int = Field(..., ge=1, le=1 << 16)
    """Number of query heads."""

    kv_heads: int | None = Field(None, ge=1, le=1 << 16)
    """Number of key and value heads, a divisor of heads (grouped-query attention). null: as many as heads."""

    head_size: int | None = Field(None, ge=1, le=1 << 16)
    """Width of one head. null: hidden_size / heads."""

    mlp_size: int | None = Field(None, ge=1, le=1 << 22)
    """Inner width of the MLP. null: 4 x hidden_size for gelu; for swiglu 8/3 x hidden_size, rounded up to a multiple
    of 16."""

    max_positions: int | None = Field(None, ge=1, le=1 << 31)
    """Longest sequence that the model is built for: the rows of learned positions. null: data.sequence_length for
    learned positions, no limit for rope."""

    positions: Literal["learned", "rope"]
    """Learned absolute positions, or rotary embeddings (Su et al., arXiv 2104.09864)."""

    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies; without effect on learned positions."""

    rope_scaling: RopeScalingSection | None = None
    """Frequencies as Llama 3.1 and 3.2 have them, for long contexts. null: none."""

    norm: Literal["layernorm", "rmsnorm"]
    """LayerNorm (gain and bias) or RMSNorm (gain)."""

    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the variance (LayerNorm) or the mean square (RMSNorm)."""

    norm_free: bool = False
    """No norm anywhere, as norm removal leaves a model: what the norms of the blocks did is folded into the weights,
    and the final one is an affine map, (x - mean) * weight + bias (layernorm) or x * weight (rmsnorm)."""

    activation: Literal["gelu", "swiglu"]
    """GELU in its tanh form between two matrices, or SwiGLU with three (Shazeer, arXiv 2002.05202)."""

    bias: bool
    """Whether the linear layers of the blocks have biases."""

    qkv_bias: bool | None = None
    """Whether the projection to queries, keys and values has one (Qwen 2 has it there alone). null: as bias."""

    tied_head: bool
    """Whether the head's weight is the token embedding."""

    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation (as in Qwen 3)."""

    logit_softcap: float | None = Field(None, gt=0)
    """c in logits = c tanh(logits / c) (as in Gemma 2). null: none."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping elements of embeddings, attention weights and residual additions, in training."""

    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal initialisation of matrices and embeddings (GPT-2's and Llama's value)."""

    position_init_std: float = Field(0.01, gt=0)
    """The same for learned positions (the value in GPT-2's released code)."""

    scale_residual_init: bool = True
    """Divide init_std by sqrt(2 layers) in the matrices that write to the residual stream (GPT-2 paper, section
    2.3)."""

    vocab_size: int | None = Field(None, ge=1, le=1 << 31)
    """Number of tokens. null: the tokenizer's."""

    vocab_multiple: int = Field(128, ge=1)
    """Embedding rows are padded to a multiple of this, for speed; padded rows take no probability and stay out of
    checkpoints."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Family below shape below what is said."""
        if not isinstance(values, dict):
            return values
        shape = values.get("shape")
        if shape is not None and (not isinstance(shape, str) or shape not in SHAPES):
            close = difflib.get_close_matches(str(shape), SHAPES, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"shape: there is no shape {shape!r}{hint} (known: {', '.join(SHAPES)})")
        named = SHAPES[shape] if shape is not None else {}
        size = ("layers", "hidden_size", "heads")
        if named and all(values.get(key) is not None for key in size) and any(values[k] != named[k] for k in size):
            said, meant = (", ".join(f"{key} {source[key]}" for key in size) for source in (values, named))
            raise ValueError(
                f"shape: {shape} has {meant}, but {said} is said as well (a resolved file says every field); remove "
                f"the fields that the shape is to decide, or the shape"
            )
        filled = {**named, **values, "shape": None}
        family = filled.get("family", cls.model_fields["family"].default)
        known = family if isinstance(family, str) and family in FAMILIES else "llama"  # the field refuses others
        return {**FAMILIES[known], **filled}

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.head_size is None and self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; change one or set head_size"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.positions == "learned" and self.rope_scaling is not None:
            raise ValueError("rope_scaling is said, but positions are learned; remove it")
        if self.norm_free and self.qk_norm:
            raise ValueError("norm_free says that there are no norms, qk_norm that heads have some; set one to false")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"rope turns pairs, and heads of width {self.head_width} are odd; change heads or set head_size"
            )
        return self

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def head_width(self) -> int:
        return self.head_size if self.head_size is not None else self.hidden_size // self.heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def mlp_width(self) -> int:
        if self.mlp_size is not None:
            return self.mlp_size
        if self.activation == "gelu":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 48) * 16

    def architecture(self) -> dict[str, Any]:
        """What the trained weights and what they compute depend on, every default filled in: equal for two sections
        exactly where the weights of one do the same in the other."""
        values = self.model_dump(mode="json", exclude=_NO_ARCHITECTURE)
        values |= {"kv_heads": self.key_value_heads, "head_size": self.head_width, "mlp_size": self.mlp_width}
        values["qkv_bias"] = self.has_qkv_bias
        if self.positions == "rope":
            del values["max_positions"]  # a limit, and no weights
        else:
            del values["rope_theta"]
        if self.norm_free:
            del values["norm_epsilon"]
        return values

    def padded_vocab_size(self, tensor_size: int = 1) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple, then to a multiple of the tensor-parallel
        size."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is built"
        rows = -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
        return -(-rows // tensor_size) * tensor_size

    def check_divides(self, tensor_size: int) -> None:
        """Raises ConfigError where a tensor-parallel size does not divide the heads or the MLP."""
        sizes = {"heads": self.heads, "kv_heads": self.key_value_heads, "mlp_size": self.mlp_width}
        for key, size in sizes.items():
            if size % tensor_size:
                raise ConfigError(
                    f"parallel.tensor: {tensor_size} does not divide model.{key} {size}; choose a divisor of both "
                    f"kv_heads {self.key_value_heads} and mlp_size {self.mlp_width}, or change the model"
                )


_NO_ARCHITECTURE = {
    "shape", "family", "dropout", "init_std", "position_init_std", "scale_residual_init", "vocab_multiple",
}  # fmt: skip


class LossSection(Section):
    """The training loss; validation always reports plain cross-entropy."""

    z_loss: float = Field(0.0, ge=0)
    """Weight of lse(logits)**2, which keeps logits from drifting (PaLM: 1e-4)."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over the vocabulary."""

    tau: float = Field(1.0, ge=0)
    """Which comp-sum loss (arXiv 2304.07288): (1 - p**(tau - 1)) / (tau - 1) of the target's probability p. 1:
    cross-entropy; 1 to 2: generalised cross-entropy, which bears with wrong targets; 2: mean absolute error; 0:
    sum-exponential."""

    implementation: Literal["auto", "blocked", "triton", "reference"] = "auto"
    """Which implementation of the fused linear cross-entropy runs. `auto`: the Triton kernels for 16-bit weights on a
    GPU, else blocked, in plain torch. `reference` is float64 and slow, for checks."""

    def check_device(self, device: torch.device) -> None:
        """Raises ConfigError where the Triton kernels are asked for by name and cannot run on this device."""
        if self.implementation != "triton":
            return
        from harness.kernels import machine_problem

        reason = machine_problem(device)
        if reason is not None:
            raise ConfigError(f"loss.implementation: triton cannot run: {reason}; auto takes what can")
