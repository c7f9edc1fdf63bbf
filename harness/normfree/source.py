"""A removal run's model, its norms folded into the weights as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config import HarnessError
from harness.convert import ModelSource, RunSource, decoder_shapes
from harness.data import Tokenizer
from harness.model import Decoder, build_decoder
from harness.parallel import Fragment

from .folding import Folding

_ELEMENTS = 4 << 20
"""Of rows that are in memory at once: 32 MiB in float64."""


class FoldedSource(ModelSource):
    """The norm-free model of a source whose norms are all frozen, for `convert` and whatever reads a model.

    Weights are folded in float64, a few rows at a time, and rounded once. Raises HarnessError, naming the sites, where
    one is not frozen.
    """

    def __init__(self, frozen: ModelSource) -> None:
        self.frozen, self.path, self.format = frozen, frozen.path, frozen.format
        self.sequence_length = frozen.sequence_length
        self._shapes = decoder_shapes(frozen.section)
        try:
            self._folding = Folding(frozen.section, frozen.norm_states, self._fetch)
        except HarnessError as error:
            raise HarnessError(f"{frozen.path}: {error}") from None
        self.section = self._folding.section

    def read(self, fragments: Sequence[Fragment]) -> None:
        changed = [fragment for fragment in fragments if self._folding.changes(fragment.name)]
        kept = [fragment for fragment in fragments if not self._folding.changes(fragment.name)]
        self.frozen.read([fragment for fragment in kept if fragment.tensor.dtype == torch.float32])
        for fragment in kept:
            if fragment.tensor.dtype != torch.float32:
                narrow = replace(fragment, tensor=torch.empty_like(fragment.tensor, dtype=torch.float32))
                self.frozen.read([narrow])
                fragment.tensor.copy_(narrow.tensor)
        for fragment in changed:
            self._fill(fragment)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.frozen.tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        return self.frozen.tokenizer_folder

    @property
    def details(self) -> dict[str, Any]:
        sigma = {name: state.sigma for name, state in self.frozen.norm_states.items()}
        return {**self.frozen.details, "folded_norms": sigma}

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        return self.frozen.verify(share)

    def _fill(self, fragment: Fragment) -> None:
        target = fragment.tensor.detach()
        if target.numel() == 0:
            return
        start, *columns = fragment.offsets
        step = max(_ELEMENTS // max(1, *fragment.global_shape[1:], 1), 1)
        for row in range(0, target.shape[0], step):
            part = target[row : row + step]
            folded = self._folding.rows(fragment.name, start + row, start + row + part.shape[0])
            if columns:
                folded = folded[:, columns[0] : columns[0] + part.shape[1]]
            part.copy_(folded)

    def _fetch(self, name: str, start: int, stop: int) -> Tensor:
        shape = self._shapes[name]
        rows = torch.empty(stop - start, *shape[1:])
        self.frozen.read([Fragment(name, "master", shape, (start, *(0 for _ in shape[1:])), rows)])
        return rows


def open_folded(path: Path, step: int | None = None) -> FoldedSource:
    """The folded model of a removal run: of its newest checkpoint, of `step`, or of the checkpoint that `path` is.

    Raises HarnessError where there is no such run or checkpoint, or one of its norm sites is not frozen.
    """
    return FoldedSource(RunSource(path, step))


def read_exactly(source: FoldedSource, device: torch.device | str = "cpu") -> Decoder:
    """The folded model in float64, not rounded to what is saved: for proofs."""
    model = build_decoder(source.section, seed=0, device=device).double()
    placements = model.placements()
    source.read(
        [
            Fragment.whole(name, "master", weight.detach()[: placements[name].shape[0]])
            for name, weight in model.named_parameters()
        ]
    )
    return model
