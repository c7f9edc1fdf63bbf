"""What runs beside the loop: the protocol, validation, saving, the judgement of bad steps.

In: the trainer's state at the moment that a hook's name says. Out: columns of the step's record, checkpoints, events.
Read base.py first. Rooms above this one bring callbacks of their own.
"""

from .base import Callback, Interrupted, RollBack, TrainerView, is_due
from .config import CheckpointSection, FaultsSection, ValidationSection
from .faults import KINDS, Fault, FaultError, FaultJudge
from .saving import Saving
from .validation import Score, Validation, evaluating, score

__all__ = [
    "KINDS",
    "Callback",
    "CheckpointSection",
    "Fault",
    "FaultError",
    "FaultJudge",
    "FaultsSection",
    "Interrupted",
    "RollBack",
    "Saving",
    "Score",
    "TrainerView",
    "Validation",
    "ValidationSection",
    "evaluating",
    "is_due",
    "score",
]
