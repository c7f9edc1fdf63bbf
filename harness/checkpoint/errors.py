"""What is raised where a checkpoint cannot be written or read."""

from harness.config import HarnessError


class CheckpointError(HarnessError):
    """One line: the folder and file, what is wrong with it, and what would be right."""
