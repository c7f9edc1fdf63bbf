"""Lines for people: in the log file, on a terminal, and where there is none."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from harness.runs import Progress, configure_logging, log


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, harness = logging.getLogger(), logging.getLogger("harness")
    before = (list(root.handlers), harness.level)
    yield
    for handler in [handler for handler in root.handlers if handler not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    harness.setLevel(before[1])
    logging.captureWarnings(False)


def drive(log_every: int = 10, total: int = 25, first: int = 3) -> None:
    seconds = iter(range(1000))
    with Progress(total, first, log_every, clock=lambda: 2.0 * next(seconds)) as progress:
        for step in range(first + 1, total + 1):
            progress.update({"step": step, "loss": step / 8, "tokens_per_second": 12345.6, "learning_rate": 3e-4})
            if step == 14:
                logging.getLogger("harness.somewhere").info("saved [bold]step[/bold] 14 " + "x" * 200)


def step_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "step " in line and "loss" in line]


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    configure_logging(tmp_path / "deep" / "train.log")
    configure_logging(tmp_path / "deep" / "train.log")
    drive()
    out = capsys.readouterr().out
    assert "saved [bold]step[/bold] 14 " + "x" * 200 + "\n" in out
    lines = step_lines(out)
    assert lines == [
        "step 4/25  loss 0.5000  lr 0.0003  12.3k tokens/s  ETA 0:00:42",
        "step 10/25  loss 1.2500  lr 0.0003  12.3k tokens/s  ETA 0:00:30",
        "step 20/25  loss 2.5000  lr 0.0003  12.3k tokens/s  ETA 0:00:10",
        "step 25/25  loss 3.1250  lr 0.0003  12.3k tokens/s  ETA 0:00:00",
    ]
    file = (tmp_path / "deep" / "train.log").read_text()
    assert [line.partition(" INFO ")[2] for line in step_lines(file)] == lines
    assert "INFO saved [bold]step[/bold] 14 " + "x" * 200 + "\n" in file


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=120))
    configure_logging(tmp_path / "train.log")
    drive()
    shown = screen.getvalue()
    assert "━" in shown
    assert "step 25/25" in shown
    assert "loss 3.1250" in shown
    assert "saved [bold]step[/bold] 14" in shown, "a message during the run goes above the bar, as it is"
    assert "step 20/25  loss" not in shown, "the lines of the log file are not for the terminal"
    assert len(step_lines((tmp_path / "train.log").read_text())) == 4


def test_levels_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    configure_logging(tmp_path / "train.log")
    logging.getLogger("harness.x").debug("too much")
    logging.getLogger("harness.x").warning("mind this")
    logging.getLogger("other").info("not ours")
    logging.getLogger("other").error("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old habit", stacklevel=1)
    logging.captureWarnings(False)
    out = capsys.readouterr().out
    assert "warning: mind this\n" in out
    assert "error: theirs\n" in out
    assert "old habit" in out
    assert "too much" not in out
    assert "not ours" not in out
    configure_logging()
    logging.getLogger("harness.x").info("console only")
    assert "console only" in capsys.readouterr().out
    assert "console only" not in (tmp_path / "train.log").read_text()


def test_rollback_and_missing_values(capsys: pytest.CaptureFixture) -> None:
    configure_logging()
    with Progress(10, log_every=1) as progress:
        for step in (1, 2, 3, 2, 3):
            progress.update({"step": step, "loss": None})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "2/10", "3/10", "2/10", "3/10"]
    assert lines[3] == "step 2/10  ETA unknown"


def test_speed_is_the_mean_since_the_last_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(4, log_every=2, clock=lambda: 0.0)
    caplog.set_level("INFO")
    for step, (tokens, seconds) in enumerate([(100, 1.0), (100, 4.0), (100, 5.0), (300, 5.0)], 1):
        progress.update({"step": step, "tokens_per_second": tokens / seconds, "step_seconds": seconds})
    speeds = [record.getMessage().split("  ")[1] for record in caplog.records]
    assert speeds == ["100 tokens/s", "25 tokens/s", "40 tokens/s"]
