"""Scaling laws: formulas with their sources, and fits that say how far they can be trusted.

In: columns of sizes and losses. Out: a `Fit`, with intervals, warnings and predictions. Read law.py first, then laws.py
(the formulas), objective.py and search.py (what is minimised, and how), fit.py.
"""

from .fit import Fit, fit, profile
from .law import Law, Parameter
from .laws import LAWS, annealing_areas

__all__ = ["LAWS", "Fit", "Law", "Parameter", "annealing_areas", "fit", "profile"]
