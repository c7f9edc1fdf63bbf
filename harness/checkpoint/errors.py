"""What is raised where a checkpoint cannot be written or read."""

from harness.config import HarnessError


class CheckpointError(HarnessError):
    """One line: the folder and file, what is wrong with it, and what would be right."""


class CannotWriteError(CheckpointError):
    """The disk is full, or out of reach: what was to be saved is in order, and a later attempt may succeed."""
