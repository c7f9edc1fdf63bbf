"""The forecast's contract, on published curves: from a fifth of a run, under schedules that the prior has not seen."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("HARNESS_TEST_DATA", "absent"), "scaling", "thu-yao-01-luo_MultiPowerLaw/loss_curve_repo")
CONTRACT = ("cosine_24000", "wsd_20000_24000", "wsdld_20000_24000")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="HARNESS_TEST_DATA names no folder with scaling data")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    tool = runpy.run_path(str(ROOT / "tools" / "bench_forecast.py"))
    result: dict[str, Any] = tool["measure"](FOLDER / "csv_25")
    return result


@pytest.mark.parametrize("name", CONTRACT)
def test_the_final_loss_is_nearer_than_by_simpler_ways(measured: dict[str, Any], name: str) -> None:
    errors = {way: abs(error) for way, error in measured["curves"][name]["final_error"].items()}
    assert errors["forecast"] < errors["power_law"]
    assert errors["forecast"] < errors["last_value"]
    assert errors["forecast"] < 0.02, "nats"


@pytest.mark.parametrize("name", [*CONTRACT, "constant_72000", "cosine_72000"])
def test_the_band_covers_nine_in_ten_and_is_no_barn_door(measured: dict[str, Any], name: str) -> None:
    row = measured["curves"][name]
    assert row["covered"] >= 0.9
    assert row["final_interval"][0] <= row["final"] <= row["final_interval"][1]
    assert row["mean_width"] < 0.3 * abs(row["final_error"]["last_value"]), "a small part of the fall that is to come"


def test_it_was_not_luck(measured: dict[str, Any]) -> None:
    """Other priors, of one annealed curve with and without a constant one: as a whole the band is what it says."""
    others = measured["other_priors"]
    assert others["forecasts"] > 60
    assert others["mean_covered"] >= 0.9
    assert others["finals_inside"] >= 0.9
    assert others["better_than_simpler"] > 0.9


def test_the_committed_figures_are_these(measured: dict[str, Any]) -> None:
    committed = json.loads((ROOT / "benchmarks" / "forecast_25m.json").read_text())
    np.testing.assert_allclose(committed["prior"]["mean"], measured["prior"]["mean"], rtol=1e-3)
    for name, row in measured["curves"].items():
        before = committed["curves"][name]
        assert before["covered"] == pytest.approx(row["covered"], abs=0.01)
        for way, error in row["final_error"].items():
            assert before["final_error"][way] == pytest.approx(error, abs=1e-3), (name, way)
