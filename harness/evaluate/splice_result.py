"""What `splice` found: from sums over tokens and windows to differences with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .splice_arms import Arm


@dataclass(frozen=True)
class ArmResult:
    """One arm, per token, in nats; differences are paired, each token's loss with the model's own on the same token."""

    name: str
    kind: str
    """arm (the caller's), identity, zero or mean."""
    sites: tuple[str, ...]
    loss: float
    """Cross-entropy."""
    delta: float
    """Mean difference of the losses with and without the splice."""
    standard_error: float
    """Of `delta`, windows taken as clusters of tokens that go together; nan with fewer than two windows."""
    token_standard_error: float
    """Of `delta` if all tokens were independent; nan with fewer than two tokens."""
    recovered: dict[str, float | None]
    """By ablation (zero, mean) of the same sites: (CE_ablated - CE_arm) / (CE_ablated - CE_original), as in Engels,
    Riggs and Tegmark, arXiv 2410.14670. None where the ablation costs nothing, or was not run on these sites."""


@dataclass(frozen=True)
class SpliceResult:
    """All arms on the same tokens."""

    loss: float
    """The model's own cross-entropy, nats a token."""
    tokens: int
    windows: int
    """Windows with at least one of these tokens."""
    skip_first: int
    skip_last: int
    arms: dict[str, ArmResult]
    """The caller's first, then the references."""

    def table(self) -> list[str]:
        """Lines of text: what was measured, then an arm a line."""
        measured = {kind for arm in self.arms.values() for kind, share in arm.recovered.items() if share is not None}
        kinds = [kind for kind in ("zero", "mean") if kind in measured]
        rows = [["arm", "CE", "delta CE", "+- windows", "+- tokens", *(f"of {kind}" for kind in kinds)]]
        for arm in self.arms.values():
            shares = [arm.recovered.get(kind) for kind in kinds]
            errors = (arm.standard_error, arm.token_standard_error)
            rows.append(
                [
                    arm.name,
                    f"{arm.loss:.4f}",
                    "0" if arm.delta == 0.0 else f"{arm.delta:+.6f}",
                    *("-" if math.isnan(error) else f"{error:.6f}" for error in errors),
                    *("-" if share is None else f"{share:.2%}" for share in shares),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        left_out = f", without the first {self.skip_first} and the last {self.skip_last} of each"
        return [
            f"{self.tokens:,} tokens of {self.windows:,} windows"
            + (left_out if self.skip_first or self.skip_last else "")
            + f"; the model as it is: {self.loss:.4f} nats a token",
            *lines,
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types; what is not a number is null."""
        values = asdict(self)
        values["arms"] = {
            name: {key: None if value != value else value for key, value in arm.items()}
            for name, arm in values["arms"].items()
        }
        return values


def arm_sums(losses: Tensor, original: Tensor, valid: Tensor) -> Tensor:
    """fp64 (7,): of per-token losses (batch, sequence), what `result_of` reads by the names below; a row is a
    window."""
    difference = torch.where(valid, losses.double() - original.double(), 0.0)
    by_window, counts = difference.sum(1), valid.sum(1).double()
    return torch.stack(
        [
            torch.where(valid, losses.double(), 0.0).sum(),
            difference.sum(),
            difference.square().sum(),
            by_window.square().sum(),
            (by_window * counts).sum(),
            (difference != 0).sum().double(),
            (valid & ~losses.isfinite()).sum().double(),
        ]
    )


LOSS, DELTA, SQUARES, WINDOW_SQUARES, WINDOW_COUNTS, DIFFERING, NOT_FINITE = range(7)


def token_sums(valid: Tensor) -> Tensor:
    """fp64 (3,): tokens, windows that have any, and the sum of their squared token counts."""
    counts = valid.sum(1).double()
    return torch.stack([counts.sum(), (counts > 0).sum().double(), counts.square().sum()])


def arm_result(
    arm: Arm, sums: Sequence[float], tokens: Sequence[float], recovered: dict[str, float | None]
) -> ArmResult:
    """An arm's means and standard errors.

    d is a token's difference, D a window's sum over its n tokens, N all tokens, G windows, m = sum(d) / N.
    Over tokens: sqrt(sum((d - m)^2) / (N - 1) / N). Over windows, the ratio estimator's: sqrt(G / (G - 1) *
    sum((D - n m)^2)) / N (Cochran, Sampling Techniques, 1977, chapter 6, without the finite population's correction).
    """
    count, windows, squared_counts = tokens
    mean = sums[DELTA] / count
    within = max(0.0, sums[SQUARES] - count * mean**2)
    between = max(0.0, sums[WINDOW_SQUARES] - 2 * mean * sums[WINDOW_COUNTS] + mean**2 * squared_counts)
    return ArmResult(
        arm.name,
        arm.kind,
        arm.sites,
        sums[LOSS] / count,
        mean,
        math.sqrt(windows / (windows - 1) * between) / count if windows > 1 else math.nan,
        math.sqrt(within / (count - 1) / count) if count > 1 else math.nan,
        recovered,
    )
