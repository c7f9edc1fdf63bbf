"""The states of a decoder's norm sites: what is real, what is frozen at which sigma, and what sigma has been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from harness.parallel import TensorParallel

from .config import ModelSection
from .sites import norm_sites
from .switchable import SwitchableNorm


@dataclass(frozen=True)
class SiteState:
    """real at alpha 0, frozen at alpha 1; sigma is None while alpha is 0."""

    alpha: float = 0.0
    sigma: float | None = None


class NormStates:
    """Of a decoder that was built with switchable norms: sets the states of its sites, and reads what was counted."""

    def __init__(self, model: nn.Module, section: ModelSection, tensor: TensorParallel, device: torch.device) -> None:
        self.sites = norm_sites(section)
        self.states = {site.name: SiteState() for site in self.sites}
        self._tensor = tensor
        self._gate = torch.zeros((), dtype=torch.float64, device=device)
        self._norms: dict[str, SwitchableNorm] = {}
        self._modules = {site.name: site.module for site in self.sites}
        for name in dict.fromkeys(self._modules.values()):
            norm = model.get_submodule(name)
            assert isinstance(norm, SwitchableNorm)
            norm.place(device, self._gate)
            self._norms[name] = norm

    def set(self, states: Mapping[str, SiteState]) -> None:
        """Let sites have these states, the others keep theirs. Raises ValueError for what is no site, and for a sigma
        that is missing or not positive."""
        for name, state in states.items():
            if name not in self.states:
                raise ValueError(f"{name!r} is no norm site of this model; they are {', '.join(self.states)}")
            if not 0.0 <= state.alpha <= 1.0:
                raise ValueError(f"{name}: alpha {state.alpha} is not between 0 and 1")
            if state.alpha > 0 and not (state.sigma is not None and 0 < state.sigma < float("inf")):
                raise ValueError(f"{name}: alpha {state.alpha} needs a positive sigma, not {state.sigma}")
            norm = self._norms[self._modules[name]]
            place = self._place(name)
            norm.alpha[place] = state.alpha
            norm.inverse[place] = 1.0 if state.sigma is None else 1.0 / state.sigma
            self.states[name] = state
        for module, norm in self._norms.items():
            norm.real = all(self.states[name].alpha == 0 for name, its in self._modules.items() if its == module)

    def gather(self, on: bool) -> None:
        """Whether passes in training mode count, until this is called again. To be on for forward passes alone: an
        activation that is computed again in the backward pass must not count twice."""
        self._gate.fill_(float(on))

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
        """What was counted since the last call, by site: float64 (2, 3), rows ordinary tokens and others (the first of
        a document, and ends of text), columns tokens, sum of sigma, sum of sigma squared.

        `add_up` sums a tensor over all ranks of the job, and is called once; the result has the same bits on all.
        """
        sums = torch.stack([norm.sums for norm in self._norms.values()])
        for norm in self._norms.values():
            norm.sums.zero_()
        # Tensor-parallel ranks all see the same tokens, unless these are split; of heads each has its own.
        copies = [self._copies(module) for module in self._norms]
        whole = add_up(sums) / torch.tensor(copies, dtype=torch.float64, device=sums.device)[:, None, None]
        by_module = dict(zip(self._norms, whole.cpu().numpy(), strict=True))
        return {name: by_module[module] for name, module in self._modules.items()}

    def forget(self) -> None:
        """Drop what was counted since the last `take`: those steps are taken back."""
        for norm in self._norms.values():
            norm.sums.zero_()

    def _copies(self, module: str) -> int:
        on_heads = module.endswith(("q_norm", "k_norm"))
        return 1 if on_heads or self._tensor.splits_tokens else self._tensor.size

    def _place(self, name: str) -> int:
        return 1 if name.endswith(".v") else 0


def ordinary_tokens(tokens: Tensor, document_ids: Tensor | None, end_of_text: int | None) -> Tensor:
    """bool (batch, sequence): which tokens are neither the first of their document in their row nor an end of text.

    Without document_ids, attention sees a row as one document, and its first token alone is first.
    """
    ordinary = torch.ones_like(tokens, dtype=torch.bool)
    ordinary[:, 0] = False
    if document_ids is not None:
        ordinary[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    if end_of_text is not None:
        ordinary &= tokens != end_of_text
    return ordinary
