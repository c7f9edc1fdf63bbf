"""The study of norm removal: both families, removal on several schedules beside fine-tuning without it, over seeds.

In: a file of configs/studies/ of kind norm_removal. Out: a source and a result for every run in the work folder, and a
report. Read config.py first (what there is to set), then runs.py (one source, one run).
"""

from .verbs import plan, report, run, status

__all__ = ["plan", "report", "run", "status"]
