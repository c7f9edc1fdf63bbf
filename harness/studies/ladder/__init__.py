"""The ladder: the same model at several sizes and lengths of training, for scaling laws.

In: a file of configs/studies/ of kind ladder. Out: a result for every run in the work folder, with every count of
parameters and operations, and a report with fits. Read config.py first (what there is to set, and the rules), then
grid.py (what that makes of each run), runs.py (one run), analysis.py (what follows from them).
"""

from .verbs import fit, plan, report, run, status

__all__ = ["fit", "plan", "report", "run", "status"]
