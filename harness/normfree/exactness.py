"""What a model without norms must do exactly: equal its frozen self, and be affine from residual to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.model import Decoder, spliced

Logits = Callable[[Tensor], Tensor]
"""int64 tokens (batch, sequence) to logits (batch, sequence, vocab_size)."""
TIE = 2e-7
NONLINEAR = ("var", "std", "rsqrt", "sqrt", "norm", "reciprocal")
"""What the name of an operation of a norm has in it."""


@dataclass(frozen=True)
class Gap:
    """How far logits are from a reference's."""

    largest: float
    """The largest absolute difference of a logit."""
    relative: float
    """That, over the largest absolute logit of the reference."""
    same_top: int
    """Tokens whose likeliest next token is the same."""
    tokens: int

    @property
    def all_top_equal(self) -> bool:
        return self.same_top == self.tokens


@torch.no_grad()
def logit_gap(reference: Logits, other: Logits, batches: Sequence[Tensor]) -> Gap:
    """Both on the same batches. Where the reference's two likeliest tokens tie, to within fp32's resolution of its
    largest logit, either is the same."""
    largest = scale = 0.0
    same = tokens = 0
    for batch in batches:
        truth, logits = reference(batch).double(), other(batch).double()
        difference = float((truth - logits).abs().max())
        largest, scale = max(largest, difference), max(scale, float(truth.abs().max()))
        chosen = truth.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
        same += int((truth.max(-1).values - chosen <= TIE * scale).sum())
        tokens += batch.numel()
    return Gap(largest, largest / scale, same, tokens)


@torch.no_grad()
def superposition_error(model: Decoder, tokens: Tensor, generator: torch.Generator) -> float:
    """|f(ax + by) - af(x) - bf(y) - (1 - a - b)f(0)| / |f(ax + by) - f(0)|, largest over pairs of residual vectors x, y
    of the model's own, with a and b drawn from the normal distribution: 0 where the map f from the final residual
    stream to the logits is affine. f is computed in float64, or where ax + by is small rounding would look like a
    bend."""
    norm, head = deepcopy(model.final_norm).double(), deepcopy(model.head).double()

    def read_out(residual: Tensor) -> Tensor:
        return head.logits(_normed(norm, residual))

    x = final_residual(model, tokens).flatten(0, -2).double()
    y = x[torch.randperm(len(x), generator=generator).to(x.device)]
    a, b = torch.randn(2, len(x), 1, generator=generator, dtype=torch.float64).to(x)
    at_zero = read_out(torch.zeros_like(x[:1]))
    together = read_out(a * x + b * y) - at_zero
    apart = a * (read_out(x) - at_zero) + b * (read_out(y) - at_zero)
    return float(((together - apart).norm(dim=-1) / together.norm(dim=-1)).max())


@torch.no_grad()
def attribution_error(model: Decoder, tokens: Tensor, targets: Tensor) -> float:
    """Direct logit attribution beside the direct effect: sum |attribution - effect| / sum |effect| over what attention
    and MLP of every layer write, and over tokens, for the logit of the target (arXiv 2507.02559, section on direct
    logit attribution; the published 49 % of GPT-2 small, 0 % without norms).

    Attribution is a component's share of the target's logit with the final norm's scale held as it is; its effect is by
    how much that logit falls when the component is taken out of the final residual stream.
    """
    parts: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        parts.append(activation.detach())
        return activation

    places = [
        f"layers.{layer}.{what}" for layer in range(model.section.layers) for what in ("attention_out", "mlp_out")
    ]
    with spliced(model, dict.fromkeys(places, keep)):
        x = final_residual(model, tokens)
    weight = model.head.weight[targets]

    def logit(residual: Tensor) -> Tensor:
        return (_final(model, residual) * weight).sum(-1)

    whole, zero = logit(x), torch.zeros_like(x[:1, :1])
    off = (_final(model, zero) * weight).sum(-1)
    difference = effects = 0.0
    for part in parts:
        if model.section.norm_free:
            attribution = logit(part) - off
        else:
            attribution = (_held(model, part, x) * weight).sum(-1)
        effect = whole - logit(x - part)
        difference += float((attribution - effect).abs().sum())
        effects += float(effect.abs().sum())
    return difference / effects


def operations(model: Decoder, tokens: Tensor) -> list[str]:
    """The operations of the model's exported graph (torch.export), from tokens to logits, each once, sorted."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model.logits(tokens)

    with torch.no_grad():
        graph = torch.export.export(Logits(), (tokens,), strict=False).graph
    return sorted({str(node.target) for node in graph.nodes if node.op == "call_function"})


def norm_operations(names: Sequence[str]) -> list[str]:
    """Of these operations, those that a norm has."""
    return [name for name in names if any(part in name for part in NONLINEAR)]


def final_residual(model: Decoder, tokens: Tensor) -> Tensor:
    """The residual stream (batch, sequence, hidden) that enters the final norm."""
    seen: list[Tensor] = []
    with spliced(model, {"final_residual": lambda x: seen.append(x) or x}):  # type: ignore[func-returns-value]
        model.hidden_states(tokens)
    return seen[0]


def _final(model: Decoder, residual: Tensor) -> Tensor:
    """The final norm's output."""
    return _normed(model.final_norm, residual)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    out = norm(x)
    return out if isinstance(out, Tensor) else out.output


def _held(model: Decoder, part: Tensor, x: Tensor) -> Tensor:
    """What the final norm makes of a part of x, with the scale of x."""
    section, weight = model.section, model.final_norm.get_parameter("weight")
    centre = section.norm == "layernorm"
    whole = x - x.mean(-1, keepdim=True) if centre else x
    sigma = (whole.square().mean(-1, keepdim=True) + section.norm_epsilon).sqrt()
    return (part - part.mean(-1, keepdim=True) if centre else part) / sigma * weight
