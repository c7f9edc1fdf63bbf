"""The configuration of the optimizer and of the learning rate's course."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.config import Section


class OptimizerSection(Section):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), its parameter groups, and gradient clipping."""

    learning_rate: float = Field(3e-4, gt=0)
    """The peak of the schedule."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment. Language models are commonly trained with 0.95 rather than torch's 0.999."""

    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; biases and norm gains are never decayed."""

    decay_embeddings: bool = True
    """Whether token and position embeddings (and with them a tied head) are decayed like other matrices."""

    clip_norm: float | None = Field(1.0, gt=0)
    """The global gradient norm above which the gradient is scaled down to it. null: no clipping."""


class ScheduleSection(Section):
    """The learning rate as a function of the step; optim/schedule.py has the formulas."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: stay, fall linearly, fall on half a cosine, or stay and fall at the end
    (warmup-stable-decay)."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise to the peak; the first step has peak / warmup_steps."""

    decay_steps: int | None = Field(None, ge=1)
    """wsd only: length of the final fall, in steps. null: a fifth of train.steps."""

    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd only: the fall goes with 1 - x, or with 1 - sqrt(x) (Hägele et al., arXiv 2405.18392)."""

    final_fraction: float = Field(0.1, ge=0, le=1)
    """The rate at the last step as a share of the peak; without effect on `constant`."""

    @model_validator(mode="after")
    def _decay_steps_belong_to_wsd(self) -> ScheduleSection:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(f"decay_steps belongs to kind wsd; kind {self.kind} has no separate decay")
        return self
