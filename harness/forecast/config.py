"""The configuration of forecasts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.config import Section


class ForecastSection(Section):
    """The final loss, predicted from the run so far and from earlier runs."""

    prior: str | None = None
    """A file that `harness study prior RUN ... --out FILE` wrote: what earlier runs say. The beginning of a run cannot
    tell what annealing will gain. null: no forecast."""

    every_steps: int = Field(100, ge=1)
    """Steps between forecasts (forecast_final, forecast_low and forecast_high in the record), and between looks whether
    the run is still inside its band."""

    from_share: float = Field(0.2, gt=0, lt=1)
    """The first forecast comes after this share of train.steps. The band of that one is kept: it is what the run is
    compared with from then on (forecast_band_low and forecast_band_high), later forecasts follow the run."""

    window_steps: int = Field(100, ge=1)
    """The mean loss of the last so many steps is what must lie inside the band; of validations, the newest. Two means
    outside, without a common step, are the event `left_forecast`."""

    loss: Literal["auto", "training", "validation"] = "auto"
    """Of which loss. auto: of the validation loss if there are 12 by the first forecast, else of the training loss; the
    event `forecast` says which."""
