"""Norm removal as a callback of the loop: statistics, events, the auxiliary loss, and the way back from a spike."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from harness.callbacks import Callback, Fault, RollBack, TrainerView
from harness.config import ConfigError, HarnessError
from harness.data import Batch
from harness.model import Decoder, ModelSection, SiteState, norm_sites, ordinary_tokens
from harness.parallel import ParallelLayout

from .adaptive import AdaptiveSchedule
from .auxiliary import SigmaLoss, auxiliary_value
from .config import NormRemovalSection
from .schedule import Event, fixed_events, ramp, removal_order
from .statistics import Averages

logger = logging.getLogger(__name__)


def check_schedule(section: NormRemovalSection, model: ModelSection, steps: int, *, inside: str | None) -> None:
    """Raises ConfigError where the schedule cannot be kept. `inside`: what keeps taps within blocks from being used
    ("train.compile")."""
    if model.norm_free:
        raise ConfigError("norm_removal: this model has no norms (model.norm_free); there is nothing to remove")
    sites = norm_sites(model)
    if section.injection.weight > 0 and inside is not None:
        raise ConfigError(f"norm_removal.injection: cannot be used together with {inside}; switch one of them off")
    if section.control != "none":
        return
    if section.schedule == "fixed":
        fixed_events(sites, section, steps)
        return
    names = removal_order(sites, section)
    least = section.adaptive.start + (len(names) - 1) * max(section.adaptive.gap, section.ramp_steps)
    if least + section.ramp_steps - 1 > steps:
        raise ConfigError(
            f"norm_removal.adaptive: {len(names)} sites cannot go in {steps} steps: from step {section.adaptive.start} "
            f"on, {max(section.adaptive.gap, section.ramp_steps)} steps apart, the last goes at step {least}; raise "
            f"train.steps"
        )


class NormRemoval(Callback):
    """Takes the norms of the trainer's model away, site by site. Its state says what is gone, and at which sigma."""

    name = "norm_removal"

    def __init__(
        self,
        section: NormRemovalSection,
        model: Decoder,
        layout: ParallelLayout,
        *,
        steps: int,
        rows: int,
        sequence_length: int,
    ) -> None:
        """`model` has switchable norms; the run has `steps` of `rows` sequences each, over all ranks."""
        assert model.norm_states is not None
        self.section, self._model, self._layout, self._states = section, model, layout, model.norm_states
        self._averages = Averages(section.average_steps)
        removes = section.control == "none"
        sites = norm_sites(model.section)
        self._adaptive = section.schedule == "adaptive"
        self._events: list[Event] = []
        self._order: list[str] = []
        if removes and self._adaptive:
            self._order = removal_order(sites, section)
        elif removes:
            self._events = fixed_events(sites, section, steps)
        self._schedule = AdaptiveSchedule(section.adaptive, section.ramp_steps)
        self._at_spike: AdaptiveSchedule | None = None
        self._began: dict[str, tuple[int, int]] = {}
        """The sites that are gone or going: the step in which each began, and in how many steps it goes."""
        self._snapshot: int | None = None
        """The checkpoint from before the last removal, to go back to."""
        self._updated = 0
        """The last step whose statistics are in the averages."""
        self._auxiliary_value: float | None = None
        injects = section.injection.weight > 0
        auxiliary = section.auxiliary.weight > 0 and section.control != "plain"
        self._loss = SigmaLoss(model, section, injects=injects) if injects or auxiliary else None
        self._positions, self._rows = rows * sequence_length, rows

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def before_training(self, trainer: TrainerView) -> None:
        trainer.protect(self._snapshot)

    def before_step(self, trainer: TrainerView) -> None:
        step = trainer.step + 1
        for site in self._due(trainer, step):
            self._begin(trainer, site, step)
        changed = {}
        for site, (began, steps) in self._began.items():
            state = self._states.states[site]
            alpha = ramp(step, began, steps)
            if alpha != state.alpha:
                changed[site] = SiteState(alpha, state.sigma)
        self._states.set(changed)

    def before_forward(self, trainer: TrainerView, batch: Batch) -> None:
        self._states.gather(True)
        if self._loss is not None:
            final = self._averages.last.get("final")
            ordinary = ordinary_tokens(batch.tokens, batch.document_ids, self._model.end_of_text)
            ordinary = self._model.tensor.split_flags(ordinary)
            self._loss.begin(ordinary, None if final is None else final.ordinary)

    def after_forward(self, trainer: TrainerView, batch: Batch) -> Tensor | None:
        # An activation that is computed again in the backward pass is counted no second time.
        self._states.gather(False)
        return None if self._loss is None else self._loss.end(self._positions, self._rows)

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        step = record["step"]
        if step != self._updated:  # a step that was interrupted among its callbacks comes here once more
            if "skipped" in record:  # its numbers are no good, and its gradient was not used
                self._states.forget()
                self._updated = step
            else:
                self._update(step)
                self._judge(step, record["loss"])
        record |= self._columns()

    def claim(self, fault: Fault, step: int) -> RollBack | None:
        if not self._order or not self._schedule.is_spike(step, float("nan")):
            return None
        return self._way_back(step, f"{fault.reason}, after norms were removed")

    def after_roll_back(self, trainer: TrainerView) -> None:
        if self._at_spike is not None:
            self._schedule.take_back(trainer.step, self._at_spike)
            self._at_spike = None
        trainer.protect(self._snapshot)

    def after_training(self, trainer: TrainerView) -> None:
        left = [site.name for site in self._states.sites if self._states.states[site.name].alpha < 1]
        if self.section.control == "none" and left:
            logger.warning("%d norm sites are still there: %s; raise train.steps and go on", len(left), ", ".join(left))

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        states = self._states.states
        return {
            "sites": {site: {"alpha": state.alpha, "sigma": state.sigma} for site, state in states.items()},
            "began": {site: list(when) for site, when in self._began.items()},
            "averages": self._averages.state_dict(),
            "schedule": self._schedule.state_dict(),
            "snapshot": self._snapshot,
            "updated": self._updated,
            "auxiliary_value": self._auxiliary_value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._states.forget()
        if not state:  # a run that began without norm removal
            return
        self._states.set({site: SiteState(**values) for site, values in state["sites"].items()})
        self._began = {site: (began, steps) for site, (began, steps) in state["began"].items()}
        self._averages.load_state_dict(state["averages"])
        self._schedule.load_state_dict(state["schedule"])
        self._snapshot, self._updated = state["snapshot"], state["updated"]
        self._auxiliary_value = state["auxiliary_value"]

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _due(self, trainer: TrainerView, step: int) -> list[str]:
        if not self._order:
            return [event.site for event in self._events if event.step <= step and event.site not in self._began]
        left = [site for site in self._order if site not in self._began]
        # Where kernels add in no fixed order, ranks' losses may differ in the last bit: one answer for all.
        if not left or not self._layout.all_max([self._schedule.is_due(step)])[0]:
            return []
        if trainer.saved_step != trainer.step:
            trainer.save()  # all is as if nothing were due
        self._snapshot = trainer.step
        trainer.protect(self._snapshot)
        self._schedule.remove(step)
        return left[:1]

    def _begin(self, trainer: TrainerView, site: str, step: int) -> None:
        average = self._averages.sites.get(site)
        if average is None:
            raise HarnessError(f"norm_removal: {site} is to go at step {step}, before its sigma was ever seen")
        self._began[site] = (step, self.section.ramp_steps)
        self._states.set({site: SiteState(0.0, average.sigma)})
        details = {"sigma": average.sigma, "sigma_ordinary": average.ordinary, "sigma_others": average.others}
        trainer.run.log_event("norm_removed", step=step, site=site, ramp_steps=self.section.ramp_steps, **details)
        logger.info("step %d: the norm at %s goes, at sigma %.4g", step, site, average.sigma)

    def _update(self, step: int) -> None:
        """One all-reduce of one small vector, and one look at it, a step."""
        target = self._averages.last.get("final")
        sums = self._states.take(self._layout.sum_over_all)
        if target is not None and target.ordinary is not None:
            relative = self.section.auxiliary.relative
            self._auxiliary_value = auxiliary_value(sums["final"], target.ordinary, relative=relative)
        self._averages.update(sums)
        self._updated = step

    def _judge(self, step: int, loss: float) -> None:
        """Raises RollBack for a spike that a removal has caused."""
        if self._order and self._layout.all_max([self._schedule.is_spike(step, loss)])[0]:
            raise self._way_back(step, f"loss {loss:.4f} after norms were removed")
        self._schedule.observe(loss)

    def _columns(self) -> dict[str, float]:
        columns: dict[str, float] = {
            "norm_sites_left": sum(state.alpha < 1 for state in self._states.states.values()),
        }
        final = self._averages.last.get("final")
        if final is not None:
            columns["final_sigma"] = final.sigma
            if final.ratio is not None:
                columns["final_sigma_ratio"] = final.ratio
        if self._auxiliary_value is not None:
            columns["sigma_spread"] = self._auxiliary_value
        return columns

    def _way_back(self, step: int, reason: str) -> RollBack:
        """To before the last removal. Raises HarnessError where that was tried too often."""
        assert self._snapshot is not None
        if self._schedule.rollbacks >= self.section.adaptive.most_rollbacks:
            raise HarnessError(
                f"step {step}: {reason}, after {self._schedule.rollbacks} rollbacks "
                f"(norm_removal.adaptive.most_rollbacks); lower optimizer.learning_rate, or set ramp_steps"
            )
        self._at_spike = self._schedule.copy()
        return RollBack(self._snapshot, "norm_removal", reason)
