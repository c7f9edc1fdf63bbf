"""Forecasts beside the loop: columns, the band that is kept, events, and state that comes back to the last bit."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from harness.config import HarnessError
from tests.forecast.made import STEPS, View, losses, made, write_prior

COLUMNS = ["forecast_final", "forecast_low", "forecast_high", "forecast_band_low", "forecast_band_high"]


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    return write_prior(tmp_path / "prior.json")


def test_columns_come_from_a_share_on_and_cover_the_end(prior: Path) -> None:
    values, view = losses(np.random.default_rng()), View()
    truth = losses(np.random.default_rng(), noise=0.0)
    records = view.feed(made(prior), values)
    due = [record["step"] for record in records if "forecast_final" in record]
    assert due == list(range(400, STEPS + 1, 100))
    for record in records:
        assert [name for name in record if name.startswith("forecast")] in ([], COLUMNS)
    first, last = records[399], records[-1]
    assert first["forecast_low"] < truth[-1] < first["forecast_high"]
    assert first["forecast_final"] == pytest.approx(truth[-1], rel=0.02)
    assert last["forecast_final"] == pytest.approx(truth[-1], rel=5e-3)
    assert last["forecast_high"] - last["forecast_low"] < first["forecast_high"] - first["forecast_low"]
    assert last["forecast_band_low"] < truth[-1] < last["forecast_band_high"]
    assert [(event["event"], event["step"], event["of"]) for event in view.events] == [("forecast", 400, "training")]


def test_a_run_that_leaves_its_band_is_an_event_and_so_is_its_return(prior: Path) -> None:
    values, view = losses(np.random.default_rng(1)), View()
    values[1000:1400] += 0.3
    records = view.feed(made(prior), values)
    events = [(event["event"], event["step"]) for event in view.events]
    assert events == [("forecast", 400), ("left_forecast", 1200), ("back_in_forecast", 1500)]
    left = view.events[1]
    assert left["deviations"] > 2
    assert left["forecast_at"] == 400
    assert left["loss"] == pytest.approx(values[1100:1200].mean())
    assert left["band"][0] < left["expected"] < left["band"][1] < left["loss"]
    band = [record["forecast_band_high"] for record in records if "forecast_band_high" in record]
    calm = View().feed(made(prior), np.concatenate([values[:1000], values[1000:] * 1.0]))
    assert band == [record["forecast_band_high"] for record in calm if "forecast_band_high" in record]
    assert band[-1] == records[-1]["forecast_band_high"], "the band was made at step 400 and does not follow the run"


def test_a_run_that_learns_faster_leaves_below(prior: Path) -> None:
    values, view = losses(np.random.default_rng(2)), View()
    values[800:] -= 0.3
    view.feed(made(prior), values)
    assert view.events[1]["event"] == "left_forecast"
    assert view.events[1]["deviations"] < -2


def test_noise_is_no_departure(prior: Path) -> None:
    """Of runs as the prior describes them, and with its very law, none is an alarm."""
    for seed in range(5):
        view = View()
        view.feed(made(prior), losses(np.random.default_rng(100 + seed), noise=0.03))
        assert len(view.events) == 1


@pytest.mark.parametrize("stop", [3, 399, 400, 777, 1100, 1999])
def test_state_goes_through_json_and_changes_nothing(prior: Path, stop: int) -> None:
    values, whole_view = losses(np.random.default_rng(3)), View()
    values[1000:] += 0.2
    whole = whole_view.feed(made(prior), values)
    before, after, first, second = made(prior), made(prior), View(), View()
    records = first.feed(before, values[:stop])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    records += second.feed(after, values[stop:], first=stop + 1)
    assert records == whole
    assert first.events + second.events == whole_view.events


def test_after_a_roll_back_nothing_is_left_of_what_came_later(prior: Path) -> None:
    values = losses(np.random.default_rng(4))
    callback, view = made(prior), View()
    view.feed(callback, values[:350])
    saved = json.loads(json.dumps(callback.state_dict()))
    view.feed(callback, values[350:1200] + 1.0, first=351)
    assert "left_forecast" not in {event["event"] for event in view.events[:1]}
    callback.load_state_dict(saved)
    again, fresh = View(), View()
    records = again.feed(callback, values[350:], first=351)
    assert records == fresh.feed(made(prior), values)[350:]
    assert again.events == fresh.events


def test_a_checkpoint_without_a_forecast_begins_one(prior: Path) -> None:
    values, callback, view = losses(np.random.default_rng(5)), made(prior), View()
    view.feed(callback, values[:700] + 1)
    callback.load_state_dict({})
    assert callback.state_dict() == made(prior).state_dict()
    records = view.feed(callback, values[600:], first=601)
    assert "forecast_final" in records[-1]


def test_a_step_that_is_done_again_counts_once(prior: Path) -> None:
    values = losses(np.random.default_rng(6))[:500]
    callback, other = made(prior), made(prior)
    View().feed(callback, values)
    View().feed(other, values)
    again = View()
    again.feed(other, values[-1:], first=500)
    assert other.state_dict() == callback.state_dict()


def test_losses_that_are_none_are_left_out(prior: Path) -> None:
    values, view = losses(np.random.default_rng(7)), View()
    values[[100, 500, 1300]] = math.nan
    values[700] = 50.0
    records = view.feed(made(prior), values, skipped={701: 1})
    assert all(math.isfinite(record["forecast_final"]) for record in records if "forecast_final" in record)
    assert len(view.events) == 1


def test_validation_losses_are_taken_where_there_are_enough(prior: Path) -> None:
    values, view = losses(np.random.default_rng(8)), View()
    validation = {step: float(values[step - 1] + 0.1) for step in range(20, STEPS + 1, 20)}
    records = view.feed(made(prior), values, validation_loss=validation)
    assert view.events[0]["of"] == "validation"
    assert records[-1]["forecast_final"] == pytest.approx(losses(np.random.default_rng(), 0.0)[-1] + 0.1, rel=0.01)
    few, view = {step: loss for step, loss in validation.items() if step % 100 == 0}, View()
    view.feed(made(prior), values, validation_loss=few)
    assert view.events[0]["of"] == "training"
    view = View()
    view.feed(made(prior, loss="validation", from_share=0.5), values, validation_loss=few)
    assert (view.events[0]["of"], view.events[0]["step"]) == ("validation", 1000)


def test_other_ranks_collect_and_are_silent(prior: Path) -> None:
    values, view = losses(np.random.default_rng(9))[:600], View()
    callback, first = made(prior, rank=1), made(prior)
    records = view.feed(callback, values)
    View().feed(first, values)
    assert not view.events
    assert not any("forecast_final" in record for record in records)
    assert callback.state_dict()["history"] == first.state_dict()["history"]


def test_another_length_makes_a_new_band(prior: Path) -> None:
    values, view = losses(np.random.default_rng(10)), View()
    callback = made(prior)
    view.feed(callback, values[:600])
    longer = made(prior, steps=3 * STEPS)
    longer.load_state_dict(callback.state_dict())
    assert longer.state_dict()["band"] is None
    assert longer.state_dict()["history"] == callback.state_dict()["history"]
    same = made(prior)
    same.load_state_dict(callback.state_dict())
    assert same.state_dict() == callback.state_dict()


def test_a_prior_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no prior to read"):
        made(tmp_path / "absent.json")


def test_too_few_losses_are_a_warning(prior: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = losses(np.random.default_rng(11))
    values[:] = math.nan
    records = View().feed(made(prior), values)
    assert "forecast_final" not in records[-1]
    assert caplog.text.count("no forecast") == 1


def test_it_costs_little(prior: Path) -> None:
    """CPU time a step, of 100 steps with one forecast: under a millisecond; steps that train take a hundred."""
    values, view, callback = losses(np.random.default_rng(12)), View(), made(prior)
    view.feed(callback, values[:1500])
    started = time.process_time()
    view.feed(callback, values[1500:], first=1501)
    assert (time.process_time() - started) / 500 < 1e-3
