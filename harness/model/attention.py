"""Causal self-attention with grouped queries, rotary positions and a cache for generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.parallel import TensorParallel

from .config import ModelSection
from .dropout import Dropout
from .norm_choice import apply_norm, build_head_norm
from .sites import Tap


class KeyValueCache:
    """The keys and values of the tokens so far, of one layer: (batch, kv heads, capacity, head width)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys = self._values = torch.empty(0)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv heads, new, head width) and return all so far."""
        if self.length == 0:
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), keys.new_empty(shape)
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


@dataclass
class AttentionContext:
    """What all layers of one forward pass share."""

    rotation: tuple[Tensor, Tensor] | None
    """cos and sin, each (1 or batch, 1, sequence, head width / 2), or None without rotary positions."""
    mask: Tensor | None
    """True where a query may look at a key, (batch, 1, sequence, sequence); None: plain causal."""
    batch: int
    """Sequences; under sequence parallelism an activation's shape doesn't say."""
    dropout_seed: int | None = None
    """What the dropouts of this pass derive their seeds from; None: nothing is dropped."""
    ordinary: Tensor | None = None
    """For the statistics of switchable norms: `ordinary_tokens` of what is passed between blocks; None: none are
    taken."""
    ordinary_inside: Tensor | None = None
    """The same between `enter` and a row-parallel layer, (batch, sequence)."""


class ValueScale(NamedTuple):
    """What the values' site of a switchable norm has of its own; see Normed."""

    ratio: Tensor
    """(batch, sequence, 1): the input is this times what queries and keys get, but for `bias`."""
    bias: Tensor | None
    """(hidden,)."""


class Attention(nn.Module):
    """Softmax attention (Vaswani et al. 2017) with grouped queries (Ainslie et al., arXiv 2305.13245).

    The rows of `qkv` are grouped by key-value head: its query heads, its key head, its value head. So a contiguous
    slice of rows is a whole number of groups, and a tensor-parallel shard.
    """

    def __init__(self, section: ModelSection, tensor: TensorParallel, place: str, switchable: bool = False) -> None:
        super().__init__()
        self.tensor = tensor
        self.width, self.hidden = section.head_width, section.hidden_size
        self.queries_per_group = section.heads // section.key_value_heads
        self.groups = section.key_value_heads // tensor.size  # on this rank
        rows = section.key_value_heads * (self.queries_per_group + 2) * self.width
        self.qkv = tensor.column_linear(section.hidden_size, rows, bias=section.has_qkv_bias)
        self.output = tensor.row_linear(section.heads * self.width, section.hidden_size, bias=section.bias)
        self.q_norm = build_head_norm(section, tensor.on_heads, switchable=switchable)
        self.k_norm = build_head_norm(section, tensor.on_heads, switchable=switchable)
        self.dropout = Dropout(section.dropout, tensor, f"{place}.weights", on="heads")
        self.q, self.k, self.v = Tap(), Tap(), Tap()

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        cache: KeyValueCache | None = None,
        values: ValueScale | None = None,
    ) -> Tensor:
        """(batch, sequence, hidden) to the same shape, or to this rank's tokens of it where tokens are split."""
        batch, sequence, _ = x.shape
        split = [self.queries_per_group, 1, 1]
        q, k, v = self.qkv(x).view(batch, sequence, self.groups, sum(split), self.width).split(split, dim=3)
        q = self.q(q.reshape(batch, sequence, -1, self.width))
        k, v = k.squeeze(3), v.squeeze(3)
        if values is not None:
            v = self._scaled(v, values)
        k, v = self.k(k), self.v(v)
        if self.q_norm is not None and self.k_norm is not None:
            q = apply_norm(self.q_norm, q, context.ordinary_inside).output
            k = apply_norm(self.k_norm, k, context.ordinary_inside).output
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.mask,
            dropout_p=self.dropout.prepare(context.dropout_seed, q.device),
            # With a mask the mask is the whole truth; one query against a cache may look at all of it.
            is_causal=context.mask is None and sequence > 1,
            enable_gqa=self.queries_per_group > 1,
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, sequence, -1))

    def _scaled(self, v: Tensor, values: ValueScale) -> Tensor:
        """v (batch, sequence, kv heads, width) as it is with the values' own norm: all of it scaled but what comes from
        the norm's bias and the projection's. Those are the projection of the bias alone: asked of the layer itself, so
        that an engine that divides its weight gathers it there."""
        ratio = values.ratio.unsqueeze(-1)
        bias = values.bias
        if bias is None and self.qkv.bias is None:
            return (v * ratio).to(v.dtype)
        row = v.new_zeros(self.hidden) if bias is None else self.tensor.on_heads(bias)
        projected: Tensor = self.qkv(row[None, None])
        constant = projected.view(self.groups, -1, self.width)[:, -1]
        return (constant + (v - constant) * ratio).to(v.dtype)


def rotation_tables(positions: Tensor, section: ModelSection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, (rows, 1, sequence, width / 2), for positions (rows, sequence).

    Angles are computed in fp32 whatever the dtype of the tables.
    """
    angles = positions[:, None, :, None].float() * rotary_frequencies(section, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(section: ModelSection, device: torch.device) -> Tensor:
    """theta^(-2i/width) in radians a position, fp32 (width / 2,); stretched where the section says so."""
    width, scaling = section.head_width, section.rope_scaling
    frequencies = section.rope_theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + width/2}) of x (batch, heads, sequence, width) by their angles (arXiv 2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
