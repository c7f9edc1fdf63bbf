"""The configuration of norm removal."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.config import Section

Kind = Literal["mlp", "qk", "v", "q_norm", "k_norm", "final"]


class TimesSection(Section):
    """When the sites of one kind are removed, layer after layer."""

    first: int = Field(..., ge=2)
    """The first step in which layer 0's is gone (or, with ramp_steps, going)."""

    gap: int = Field(1, ge=1)
    """Steps from one layer's to the next one's."""


class AdaptiveSection(Section):
    """The next site goes when the loss has recovered from the one before; a spike takes the run back."""

    start: int = Field(20, ge=2)
    """The first step in which a site is gone."""

    gap: int = Field(2, ge=1)
    """Steps between removals, at least; doubled after each rollback, and halved again, down to this, by each site that
    went without one."""

    tolerance: float = Field(0.05, ge=0)
    """Recovered: the running mean of the training loss is at most this many nats above what it was before ..."""

    patience: int = Field(50, ge=1)
    """... and after so many steps the next site goes all the same."""

    spike: float = Field(1.0, gt=0)
    """A step's loss of so many nats above the mean before the removal, or one that is no number, takes the run back."""

    window_steps: int = Field(10, ge=1)
    """Steps that the running mean reaches back, as an exponential average."""

    most_rollbacks: int = Field(20, ge=0)
    """The run ends in an error at the next spike after so many."""


class AuxiliarySection(Section):
    """Pulls sigma of all tokens at the final norm's input towards that of ordinary tokens (arXiv 2507.02559)."""

    weight: float = Field(0.0, ge=0)
    """lambda in lambda * mean[(sigma - target)^2], over all tokens; target: the mean sigma of ordinary tokens (neither
    the first of a document nor an end of text) in the step before, on all ranks. 0: no auxiliary loss."""

    relative: bool = False
    """mean[(sigma / target - 1)^2] instead: the same weight fits every scale of the residual stream."""


class InjectionSection(Section):
    """For studies: gives a model the outlier at first positions that large pretrained models have and small ones have
    not: weight times mean[(sigma / target - 1)^2] over first tokens and ends of text, and weight times
    mean[max(sigma / ordinary - 1, 0)^2] over the others, without which sigma would grow for all."""

    weight: float = Field(0.0, ge=0)
    """0: nothing is injected."""

    sigma: float = Field(16.0, gt=0)
    """The target."""

    ordinary_sigma: float = Field(2.0, gt=0)
    """What other tokens should not go beyond."""

    from_layer: int = Field(1, ge=0)
    """At the inputs of the MLPs' norms from this layer on, and of the final one."""


class NormRemovalSection(Section):
    """Fine-tuning that takes a model's norms away one after the other."""

    enabled: bool = False
    """Train with norms that can be switched off. `harness remove-norms` sets it."""

    control: Literal["none", "plain", "aux"] = "none"
    """none: remove norms. plain, aux: remove none, and fine-tune without and with the auxiliary loss, to compare."""

    match: str | None = None
    """A removal run's folder. Of a control: train as many steps as the samples that the run consumed, those that
    rollbacks took with them included (train.steps is set by it). null: train.steps."""

    controls: tuple[str, ...] = ()
    """Folders of finished controls, which the proof sets beside the model without norms."""

    proof_windows: int = Field(64, ge=1)
    """Validation windows of each corpus that the proof reads."""

    schedule: Literal["fixed", "adaptive"] = "fixed"
    """fixed: at the steps that `times` says. adaptive: as the loss allows, see `adaptive`."""

    times: dict[Kind, TimesSection] = Field(default_factory=dict)
    """Of the fixed schedule: for each kind of site that the model has, when."""

    order: tuple[Kind, ...] = ("mlp", "qk", "v", "q_norm", "k_norm", "final")
    """Of the adaptive schedule: the kinds in turn, each from layer 0 on."""

    adaptive: AdaptiveSection = AdaptiveSection()
    """The adaptive schedule."""

    ramp_steps: int = Field(1, ge=1)
    """Steps in which a site goes from real to frozen, on a cosine (TaperNorm, arXiv 2602.10408). 1: at once."""

    average_steps: int = Field(10, ge=1)
    """Steps that the average of sigma reaches back at which a site is frozen, as an exponential average."""

    auxiliary: AuxiliarySection = AuxiliarySection()
    """The auxiliary loss."""

    injection: InjectionSection = InjectionSection()
    """An outlier for studies."""

    @model_validator(mode="after")
    def _check(self) -> NormRemovalSection:
        if self.match is not None and self.control == "none":
            raise ValueError("match is for controls: set control to plain or aux, or match to null")
        if self.control == "aux" and self.auxiliary.weight == 0 and self.injection.weight == 0:
            raise ValueError("control: aux is fine-tuning with the auxiliary loss, and auxiliary.weight is 0; set it")
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order: {', '.join(self.order)} names a kind twice")
        return self
