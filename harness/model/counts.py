"""Parameters and floating-point operations of a decoder, from its section alone."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelSection


@dataclass(frozen=True)
class ParameterCounts:
    """Every convention of counting, since scaling exponents depend on it. Padded vocabulary rows count nowhere."""

    total: int
    """All parameters; a tied head's weight once."""
    embedding: int
    """Token and position embeddings, and an untied head."""
    blocks: int
    """Everything else: blocks and norms, the non-embedding count of Kaplan et al."""
    head: int
    """The head's weight, tied or not."""
    products: int
    """Weights of the matrix products: the blocks' matrices and the head, without gains, biases and look-ups."""


def count_parameters(section: ModelSection) -> ParameterCounts:
    """The parameter counts of a section whose vocab_size and max_positions are resolved."""
    assert section.vocab_size is not None
    hidden, inner = section.hidden_size, section.mlp_width
    queries = section.heads * section.head_width
    qkv = queries + 2 * section.key_value_heads * section.head_width
    ups = 2 if section.activation == "swiglu" else 1
    matrices = hidden * qkv + queries * hidden + (ups + 1) * hidden * inner
    biases = (hidden + ups * inner + hidden if section.bias else 0) + (qkv if section.has_qkv_bias else 0)
    norm = hidden * (2 if section.norm == "layernorm" else 1)
    block = matrices + biases + (2 * section.head_width if section.qk_norm else 0)
    block += 0 if section.norm_free else 2 * norm
    head = section.vocab_size * hidden
    positions = (section.max_positions or 0) * hidden if section.positions == "learned" else 0
    blocks = section.layers * block + norm
    embedding = head * (1 if section.tied_head else 2) + positions
    return ParameterCounts(
        total=blocks + embedding,
        embedding=embedding,
        blocks=blocks,
        head=head,
        products=section.layers * matrices + head,
    )


def flops_per_token(section: ModelSection, sequence_length: int) -> int:
    """Training FLOPs a token, forward and backward: 6 x (weights of matrix products) + 12 x layers x heads x head width
    x sequence length (Chowdhery et al., arXiv 2204.02311, appendix B).

    Attention counts the full square, as is the custom, although half of it is masked. Recomputation is not model work
    and does not count.
    """
    attention = 12 * section.layers * section.heads * section.head_width * sequence_length
    return 6 * count_parameters(section).products + attention
