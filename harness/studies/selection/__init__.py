"""Which selection score helps training: a pool, arms that choose from it, the same small model trained on each choice.

In: configs/studies/selection.yaml. Out: a result file a run, and a report of paired differences. Read config.py first,
then pool.py (the text), arms.py (what is chosen), training.py (a run) and analysis.py (what follows).
"""

from .verbs import plan, report, run, status

__all__ = ["plan", "report", "run", "status"]
