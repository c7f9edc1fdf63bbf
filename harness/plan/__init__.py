"""What a machine can do and what a run will need.

In: this machine, or the settings of a run and a layout. Out: a report for a person. Read doctor.py, and dry_run.py with
activations.py.
"""

from .config import DryRunSection
from .doctor import diagnose
from .dry_run import DryRun, lay_out
from .dry_run_text import describe, print_dry_run

__all__ = ["DryRun", "DryRunSection", "describe", "diagnose", "lay_out", "print_dry_run"]
