"""The report of a run: its numbers are the run's, its figures are drawn by a browser."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest

from harness import cli, runs
from harness.config import HarnessError
from harness.run_report import _between, curve, page_of, run_curve, write_run_report
from harness.scaling import annealing_areas
from harness.train import train
from tests.report.browser import open_page
from tests.small_run import small_settings


def text_of(page: str) -> str:
    without_scripts = re.sub(r"(?s)<script.*?</script>", "", page)
    return html.unescape(re.sub(r"<[^>]+>", " ", without_scripts))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    settings = small_settings(
        folder,
        run={"name": "a <b> & c"},
        train={"steps": 60},
        schedule={"kind": "wsd", "warmup_steps": 5},
        validation={"every_steps": 20, "samples": 8, "batch_size": 2},
    )
    return train(settings).folder


def test_the_page_has_what_the_run_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == run / "report.html"
    log = runs.read(run)
    opened = open_page(written)
    assert opened.drawn == opened.plots >= 6
    assert opened.console == []
    text = text_of(written.read_text())
    assert "Run a <b> & c" in text
    assert "Step 60 of 60." in text
    assert f"{log.metrics[-1]['validation_loss']:.4g}" in text
    assert "L(s) = L0 + A S1^-alpha - C S2" in text
    assert "global_batch_size" in text
    assert "saved" in text


def test_long_curves_keep_their_extremes(run: Path) -> None:
    log = runs.read(run)
    generator = np.random.default_rng()
    losses = generator.random(1713)
    long = runs.Run(run, log.config, log.environment, [{"step": i + 1, "loss": x} for i, x in enumerate(losses)], [])
    drawn = curve(long, "loss", "loss")
    assert len(drawn.x) == 400
    assert drawn.lower is not None
    assert drawn.upper is not None
    assert min(x for x in drawn.lower if x is not None) == losses.min()
    assert max(x for x in drawn.upper if x is not None) == losses.max()


def test_the_areas_count_from_the_first_step(run: Path) -> None:
    """Also those of the warm-up, whose losses are left out."""
    log = runs.read(run)
    points = run_curve(log)
    s1, s2 = annealing_areas(log.column("learning_rate"))
    means = [np.interp(points["step"], log.steps, area) for area in (s1, s2)]
    assert points["step"][0] > 5
    np.testing.assert_allclose(points["s1"], means[0], rtol=1e-2)
    np.testing.assert_allclose(points["s2"], means[1], atol=2e-4)


def test_too_little_says_so(run: Path, tmp_path: Path) -> None:
    log = runs.read(run)
    short = runs.Run(run, log.config, log.environment, log.metrics[:20], [])
    assert "a curve needs 40" in text_of(page_of(short).html())
    holed = runs.Run(run, log.config, log.environment, log.metrics[10:], [])
    assert "steps are missing in the record" in text_of(page_of(holed).html())
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(HarnessError, match="no step is recorded yet"):
        write_run_report(tmp_path)
    with pytest.raises(HarnessError, match="is not a run folder"):
        write_run_report(tmp_path / "absent")


def test_a_run_that_was_never_read_by_these_settings_still_has_a_page(run: Path) -> None:
    log = runs.read(run)
    foreign = runs.Run(run, {**log.config, "unknown": 1}, log.environment, log.metrics, log.events)
    assert "global_batch_size" in text_of(page_of(foreign).html())


def test_forecasts_are_drawn(run: Path) -> None:
    log = runs.read(run)
    ends = {"forecast_final": 2.0, "forecast_low": 1.9, "forecast_high": 2.25}
    band = {"forecast_band_low": 2.5, "forecast_band_high": 2.75}
    metrics = [{**record, **(ends | band if record["step"] % 10 == 0 else {})} for record in log.metrics]
    drawn = runs.Run(run, log.config, log.environment, metrics, log.events)
    final = _between(drawn, "final", "forecast_final", "forecast")
    kept = _between(drawn, "band", None, "forecast_band")
    assert list(final.x) == list(kept.x) == [10, 20, 30, 40, 50, 60]
    assert (final.y[0], final.lower, final.upper) == (2.0, [1.9] * 6, [2.25] * 6)
    assert (kept.y[0], kept.lower, kept.upper) == (2.625, [2.5] * 6, [2.75] * 6)
    assert "Forecasts, with 95 % intervals." in text_of(page_of(drawn).html())
    assert "Forecasts" not in text_of(page_of(log).html())
