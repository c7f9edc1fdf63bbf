"""Forecasts of a run while it trains, and the curves of run folders that forecasts are made from.

In: the `forecast` section, a step's record. Out: columns of that record, events. Read callback.py first; the law is
harness.scaling's.
"""

from .callback import Forecasting
from .config import ForecastSection
from .runs import Kind, planned_rates, read_curve

__all__ = ["ForecastSection", "Forecasting", "Kind", "planned_rates", "read_curve"]
