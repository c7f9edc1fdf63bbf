"""Records of steps and events in, the run folder `runs/<name>/` out, and back to Python by `read`.

metrics.jsonl is the record of steps, each once; TensorBoard is a view of it; events.jsonl is append-only.
Read folder.py first (what lies where, and how a resume keeps it true), then reader.py.
"""

from .config import RunSection
from .errors import RunError
from .folder import RunFolder
from .log import FILE_ONLY, configure_logging, console
from .progress import Progress
from .reader import Run, read

__all__ = [
    "FILE_ONLY",
    "Progress",
    "Run",
    "RunError",
    "RunFolder",
    "RunSection",
    "configure_logging",
    "console",
    "read",
]
