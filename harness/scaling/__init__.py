"""Scaling laws: formulas with their sources, and fits that say how far they can be trusted.

In: columns of sizes and losses (tables.py reads them from files and runs). Out: a `Fit`, with intervals, warnings and
predictions. Read law.py first, then laws.py (the formulas), objective.py and search.py (what is minimised, and how),
fit.py; held_out.py, allocation.py and isoflop.py build on them. Forecasts: curves.py, residuals.py, prior.py,
forecast.py.
"""

from .allocation import Allocation, Given, best_sizes, optimal
from .curves import Curve
from .fit import Fit, fit, profile
from .forecast import Conditioned, Forecast, condition, forecast, parting
from .held_out import HeldOut, hold_out
from .isoflop import IsoFlop, fit_isoflop
from .law import Law, Parameter
from .laws import LAWS, annealing_areas
from .prior import Prior, UnknownAnnealingError
from .tables import COUNTS, Table, check_repeated, read_tables

__all__ = [
    "COUNTS",
    "LAWS",
    "Allocation",
    "Conditioned",
    "Curve",
    "Fit",
    "Forecast",
    "Given",
    "HeldOut",
    "IsoFlop",
    "Law",
    "Parameter",
    "Prior",
    "Table",
    "UnknownAnnealingError",
    "annealing_areas",
    "best_sizes",
    "check_repeated",
    "condition",
    "fit",
    "fit_isoflop",
    "forecast",
    "hold_out",
    "optimal",
    "parting",
    "profile",
    "read_tables",
]
