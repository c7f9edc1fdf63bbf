"""What a machine can do and what a run will need.

In: this machine. Out: a report for a person. Read doctor.py.
"""

from .doctor import diagnose

__all__ = ["diagnose"]
