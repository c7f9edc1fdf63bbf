"""Parameter groups, the optimizer, and learning-rate schedules.

In: named weights and the `optimizer` and `schedule` sections. Out: a torch optimizer, and the rate of any step as a
pure function. Read schedule.py for the formulas and adamw.py for what is decayed.
"""

from .adamw import build_adamw, is_decayed
from .config import OptimizerSection, ScheduleSection
from .schedule import decay_steps, learning_rate

__all__ = ["OptimizerSection", "ScheduleSection", "build_adamw", "decay_steps", "is_decayed", "learning_rate"]
