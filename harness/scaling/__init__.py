"""Scaling laws: formulas with their sources, and fits that say how far they can be trusted.

In: columns of sizes and losses. Out: a `Fit`, with intervals, warnings and predictions. Read law.py first, then laws.py
(the formulas), objective.py and search.py (what is minimised, and how), fit.py. Forecasts: curves.py, residuals.py,
prior.py, forecast.py.
"""

from .curves import Curve
from .fit import Fit, fit, profile
from .forecast import Conditioned, Forecast, condition, forecast, parting
from .law import Law, Parameter
from .laws import LAWS, annealing_areas
from .prior import Prior, UnknownAnnealingError

__all__ = [
    "LAWS",
    "Conditioned",
    "Curve",
    "Fit",
    "Forecast",
    "Law",
    "Parameter",
    "Prior",
    "UnknownAnnealingError",
    "annealing_areas",
    "condition",
    "fit",
    "forecast",
    "parting",
    "profile",
]
