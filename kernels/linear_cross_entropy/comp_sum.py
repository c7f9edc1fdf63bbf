"""The family of losses: cross-entropy, and the comp-sum losses that it is one of.

Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arXiv 2304.07288: section 2
for the family, and the section on adversarial robustness for its smooth variant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CrossEntropy:
    """−log p of the target: the comp-sum loss with tau 1."""


@dataclass(frozen=True)
class CompSum:
    """(1 − p^(tau − 1)) / (tau − 1) of the target's probability p, −log p at tau 1: from 0 for certainty, falling in p.

    tau   from 0 on. Its gradient is the cross-entropy's times p^(tau − 1): above 1, tokens that the model holds for
          unlikely count less, which bears with wrong targets; below 1, more. Below 1 loss and gradient grow like
          p^(tau − 1), and are infinite where fp32 ends: at tau 0 from 88 nats on.
    rho   divides the logits, beside the temperature: the scale of margins in the smooth variant.
    nu    weight of the smooth adversarial term, for which `perturbed_hidden` must be given: nu · ‖Δ(x′) − Δ(x)‖₂, with
          Δ(x) the target's logit minus each of the vocabulary's, before temperature and rho, and x′ the perturbed
          input.

    Raises ValueError for values out of range.
    """

    tau: float = 1.0
    rho: float = 1.0
    nu: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tau", "rho", "nu"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), float | int):
                raise ValueError(f"CompSum: {name} must be a number, got {type(getattr(self, name)).__name__}")
        if not 0.0 <= self.tau < math.inf:
            raise ValueError(f"CompSum: tau must be finite and not negative, got {self.tau}")
        if not 0.0 < self.rho < math.inf:
            raise ValueError(f"CompSum: rho must be finite and positive, got {self.rho}")
        if not 0.0 <= self.nu < math.inf:
            raise ValueError(f"CompSum: nu must be finite and not negative, got {self.nu}")

    @classmethod
    def sum_exponential(cls) -> CompSum:
        """tau 0: 1/p − 1 (Weston and Watkins, 1998)."""
        return cls(tau=0.0)

    @classmethod
    def logistic(cls) -> CompSum:
        """tau 1: −log p, the cross-entropy itself."""
        return cls(tau=1.0)

    @classmethod
    def generalized_cross_entropy(cls, q: float = 0.7) -> CompSum:
        """tau 1 + q: (1 − p^q) / q with q between 0 and 1 (Zhang and Sabuncu, arXiv 1805.07836, whose q is 0.7)."""
        if not 0.0 < q < 1.0:
            raise ValueError(f"CompSum.generalized_cross_entropy: q must lie between 0 and 1, got {q}")
        return cls(tau=1.0 + q)

    @classmethod
    def mean_absolute_error(cls) -> CompSum:
        """tau 2: 1 − p, half the absolute error between one-hot and prediction (Ghosh et al., arXiv 1712.09482)."""
        return cls(tau=2.0)
