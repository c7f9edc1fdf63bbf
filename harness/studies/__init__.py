"""Studies: many training runs with one question.

In: a file of configs/studies/ whose `kind` names the kind of study. Out: a work folder with a result for every run, and
a report. Read kinds.py first, then the room of the kind; fitting.py fits laws to
data, forecasts.py asks runs what another schedule would give.
"""

from .kinds import fit, plan, report, run, status

__all__ = ["fit", "plan", "report", "run", "status"]
