"""Lines for people: in train.log with time and level, and on the console."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

console = Console()
"""Standard output. Lines printed here stand above a progress bar that is shown here."""

FILE_ONLY = {"file_only": True}
"""As `extra` of a log call: not for the console, where a progress bar says the same."""


class ConsoleHandler(logging.Handler):
    """Log records on `console`, as they are: no markup, no wrapping."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            try:
                console.print(self.format(record), markup=False, highlight=False, emoji=False, soft_wrap=True)
            except Exception:
                self.handleError(record)


class _ConsoleFormatter(logging.Formatter):
    """A message alone; its level too where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def configure_logging(log_file: Path | None = None, *, silent_as: str | None = None) -> None:
    """Send the log to the console and, from now on, to the end of `log_file`.

    harness speaks from INFO on, other libraries from WARNING on; Python's warnings are logged too. `silent_as` names a
    rank whose log stays off the console, errors excepted, which say that name. Repeating the call replaces what the
    last one set up.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, "of_harness", False)]:
        root.removeHandler(handler)
        handler.close()
    console.quiet = silent_as is not None
    handlers: list[logging.Handler]
    if silent_as is None:
        handlers = [ConsoleHandler()]
        handlers[0].setFormatter(_ConsoleFormatter())
    else:
        handlers = [logging.StreamHandler()]
        handlers[0].setLevel(logging.ERROR)
        handlers[0].setFormatter(logging.Formatter(f"{silent_as}: %(message)s"))
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in handlers:
        handler.of_harness = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    logging.getLogger("harness").setLevel(logging.INFO)
    logging.captureWarnings(True)
