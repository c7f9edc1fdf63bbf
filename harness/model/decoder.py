"""The decoder: one class for both families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from harness.kernels import LossOutput
from harness.parallel import Placement, TensorParallel, place_parameters

from .attention import Attention, AttentionContext, KeyValueCache, ValueScale, rotation_tables
from .config import LossSection, ModelSection
from .dropout import Dropout
from .head import Head, Reduction
from .mlp import build_mlp
from .norm_choice import apply_norm, build_norm
from .norm_states import NormStates, ordinary_tokens
from .sites import Tap


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with a tap at every place that sites.py names."""

    def __init__(self, section: ModelSection, tensor: TensorParallel, place: str, switchable: bool) -> None:
        super().__init__()
        self.tensor = tensor
        self.residual_before = Tap()
        self.attention_norm = build_norm(section, tensor.on_tokens, sites=2 if switchable else None)
        self.attention = Attention(section, tensor, f"{place}.attention", switchable)
        self.attention_out = Tap()
        self.residual_between = Tap()
        self.mlp_norm = build_norm(section, tensor.on_tokens, sites=1 if switchable else None)
        self.mlp = build_mlp(section, tensor)
        self.mlp_out = Tap()
        self.residual_after = Tap()
        self.attention_dropout = Dropout(section.dropout, tensor, f"{place}.attention_out")
        self.mlp_dropout = Dropout(section.dropout, tensor, f"{place}.mlp_out")

    def forward(self, x: Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> Tensor:
        seed = context.dropout_seed
        x = self.residual_before(x)
        normed = apply_norm(self.attention_norm, x, context.ordinary)
        values = None
        if normed.ratio is not None:
            values = ValueScale(self.tensor.enter(normed.ratio, context.batch), normed.bias)
        attended = self.attention(self.tensor.enter(normed.output, context.batch), context, cache, values)
        x = self.residual_between(x + self.attention_out(self.attention_dropout(attended, seed)))
        normed = apply_norm(self.mlp_norm, x, context.ordinary)
        expanded = self.mlp(self.tensor.enter(normed.output, context.batch))
        return self.residual_after(x + self.mlp_out(self.mlp_dropout(expanded, seed)))


class Decoder(nn.Module):
    """GPT-2 (Radford et al. 2019) and Llama (Touvron et al., arXiv 2302.13971) as one pre-norm decoder.

    Parameters are created uninitialised, those of this rank's share; `build_decoder` is the way in. Activations that
    pass between blocks are (batch, sequence, hidden) on every rank, or under sequence parallelism this rank's tokens of
    that, (batch x sequence / ranks, hidden).
    """

    def __init__(
        self,
        section: ModelSection,
        loss: LossSection,
        recompute: str = "none",
        tensor: TensorParallel | None = None,
        *,
        switchable_norms: bool = False,
    ) -> None:
        super().__init__()
        self.section, self.recompute = section, recompute
        self.tensor = tensor = tensor or TensorParallel()
        section.check_divides(tensor.size)
        self.token_embedding = tensor.embedding(section.padded_vocab_size(tensor.size), section.hidden_size)
        if section.positions == "learned":
            assert section.max_positions is not None
            self.position_embedding = nn.Embedding(section.max_positions, section.hidden_size)
        self.dropout = Dropout(section.dropout, tensor, "embedding", on="all")
        self.layers = nn.ModuleList(
            Block(section, tensor, f"layers.{i}", switchable_norms) for i in range(section.layers)
        )
        self.final_residual = Tap()
        self.final_norm = build_norm(section, tensor.on_tokens, final=True, sites=1 if switchable_norms else None)
        self.head = Head(section, loss, tensor)
        self.tie_head()
        self.norm_states: NormStates | None = None
        """Of a decoder with switchable norms, once `build_decoder` has placed it."""
        self.end_of_text: int | None = None
        """The token that the statistics of switchable norms set apart, with the first of every document."""

    def tie_head(self) -> None:
        """Let a tied head use the token embedding's parameter."""
        if self.section.tied_head:
            self.head.weight = cast(nn.Parameter, self.token_embedding.weight)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that hold parameters, each block one of them, by name and in the order of the forward pass."""
        for name, child in self.named_children():
            if isinstance(child, nn.ModuleList):
                yield from ((f"{name}.{number}", block) for number, block in enumerate(child))
            elif any(True for _ in child.parameters()):
                yield name, child

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        plain: bool = False,
        reduction: Reduction = "sum",
        outputs: Sequence[str] = (),
    ) -> LossOutput:
        """Losses of int64 tokens and targets (batch, sequence); see `hidden_states` and `Head.forward`."""
        hidden = self.hidden_states(tokens, positions, document_ids)
        return self.head(hidden, targets, plain=plain, reduction=reduction, outputs=outputs)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """The final norm's output (batch, sequence, hidden), or this rank's tokens of it where tokens are split.

        positions (batch, sequence): None counts from 0 (from the cache's length). document_ids (batch, sequence): a
        token attends only to earlier tokens of its own document; None: to all earlier ones. caches: one a layer,
        extended by these tokens; not together with document_ids.
        """
        start, length = caches[0].length if caches else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(start, start + length, device=tokens.device)[None]
        x = self.token_embedding(tokens)
        rotation = None
        if self.section.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            rotation = rotation_tables(positions, self.section, x.dtype)
        mask = None if document_ids is None else document_mask(document_ids)
        if start > 0 and length > 1:  # several new tokens: each sees what is cached, and the new ones up to itself
            mask = tokens.new_ones((length, start + length), dtype=torch.bool).tril(start)[None, None]
        drops = self.training and self.section.dropout > 0.0
        seed = self.tensor.forward_seeds.draw() if drops else None
        context = AttentionContext(rotation, mask, len(tokens), seed)
        if self.norm_states is not None and self.training:
            context.ordinary_inside = ordinary_tokens(tokens, document_ids, self.end_of_text)
            context.ordinary = self.tensor.split_flags(context.ordinary_inside)
        x = self.tensor.split(self.dropout(x, seed))
        for number, block in enumerate(self.layers):
            if caches is not None:
                x = block(x, context, caches[number])
            elif self.recompute != "none" and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False, **self._recompute_options())
            else:
                x = block(x, context)
        return apply_norm(self.final_norm, self.final_residual(x), context.ordinary).output

    def placements(self) -> dict[str, Placement]:
        """Where this rank's part of every parameter lies. Padding rows of the embedding and the head belong to no
        part, and so to no checkpoint."""
        assert self.section.vocab_size is not None
        names = ("token_embedding.weight",) if self.section.tied_head else ("token_embedding.weight", "head.weight")
        return place_parameters(self, self.tensor, dict.fromkeys(names, self.section.vocab_size))

    def logits(self, tokens: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """fp32 logits (batch, sequence, vocab_size), float64 of a float64 model, for generation and proofs."""
        with self.tensor.whole_tokens():
            return self.head.logits(self.hidden_states(tokens, caches=caches))

    def _recompute_options(self) -> dict[str, Any]:
        if self.recompute == "full":
            return {}
        return {"context_fn": partial(create_selective_checkpoint_contexts, _save_products)}


def document_mask(document_ids: Tensor) -> Tensor:
    """True where a query may look at a key: earlier or equal, and of the same document; (batch, 1, sequence,
    sequence)."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def _save_products(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Selective recomputation keeps what is dear to compute (products, attention) and recomputes the rest."""
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE


_aten = torch.ops.aten
_DEAR = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
