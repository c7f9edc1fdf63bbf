"""What a micro-batch keeps in memory from its forward pass to its backward pass: an estimate by formula.

Korthikanti et al. (arXiv 2205.05198, section 4) count what autograd keeps of each operation of a block; here their
count is made for this decoder: grouped queries, rotary positions and SwiGLU; fused attention, which keeps a number a
query and head in place of the attention matrix; and a sequence parallelism that keeps the norms' gathered outputs whole
on every tensor-parallel rank, as the products after them read them. Tests compare it with what torch allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.kernels import block_bytes, chunk_length
from harness.model import LossSection, ModelSection

FP32_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """What of the settings and the layout activations depend on."""

    model: ModelSection
    loss: LossSection
    tensor: int
    """Tensor-parallel size."""
    sequence_parallel: bool
    precision: str
    recompute: str
    micro_batch: int
    sequence_length: int
    document_masking: bool
    on_host: bool
    """Computed on the CPU, where torch has other kernels."""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FP32_BYTES


Terms = dict[str, float]
"""Bytes a token, by what keeps them."""


def block_terms(work: Workload) -> Terms:
    """What a block keeps with `train.recompute: none`."""
    model, size = work.model, work.element_bytes
    queries, groups, inner, scores = _widths(work)
    rope, grouped = model.positions == "rope", model.key_value_heads < model.heads
    attention_inputs = queries * grouped if not (rope or model.qk_norm) else queries + groups
    terms = {
        "inputs of the norms": 2 * _norm_input(model.hidden_size, work) / _divisor(work),
        "outputs of the norms": 2 * model.hidden_size * size,
        "queries, keys and values": (queries + 2 * groups + attention_inputs) * size,
        "outputs of attention": queries * (2 if rope else 1) * size + _normalisers(work),
        "inside the MLP": inner * (4 if model.activation == "swiglu" else 2) * size,
    }
    if model.qk_norm:
        copied = queries * grouped * size  # else it is a view of what is kept anyway
        statistics = FP32_BYTES * (model.heads + model.key_value_heads) / work.tensor
        normalised = (queries + groups) * FP32_BYTES if work.on_host else 0
        terms["inputs of the query and key norms"] = copied + statistics + normalised
    if model.dropout > 0:
        mask_bytes = size if work.on_host else 1
        terms["dropout masks"] = 2 * model.hidden_size * mask_bytes / _divisor(work)
    if work.document_masking:
        terms["document mask"] = work.sequence_length * size
    if _keeps_scores(work):
        # Softmax, and with dropout its mask and what is left.
        terms["attention matrix, as no fused kernel fits"] = scores * FP32_BYTES * (3 if model.dropout > 0 else 1)
    return terms


def kept_terms(work: Workload) -> Terms:
    """What a block keeps with the `train.recompute` of the settings."""
    if work.recompute == "none":
        return block_terms(work)
    model, size = work.model, work.element_bytes
    terms: Terms = {"input of the block": model.hidden_size * size / _divisor(work)}
    if work.recompute == "full":
        return terms
    queries, groups, inner, scores = _widths(work)
    ups = 2 if model.activation == "swiglu" else 1
    terms |= {
        "outputs of the products": (queries + 2 * groups + 2 * model.hidden_size + ups * inner) * size,
        "outputs of attention": queries * size + _normalisers(work),
    }
    if _keeps_scores(work):
        terms["attention matrix, as no fused kernel fits"] = scores * FP32_BYTES
    return terms


def outside_terms(work: Workload) -> Terms:
    """What is kept beside the blocks: the final norm's input and output, and a dropped embedding's mask."""
    model, size = work.model, work.element_bytes
    terms = {"final norm": (_norm_input(model.hidden_size, work) + model.hidden_size * size) / _divisor(work)}
    if model.dropout > 0:
        terms["embedding's dropout mask"] = model.hidden_size * (size if work.on_host else 1)
    if work.document_masking:
        terms["document mask"] = work.sequence_length
    return terms


def loss_bytes(work: Workload, rows: int, columns: int) -> int:
    """What the loss holds while it forms its gradients: of a head with so many rows here, of which `columns` are no
    padding."""
    model, tokens = work.model, work.tokens
    assert model.vocab_size is not None
    if work.loss.implementation == "reference":  # float64 logits and their softmax, of the whole vocabulary
        return 2 * tokens * model.vocab_size * 8
    most = min(rows, model.vocab_size)
    gradients = (rows + tokens) * model.hidden_size * FP32_BYTES
    gathered = tokens * model.hidden_size * work.element_bytes if work.sequence_parallel else 0
    if _runs_triton(work):
        # Triton; where ranks share the tokens a chunk of them is gathered at a time, in the backward.
        return block_bytes(tokens, most, model.hidden_size, work.element_bytes) + gradients + gathered
    length = chunk_length(tokens, most, FP32_BYTES, work.on_host)
    powers = work.loss.tau != 1.0 and work.loss.label_smoothing > 0
    chunk = length * columns * FP32_BYTES * (1 + (model.logit_softcap is not None) + powers)
    matrix = 0 if work.element_bytes == FP32_BYTES else columns * model.hidden_size * FP32_BYTES
    return chunk + matrix + gradients + gathered


def _runs_triton(work: Workload) -> bool:
    asked = work.loss.implementation
    return not work.on_host and (asked == "triton" or (asked == "auto" and work.element_bytes < FP32_BYTES))


def recomputed_bytes(work: Workload) -> int:
    """What is made again, of one block at a time, in the backward pass."""
    if work.recompute == "none":
        return 0
    return max(round((sum(block_terms(work).values()) - sum(kept_terms(work).values())) * work.tokens), 0)


def _widths(work: Workload) -> tuple[float, float, float, float]:
    """On one tensor-parallel rank, a token: all queries, all keys, the MLP's inner width, all attention weights."""
    model, ranks = work.model, work.tensor
    queries = model.heads * model.head_width / ranks
    keys = model.key_value_heads * model.head_width / ranks
    return queries, keys, model.mlp_width / ranks, model.heads * work.sequence_length / ranks


def _divisor(work: Workload) -> int:
    """Over how many ranks the tokens between the products are divided."""
    return work.tensor if work.sequence_parallel else 1


def _norm_input(width: int, work: Workload) -> float:
    """Bytes a token that a norm over `width` keeps of its input, with its statistics."""
    if work.model.norm == "layernorm":
        return width * work.element_bytes + 2 * (work.element_bytes if work.on_host else FP32_BYTES)
    # On the CPU torch composes RMSNorm of smaller operations, which keep an fp32 input and an fp32 normalised one.
    return width * (2 * FP32_BYTES if work.on_host else work.element_bytes) + FP32_BYTES


def _normalisers(work: Workload) -> float:
    """Bytes a token that fused attention keeps in place of the attention matrix."""
    return 0 if _keeps_scores(work) else FP32_BYTES * work.model.heads / work.tensor


def _keeps_scores(work: Workload) -> bool:
    """Whether torch computes attention in the open: no fused kernel takes what is asked for.

    CPU: none has dropout. GPU: the memory-efficient kernel, the one for masks and fp32, has no grouped queries.
    """
    if work.on_host:
        return work.model.dropout > 0
    grouped = work.model.key_value_heads < work.model.heads
    return grouped and (work.document_masking or work.precision == "fp32")
