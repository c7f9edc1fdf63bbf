"""A norm that can be taken away while a model trains, for norm removal.

A site of it is real, frozen, or on the way between them: y = s u + bias with u = (x - mean) * weight (RMSNorm: no mean,
no bias) and s = (1 - alpha) / sigma + alpha / frozen sigma, per token. Whether a state is one or the other is a number
on the device, so one compiled graph serves all states and nothing waits for the device. s is one number a token, so it
commutes with a projection: two sites of one norm share the projection's input, and the second one's output is scaled
(Normed.ratio).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import Share


class Normed(NamedTuple):
    """A norm's output for its first site, and what makes the second site's of it."""

    output: Tensor
    ratio: Tensor | None = None
    """s of the second site over s of the first, (..., 1); None: they are the same."""
    bias: Tensor | None = None
    """What is in `output` whatever s is (width,), None: nothing."""


class SwitchableNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with one or two sites; see the module's docstring.

    Parameters have the names of the plain norms. The states of the sites are set by NormStates, which also reads
    `sums`: while `gate` is 1, every training pass adds each token's sigma = sqrt(variance + epsilon) to them (mean
    square for RMSNorm), in the rows ordinary and others, as count, sum and sum of squares.
    """

    def __init__(self, kind: str, size: int, epsilon: float, share: Share, sites: int = 1) -> None:
        super().__init__()
        self.share, self.epsilon, self.sites = share, epsilon, sites
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if kind == "layernorm" else None
        self.real = True
        """Whether all sites are: known without a look at the device."""
        self.place(torch.device("cpu"), torch.ones((), dtype=torch.float64))

    def place(self, device: torch.device, gate: Tensor) -> None:
        """Where the states lie; `gate`, float64 (), is shared by all norms of a model. No buffers: an engine casts
        those with the weights."""
        self.alpha = torch.zeros(self.sites, device=device)
        self.inverse = torch.ones(self.sites, device=device)
        """1 / frozen sigma."""
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self.gate = gate

    def forward(self, x: Tensor, ordinary: Tensor | None = None) -> Normed:
        """x (..., size); ordinary bool (...), or one for all heads of a token: which tokens are neither the first of
        their document nor an end of text. Without it nothing is added to the sums."""
        if torch.compiler.is_compiling() or not self.real:
            return self._switched(x, ordinary)
        return self._plain(x, ordinary)

    def _plain(self, x: Tensor, ordinary: Tensor | None) -> Normed:
        """torch's own kernels, for a model that nothing compiles: they cost a fraction of the operations below."""
        weight = self.share(self.weight)
        bias = None if self.bias is None else self.share(self.bias)
        counts = self.training and ordinary is not None
        if bias is None:
            y = F.rms_norm(x, x.shape[-1:], weight, self.epsilon)
            if counts:
                with torch.no_grad():
                    norm = torch.linalg.vector_norm(x, dim=-1, dtype=_enough(x.dtype))
                    self._count((norm.square() / x.shape[-1] + self.epsilon).sqrt(), ordinary)
        else:
            y, _mean, rate = torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)
            if counts:
                with torch.no_grad():
                    if rate.dtype in (torch.bfloat16, torch.float16):  # on a CPU, of 16-bit inputs
                        variance = x.to(torch.float32).var(-1, correction=0, keepdim=True)
                        rate = (variance + self.epsilon).rsqrt()
                    self._count(rate.squeeze(-1).reciprocal(), ordinary)
        return Normed(y)

    def _switched(self, x: Tensor, ordinary: Tensor | None) -> Normed:
        wide = x.to(_enough(x.dtype))
        weight = self.share(self.weight).to(wide.dtype)
        bias = None if self.bias is None else self.share(self.bias)
        if bias is not None:
            wide = wide - wide.mean(-1, keepdim=True)
        rate = (wide.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        if self.training and ordinary is not None:
            with torch.no_grad():
                self._count(rate.squeeze(-1).reciprocal(), ordinary)
        alpha, inverse = self.alpha.to(wide.dtype), self.inverse.to(wide.dtype)
        scales = [(1.0 - alpha[site]) * rate + alpha[site] * inverse[site] for site in range(self.sites)]
        y = wide * scales[0] * weight
        if bias is not None:
            y = y + bias.to(wide.dtype)
        ratio = scales[1] / scales[0] if self.sites == 2 else None
        # A copy: what reads it runs when an engine may have taken the parameter away again (ZeRO stage 3).
        return Normed(y.to(x.dtype), ratio, None if ratio is None or self.bias is None else self.bias.clone())

    def _count(self, sigma: Tensor, ordinary: Tensor | None) -> None:
        """Add float sigma (...), one a token or one a head of it."""
        assert ordinary is not None
        flat = sigma.to(torch.float64)
        if ordinary.dim() < flat.dim():
            ordinary = ordinary.unsqueeze(-1).expand_as(flat)
        mask = ordinary.to(torch.float64).flatten()
        flat = flat.flatten()
        terms = torch.stack((torch.ones_like(flat), flat, flat.square()), dim=1)
        self.sums.add_(self.gate * (torch.stack((mask, 1.0 - mask)) @ terms))


def _enough(dtype: torch.dtype) -> torch.dtype:
    """What a norm computes in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
