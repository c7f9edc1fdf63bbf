"""Loss terms on sigma of the residual stream: the auxiliary loss of norm removal, and the injection of an outlier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harness.model import Decoder, tap_sites

from .config import NormRemovalSection


class SigmaLoss:
    """Sums over the tokens of a micro-batch of what `auxiliary` and `injection` describe, gathered at taps during the
    forward pass."""

    def __init__(self, model: Decoder, section: NormRemovalSection, *, injects: bool) -> None:
        self._section, self._model = section, model
        layers = range(section.injection.from_layer, model.section.layers) if injects else ()
        self._taps = tap_sites(model)
        self._injected = [f"layers.{layer}.residual_between" for layer in layers]
        self._penalties: list[Tensor] = []
        self._others: list[tuple[Tensor, Tensor]] = []
        self._injects = injects

    def begin(self, ordinary: Tensor, target: float | None) -> None:
        """Before a forward pass. ordinary: bool, of the tokens that blocks pass on; target: the mean sigma of ordinary
        tokens at the final norm, None where none is known yet."""
        self._penalties, self._others = [], []
        auxiliary = self._section.auxiliary
        scale = 1.0
        if auxiliary.relative and target is not None:
            scale = 1.0 / target

        def at_final(x: Tensor) -> Tensor:
            sigma = self._sigma(x)
            if auxiliary.weight > 0 and target is not None:
                self._penalties.append(((sigma - target) * scale).square().sum())
            if self._injects:
                self._others.append(self._distances(sigma, ordinary))
            return x

        def inside(x: Tensor) -> Tensor:
            self._others.append(self._distances(self._sigma(x), ordinary))
            return x

        places: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(self._injected, inside)
        for name, replacement in (places | {"final_residual": at_final}).items():
            self._taps[name].replacement = replacement

    def end(self, positions: int, rows: int) -> Tensor | None:
        """After it: the terms as a share of the step's mean, of `positions` tokens in `rows` rows over all ranks; a
        step's micro-batches add up. None: there are none."""
        for name in [*self._injected, "final_residual"]:
            self._taps[name].replacement = None
        terms = [self._section.auxiliary.weight / positions * penalty for penalty in self._penalties]
        weight = self._section.injection.weight / max(len(self._others), 1)
        terms += [weight * (others / rows + ordinary / positions) for others, ordinary in self._others]
        self._penalties, self._others = [], []
        return torch.stack(terms).sum() if terms else None

    def _sigma(self, x: Tensor) -> Tensor:
        """fp32 or better (...): sqrt(variance + epsilon), or of the mean square for RMSNorm."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self._model.section.norm == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.square().mean(-1) + self._model.section.norm_epsilon).sqrt()

    def _distances(self, sigma: Tensor, ordinary: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the injection's squares: over first tokens and ends of text, and over ordinary ones."""
        injection = self._section.injection
        others = (sigma / injection.sigma - 1.0).square().masked_fill(ordinary, 0.0)
        excess = (sigma / injection.ordinary_sigma - 1.0).clamp(min=0.0).square().masked_fill(~ordinary, 0.0)
        return others.sum(), excess.sum()


def auxiliary_value(sums: np.ndarray, target: float, *, relative: bool) -> float:
    """mean[(sigma - target)^2] of the tokens that float64 sums (2, 3) are of (see NormStates.take), without the weight;
    relative: over target^2."""
    count, total, squares = sums.sum(0)
    value = float(squares / count - 2 * target * total / count + target**2)
    return value / target**2 if relative else value
