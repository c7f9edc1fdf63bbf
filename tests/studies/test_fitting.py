"""`harness study fit` from the command line: the published fits, made-up data, pages, and bad data."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import cli
from harness.scaling import LAWS
from tests.report.browser import open_page

DATA = Path(os.environ.get("HARNESS_TEST_DATA", "")) / "scaling"
real_data = pytest.mark.skipif(
    "HARNESS_TEST_DATA" not in os.environ or not DATA.is_dir(),
    reason="HARNESS_TEST_DATA names no folder with scaling data",
)
TRUE = np.array([480.0, 2100.0, 1.8, 0.35, 0.37])


def rows(noise: float = 2e-3, size: int = 5) -> list[dict[str, Any]]:
    sizes, ratios = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, size), [5.0, 20.0, 80.0, 320.0]))
    law = LAWS["chinchilla"]
    loss = law.predict(law.coordinates(TRUE), {"parameters": sizes, "tokens": sizes * ratios})
    loss = loss * np.exp(noise * np.random.default_rng().standard_normal(len(loss)))
    return [
        {"Size": n, "FLOP": 6 * n * n * r, "loss": x, "run": f"r{i}"}
        for i, (n, r, x) in enumerate(zip(sizes, ratios, loss, strict=True))
    ]


def write(folder: Path, data: list[dict[str, Any]], name: str = "data.csv") -> Path:
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, data[0])
        writer.writeheader()
        writer.writerows(data)
    return path


COLUMNS = ("--column", "parameters=Size", "--column", "tokens=FLOP / (6 * Size)")


def fit(*arguments: str | Path) -> int:
    return cli.main(["study", "fit", *map(str, arguments)])


def test_a_file_is_fitted_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, rows())
    out = tmp_path / "out"
    assert (
        fit("chinchilla", path, *COLUMNS, "--group", "run", "--resamples", "150", "--flops", "1e20", "--out", out) == 0
    )
    said = capsys.readouterr().out
    found = json.loads((out / "fit.json").read_text())
    for name, value in found["parameters"].items():
        assert f"{name} = {value:.6g}" in said
    assert found["converged"]
    low, high = found["intervals"]["E"]
    assert low - 0.02 < TRUE[2] < high + 0.02
    held = found["held_out"]
    assert held["points"] == 4
    assert held["fitted_on"] == 16
    assert held["root_mean_square_error"] < 0.05
    assert f"held out, the largest size ({held['size']:.4g}), 4 points" in said
    assert "tokens is FLOP / (6 * Size)" in said
    assert "1e+20 FLOPs: N = " in said
    opened = open_page(out / "fit.html")
    assert opened.console == []
    assert opened.drawn == opened.plots == 5


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [{"N": n, "loss": 1.5 + (1e6 / n) ** 0.3} for n in np.geomspace(1e5, 1e9, 12)])
    assert fit("power", path, "--column", "x=N", "--json", "--resamples", "20") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == pytest.approx({"E": 1.5, "x0": 1e6, "alpha": 0.3}, rel=1e-3)


def test_isoflop_has_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [
        {"parameters": 0.1 * c**0.5 * f, "flops": c, "loss": 2 + 30 / c**0.05 + 0.08 * np.log(f) ** 2}
        for c in (1e18, 1e19, 1e20)
        for f in (0.3, 0.6, 1.1, 1.9, 3.0)
    ]
    assert fit("isoflop", write(tmp_path, data), "--out", tmp_path / "out", "--resamples", "20") == 0
    assert "a = 0.5 " in capsys.readouterr().out
    opened = open_page(tmp_path / "out" / "fit.html")
    assert opened.console == []
    assert opened.drawn == opened.plots == 2


def test_annealing_takes_areas_of_each_curve_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.scaling import annealing_areas

    paths = []
    every = np.arange(1, 4001)
    for name, rates in (
        ("cosine", 1.5e-4 * (1 + np.cos(np.pi * every / 4000))),
        ("constant", np.full(4000, 3e-4)),
        ("falls", np.where(every < 2000, 3e-4, 1e-4)),
    ):
        s1, s2 = annealing_areas(rates)
        at = np.arange(100, 4001, 50)
        loss = 2.6 + 0.45 * s1[at - 1] ** -0.5 - 0.4 * s2[at - 1]
        data = [{"step": s, "lr": rates[s - 1], "loss": x} for s, x in zip(at.tolist(), loss, strict=True)]
        paths.append(write(tmp_path, data, f"{name}.csv"))
    assert fit("annealing", *paths, "--json", "--resamples", "20") == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    assert found == pytest.approx({"L0": 2.6, "A": 0.45, "C": 0.4, "alpha": 0.5}, rel=0.02)


def test_bad_data_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = rows()
    one_size = [row for row in good if row["Size"] == good[0]["Size"]]
    same_size = [{**row, "Size": 1e6, "FLOP": row["FLOP"]} for row in good]
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([{"N": row["Size"], "loss": row["loss"]} for row in good], "there is no column 'Size'; columns: N, loss"),
        ([*good[:3], {**good[3], "loss": "nan"}, *good[4:]], "row 4: loss is 'nan', should be a finite number"),
        (one_size, "4 points for the 5 parameters"),
        (same_size, "column parameters: all 20 rows have 1e+06; the law needs several"),
        ([*good, good[7]], "row 21: is the same as"),
        ([*good[:3], {**good[3], "loss": -2.0}, *good[4:]], "row 4 has -2; should be a positive number"),
    ]
    for data, message in cases:
        assert fit("chinchilla", write(tmp_path, data), *COLUMNS) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chinchila", "x.csv"], "'chinchila' is neither a law (power, chinchilla"),
        (["chinchilla"], "no data for the law chinchilla"),
        (["chinchilla", "absent.csv"], "absent.csv: No such file or directory"),
        (["power", "x.csv", "--flops", "1e20"], "--flops: the law power shares no compute"),
        (["isoflop", "x.csv", "--group", "run"], "--group: isoflop resamples by its own budgets"),
        (["chinchilla", "--given", "A=1"], "is missing; needs A, B, E"),
        (["power", "--given", "A=1"], "--given: is for the law chinchilla"),
        (["chinchilla", "--given", "A=406.4,B=410.7,E=1.69,alpha=0.34,beta=0.28"], "--given needs --flops"),
    ],
)
def test_bad_commands_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_rounded_parameters_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("chinchilla", "--given", "A=406.4,B=410.7,E=1.69,alpha=0.34,beta=0.28", "--flops", "5.88e23") == 0
    said = capsys.readouterr().out
    assert "D/N = 92.8" in said
    assert "warning: the parameters are rounded: at 5.88e+23 FLOPs they allow any D/N from 43.9 to 196" in said


@real_data
def test_published_fits_come_out_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    points = DATA / "epoch-research_analyzing-chinchilla" / "svg_extracted_data.csv"
    columns = ("--column", "parameters=Model Size", "--column", "tokens={Training FLOP} / (6 * {Model Size})")
    options = ("--drop-highest", "5", "--resamples", "50", "--json", "--flops", "5.88e23")
    assert fit("chinchilla", points, *columns, *options) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert found["parameters"] == pytest.approx(expected, rel=1e-4)
    assert found["objective"] <= 0.00101828
    assert found["allocations"][0]["ratio"] == pytest.approx(18, abs=0.5)
    assert found["with_what_was_dropped"]["parameters"]["beta"] == pytest.approx(0.453, abs=5e-3)
    folder = DATA / "thu-yao-01-luo_MultiPowerLaw" / "loss_curve_repo" / "csv_25"
    curves = [folder / f"{name}.csv" for name in ("cosine_24000", "constant_24000", "wsdcon_9")]
    assert fit("annealing", *curves, "--warmup", "2160,3e-4", "--json", "--resamples", "20") == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    assert found["L0"] == pytest.approx(3.0680, abs=2e-3)
    assert found["A"] == pytest.approx(0.4913, abs=5e-3)
    assert found["C"] == pytest.approx(0.3977, abs=5e-3)
    assert found["alpha"] == pytest.approx(0.5715, abs=2e-3)
