"""Activations replaced by functions of themselves, and what that costs in cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness.callbacks import evaluating
from harness.config import HarnessError
from harness.data import IGNORED, Batch
from harness.model import Decoder, spliced

from .splice_arms import REFERENCES, Arm, Arms, Reference, read_arms, reference_arms, site_means
from .splice_result import DIFFERING, LOSS, NOT_FINITE, ArmResult, SpliceResult, arm_result, arm_sums, token_sums

Batches = Iterable[Batch | tuple[str, Batch]]


@torch.no_grad()
def splice(
    model: Decoder,
    arms: Arms,
    batches: Batches,
    *,
    references: Sequence[Reference] = REFERENCES,
    skip_first: int = 0,
    skip_last: int = 0,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> SpliceResult:
    """Run each batch through the model as it is, through every arm and through the reference arms, and compare token by
    token. Plain cross-entropy, without dropout, in the model's own dtype; sums in fp64. Works in the decoder's own
    memory: no logits are made.

    arms: {name: {site: function}}, or one {site: function}, called "arm"; sites are those of `harness.model.tap_sites`,
    all of an arm replaced in the same pass. A function takes and returns this rank's part of the activation, same
    shape, dtype and device, and should treat each token by itself:
        q, k, v             (batch, sequence, this rank's heads of that kind, head width)
        every other site    (batch, sequence, hidden), the same on all tensor-parallel ranks; under sequence parallelism
                            (batch x sequence / ranks, hidden), this rank's tokens
    batches: `EvaluationWindows`, or batches (a row is a window) in a list; on every data-parallel rank its own, and
    equally many. Read twice where "mean" is among the references, so no generator then.
    references: "identity" must give the model's very losses; "zero" and "mean" ablate each arm's sites together, "mean"
    by the mean over the scored tokens of all batches, taken in a first pass over the model as it is.
    skip_first, skip_last: columns of a window that are not scored, and not averaged for the mean; Engels, Riggs and
    Tegmark (arXiv 2410.14670) leave out the first 200 and the last. They are spliced all the same.
    add_up: sums a tensor over the ranks that divide the batches (`ParallelLayout.sum_over_data`); needed where there
    are several, as the results, the same on all ranks, are then of all batches.

    Compiled blocks run uncompiled here, so that all arms are computed alike. Raises HarnessError, in one line, for
    arms, sites or functions that do not fit, for losses that are not finite, where nothing is left to score, and where
    the identity arm differs from the model.
    """
    own = read_arms(arms, model)
    scored = _Scored(batches, skip_first, skip_last, next(model.parameters()).device)
    # One graph for every combination of sites would be compiled anew, and might round differently.
    with torch.compiler.set_stance("force_eager"), evaluating(model):
        means = {}
        if "mean" in references:
            if iter(batches) is batches:
                raise HarnessError(
                    "splice: batches can be read only once, and the mean ablation needs two; give a list"
                )
            means = site_means(model, dict.fromkeys(site for arm in own for site in arm.sites), scored, add_up)
        everything = [*own, *reference_arms(own, references, means)]
        sums, tokens = _measure(model, everything, scored, add_up)
    if tokens[0] == 0:
        raise HarnessError(
            f"splice: no token is left to score in windows of {scored.columns} without the first {skip_first} and the "
            f"last {skip_last}"
        )
    for arm, row in zip([None, *everything], sums, strict=True):
        if row[NOT_FINITE]:
            who = f"arm {arm.name!r} ({', '.join(arm.sites)})" if arm else "the model as it is"
            raise HarnessError(
                f"splice: {who}: the loss of {int(row[NOT_FINITE])} of {int(tokens[0])} tokens is not finite"
            )
        if arm and arm.kind == "identity" and row[DIFFERING]:
            raise HarnessError(
                f"splice: identity changes the loss of {int(row[DIFFERING])} of {int(tokens[0])} tokens: two passes "
                f"over the same batch differ here, so no difference is to be trusted; use deterministic algorithms"
            )
    found = _results(everything, sums, tokens)
    return SpliceResult(sums[0][LOSS] / tokens[0], int(tokens[0]), int(tokens[1]), skip_first, skip_last, found)


class _Scored:
    """The batches on the device, without targets where nothing is scored. Can be iterated again if they can."""

    def __init__(self, batches: Batches, skip_first: int, skip_last: int, device: torch.device) -> None:
        if skip_first < 0 or skip_last < 0:
            raise HarnessError(f"splice: skip_first {skip_first} and skip_last {skip_last} should be 0 or more")
        self._batches, self._first, self._last, self._device = batches, skip_first, skip_last, device
        self.columns = 0
        """Of the widest window so far."""

    def __iter__(self) -> Iterator[Batch]:
        for item in self._batches:
            batch = (item if isinstance(item, Batch) else item[1]).to(self._device)
            columns = batch.targets.shape[1]
            self.columns = max(self.columns, columns)
            place = torch.arange(columns, device=self._device)
            outside = (place < self._first) | (place >= columns - self._last)
            yield replace(batch, targets=batch.targets.masked_fill(outside, IGNORED))


def _measure(
    model: Decoder, arms: Sequence[Arm], batches: Iterable[Batch], add_up: Callable[[Tensor], Tensor] | None
) -> tuple[list[list[float]], list[float]]:
    """The sums of the model as it is and then of each arm, and those of the tokens. The host waits once, at the end."""

    def losses(batch: Batch) -> Tensor:
        inputs = (batch.tokens, batch.targets, batch.positions, batch.document_ids)
        return model(*inputs, plain=True, reduction="none").loss

    total: Tensor | None = None
    for batch in batches:
        valid = batch.targets != IGNORED
        original = losses(batch)
        parts = [token_sums(valid), arm_sums(original, original, valid)]
        for arm in arms:
            with spliced(model, arm.functions):
                parts.append(arm_sums(losses(batch), original, valid))
        part = torch.cat(parts)
        total = part if total is None else total + part
    if total is None:
        raise HarnessError("splice: no batches")
    tokens, sums = (add_up(total) if add_up is not None else total).split([3, len(total) - 3])
    return sums.view(len(arms) + 1, -1).tolist(), tokens.tolist()


def _results(arms: Sequence[Arm], sums: Sequence[Sequence[float]], tokens: Sequence[float]) -> dict[str, ArmResult]:
    original, rest = sums[0][LOSS], sums[1:]
    ablated = {
        (frozenset(arm.sites), arm.kind): row[LOSS]
        for arm, row in zip(arms, rest, strict=True)
        if arm.kind in ("zero", "mean")
    }
    results = {}
    for arm, row in zip(arms, rest, strict=True):
        recovered: dict[str, float | None] = {}
        for kind in ("zero", "mean"):
            worst = ablated.get((frozenset(arm.sites), kind), original)
            recovered[kind] = None if worst == original else (worst - row[LOSS]) / (worst - original)
        results[arm.name] = arm_result(arm, row, tokens, recovered)
    return results
