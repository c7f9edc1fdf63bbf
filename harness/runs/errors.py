"""What is raised where a run folder cannot be written or read."""

from harness.config import HarnessError


class RunError(HarnessError):
    """One line: the folder or file, what is wrong with it, and what would be right."""
