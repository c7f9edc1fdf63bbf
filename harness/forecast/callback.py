"""Forecasting: the final loss in the record of some steps, and an event when the run leaves its band."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any, Literal

import numpy as np

from harness.callbacks import Callback, TrainerView, is_due
from harness.config import HarnessError
from harness.optim import ScheduleSection
from harness.scaling import Conditioned, Curve, Prior, condition

from .band import BACK, LEFT, Band
from .config import ForecastSection
from .history import History
from .runs import ENOUGH_VALIDATIONS, planned_rates

logger = logging.getLogger("harness.forecast")

Loss = Literal["training", "validation"]
LEAST_RECENT = 4
"""Training losses that a mean with a scatter of its own needs."""


class Forecasting(Callback):
    """Adds forecast_final, forecast_low, forecast_high (of a point like those forecast from: see harness.scaling's
    Forecast), and the kept band at this step, forecast_band_low and forecast_band_high.

    Every rank collects the losses, which are the same on all; rank 0, whose record it is, computes. Nothing of it
    touches the training: where a forecast cannot be made, that is a warning.
    """

    name = "forecast"

    def __init__(
        self,
        section: ForecastSection,
        schedule: ScheduleSection,
        *,
        peak: float,
        steps: int,
        tokens_per_step: int,
        parameters: int,
        rank: int = 0,
    ) -> None:
        """`parameters` are those of the blocks. Raises HarnessError where the prior cannot be read."""
        assert section.prior is not None
        self.section, self._rank = section, rank
        self._prior = Prior.load(section.prior)
        self._schedule, self._peak, self._steps = schedule, peak, steps
        self._scale = {"tokens_per_step": float(tokens_per_step), "parameters": float(parameters)}
        self._planned: np.ndarray | None = None  # made when it is first needed
        self._warned = False
        self._history = History(steps)
        self._kind: Loss | None = None
        self._band: Band | None = None
        self._outside = False
        self._beyond_since: int | None = None  # the last step of the first mean that was outside

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self._history.add(record, self.section.window_steps)
        step = trainer.step
        begun = step >= math.ceil(self.section.from_share * self._steps)
        if self._rank > 0 or not begun or not is_due(step, self._steps, self.section.every_steps):
            return
        try:
            columns = self._forecast(trainer, step)
        except (HarnessError, np.linalg.LinAlgError) as error:
            if not self._warned:
                logger.warning("step %d: no forecast: %s", step, error)
            self._warned = True
            return
        record.update(columns)

    def _forecast(self, trainer: TrainerView, step: int) -> dict[str, float]:
        kind = self._kind or self._choose()
        curve = self._curve(kind)
        found = condition(self._prior, curve)
        final, low, high = found.forecast(np.array([self._steps])).final
        if self._band is None:
            self._kind, self._band = kind, Band.of(found, step, self._steps)
            self._say_first(trainer, step, found, (final, low, high))
        band_low, band_high = self._band.ends(step)
        self._compare(trainer, step, self._band)
        return {
            "forecast_final": final,
            "forecast_low": low,
            "forecast_high": high,
            "forecast_band_low": band_low,
            "forecast_band_high": band_high,
        }

    def _choose(self) -> Loss:
        if self.section.loss != "auto":
            return self.section.loss
        enough = len(self._curve("validation").settled().steps) >= ENOUGH_VALIDATIONS
        return "validation" if enough else "training"

    def _curve(self, kind: Loss) -> Curve:
        steps, losses = self._history.validation() if kind == "validation" else self._history.training()
        rates = self._history.taken_rates(self._plan())
        return Curve("this run", rates, steps, losses, kind=kind, **self._scale)

    def _plan(self) -> np.ndarray:
        if self._planned is None:
            self._planned = planned_rates(self._schedule, self._peak, self._steps)
        return self._planned

    def _compare(self, trainer: TrainerView, step: int, band: Band) -> None:
        """Events where the run has left the band, and where it is back. It has left where two means are outside that
        have no point in common: of many looks at a run that is as forecast, some are outside by their noise."""
        if self._kind == "validation":
            steps, losses = (column[-1:] for column in self._history.validation())
            noise: float | None = band.noise
        else:
            steps, losses = self._history.recent()
            noise = None
        kept = steps > band.step
        steps, losses = steps[kept], losses[kept]
        if len(steps) < (1 if noise is not None else LEAST_RECENT):
            return
        distance = band.distance(steps, losses, noise)
        beyond = abs(distance) > (BACK if self._outside else LEFT)
        if not beyond:
            self._beyond_since = None
        elif self._beyond_since is None:
            self._beyond_since = int(steps[-1])
        confirmed = beyond and self._beyond_since is not None and steps[0] > self._beyond_since
        if beyond == self._outside or (beyond and not confirmed):
            return
        self._outside = not self._outside
        expected, deviation = band.at(steps)
        ends = [float(np.exp(expected + sign * LEFT * deviation)) for sign in (-1, 1)]
        details = {
            "loss": float(losses.mean()),
            "of": self._kind,
            "expected": float(np.exp(expected)),
            "band": ends,
            "deviations": round(distance, 2),
            "forecast_at": band.step,
        }
        trainer.run.log_event("left_forecast" if self._outside else "back_in_forecast", step=step, **details)
        logger.warning(
            "step %d: the %s loss, %.4f, %s the band %.4f to %.4f that was forecast at step %d",
            step,
            self._kind,
            losses.mean(),
            f"has left, {'upwards' if distance > 0 else 'downwards'}," if self._outside else "is back in",
            *ends,
            band.step,
        )

    def _say_first(
        self, trainer: TrainerView, step: int, found: Conditioned, final: tuple[float, float, float]
    ) -> None:
        trainer.run.log_event(
            "forecast",
            step=step,
            of=self._kind,
            points=len(found.curve.steps),
            final=final[0],
            interval=list(final[1:]),
            told={name: round(share, 3) for name, share in found.told.items()},
            widened=round(found.inflation, 3),
            prior=self.section.prior,
        )
        logger.info(
            "step %d: forecast of the final %s loss, of step %d: %.4f (95 %%: %.4f to %.4f)",
            step,
            self._kind,
            self._steps,
            *final,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self._history.state_dict(),
            "kind": self._kind,
            "band": None if self._band is None else self._band.as_json(),
            "outside": self._outside,
            "beyond_since": self._beyond_since,
            "schedule": None if self._band is None else self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was there before is dropped: after a roll-back, too, what came after the step gone back to. Of a
        checkpoint without a forecast, the history begins there. The band of another schedule or length is dropped,
        and the next forecast makes a new one."""
        self._history = History(self._steps)
        if "history" in state:
            self._history.load_state_dict(state["history"])
        self._kind = state.get("kind")
        self._band = None if state.get("band") is None else Band.from_json(state["band"])
        self._outside, self._beyond_since = state.get("outside", False), state.get("beyond_since")
        if self._band is not None and state.get("schedule") != self._fingerprint():
            self._band, self._kind, self._outside, self._beyond_since = None, None, False, None

    def _fingerprint(self) -> str:
        return hashlib.sha256(self._plan().tobytes()).hexdigest()
