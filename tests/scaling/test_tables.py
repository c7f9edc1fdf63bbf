"""Data of all kinds as columns, formulas of columns, and what is told of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness import runs
from harness.config import HarnessError
from harness.scaling import check_repeated, read_tables
from harness.scaling.formula import evaluate
from harness.train import train
from tests.small_run import small_settings


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_csv_and_jsonl_are_the_same_table(tmp_path: Path) -> None:
    first = written(tmp_path, "a.csv", "\ufeffModel Size,loss,who\n1e6,3.5,x\n2000000,3.25,y\n")
    lines = [{"Model Size": 1e6, "loss": 3.5, "who": "x"}, {"Model Size": 2000000, "loss": 3.25, "who": "y"}]
    second = written(tmp_path, "b.jsonl", "".join(json.dumps(line) + "\n\n" for line in lines))
    one, other = read_tables([first]), read_tables([second])
    for table in (one, other):
        np.testing.assert_array_equal(table.columns["Model Size"], [1e6, 2e6])
        np.testing.assert_array_equal(table.columns["loss"], [3.5, 3.25])
        assert table.texts["who"] == ["x", "y"]
    assert len(read_tables([first, second])) == 4


def test_formulas_are_those_of_numpy() -> None:
    generator = np.random.default_rng()
    columns = {name: generator.uniform(1, 5, size=7) for name in ("N", "Training FLOP", "d_2")}
    n, flop, d = columns.values()
    cases = {
        "N": n,
        "Training FLOP": flop,
        "{Training FLOP} / (6 * N)": flop / (6 * n),
        "-N + 2**d_2 - 1e-1": -n + 2**d - 0.1,
        "3": np.full((), 3.0),
    }
    for text, expected in cases.items():
        np.testing.assert_allclose(evaluate(text, columns), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("M * 2", "there is no column 'M'; columns: N, loss"),
        ("{M x} * 2", "there is no column 'M x'"),
        ("N *", "is neither a column nor a formula"),
        ("__import__('os')", "only numbers, columns"),
        ("N.real", "only numbers, columns"),
        ("N if loss else 2", "only numbers, columns"),
        ("'a' * 10", "only numbers, columns"),
    ],
)
def test_other_formulas_are_refused(text: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message.replace("(", r"\(").replace("*", r"\*")):
        evaluate(text, {"N": np.ones(2), "loss": np.ones(2)})


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    good = written(tmp_path, "good.csv", "N,loss\n1,2\n2,1\n")
    cases = {
        written(tmp_path, "empty.csv", ""): "has no rows",
        written(tmp_path, "head.csv", "N,loss\n"): "has no rows",
        written(tmp_path, "short.csv", "N,loss\n1\n"): "row 1: has not as many values",
        written(tmp_path, "long.csv", "N,loss\n1,2,3\n"): "row 1: has not as many values",
        written(tmp_path, "twice.csv", "N,N\n1,2\n"): "two columns of one name",
        written(tmp_path, "bad.jsonl", '{"N": 1}\n[1]\n'): "line 2: is no JSON object",
        written(tmp_path, "what.txt", "1"): "should end in .csv or .jsonl",
        tmp_path / "absent.csv": "No such file",
        tmp_path: "is not a run folder",
    }
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    cases[tmp_path / "bytes.csv"] = "is not UTF-8 text"
    for path, message in cases.items():
        with pytest.raises(HarnessError, match=message) as caught:
            read_tables([path])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(HarnessError, match=r"good.csv: is given twice"):
        read_tables([good, tmp_path / "." / "good.csv"])


def test_bad_rows_are_named(tmp_path: Path) -> None:
    table = read_tables([written(tmp_path, "a.csv", "N,loss\n1,2\n2,nan\n3,what\n")])
    with pytest.raises(HarnessError, match=r"a.csv: row 2: loss is 'nan', should be a finite number"):
        table.choose({}, ("N", "loss"))
    with pytest.raises(HarnessError, match=r"a.csv: has no column 'tokens'; columns: N, loss"):
        table.choose({}, ("N", "tokens"))
    with pytest.raises(HarnessError, match=r"a.csv: row 2: y is .*nan"):
        table.choose({"y": "loss * 2"}, ("y",))


def test_a_run_that_counts_twice_is_refused(tmp_path: Path) -> None:
    table = read_tables([written(tmp_path, "a.csv", "N,loss,seed\n1,2,0\n2,1,0\n1,2,1\n")])
    columns = table.choose({}, ("N", "loss"))
    with pytest.raises(HarnessError, match=r"a.csv: row 3: is the same as .*a.csv: row 1 in N, loss"):
        check_repeated(table, columns)
    check_repeated(table, table.choose({}, ("N", "loss", "seed")))


def test_run_folders_say_what_was_counted(tmp_path: Path) -> None:
    folders = []
    for width in (16, 32):
        model = {"family": "llama", "layers": 1, "hidden_size": width, "heads": 2, "tied_head": False}
        settings = small_settings(
            tmp_path, run={"name": f"width-{width}"}, model=model, train={"steps": 8}, validation={"enabled": False}
        )
        folders.append(train(settings).folder)
    expected = [runs.read(folder) for folder in folders]
    for count, name in (("all", "total"), ("non-embedding", "blocks")):
        table = read_tables(folders, count)
        assert table.columns["parameters"].tolist() == [run.environment["parameters"][name] for run in expected]
        assert any(count in note for note in table.notes)
    table = read_tables(folders, "without-head")
    counts = [run.environment["parameters"] for run in expected]
    assert table.columns["parameters"].tolist() == [each["total"] - each["head"] for each in counts]
    assert table.columns["tokens"].tolist() == [run.metrics[-1]["tokens_seen"] for run in expected]
    np.testing.assert_allclose(
        table.columns["flops"],
        [run.environment["model_flops_per_token"] * run.metrics[-1]["tokens_seen"] for run in expected],
    )
    assert table.columns["loss"].tolist() == [run.metrics[-1]["loss"] for run in expected]
    assert any("mean training loss" in note for note in table.notes)
    with pytest.raises(HarnessError, match="is no run folder like"):
        read_tables([folders[0], written(tmp_path, "a.csv", "N\n1\n")])


def test_a_run_still_going_counts_to_its_last_validation(tmp_path: Path) -> None:
    settings = small_settings(
        tmp_path,
        run={"name": "going"},
        train={"steps": 8},
        validation={"every_steps": 3, "samples": 8, "batch_size": 2},
    )
    folder = train(settings).folder
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n")
    row = json.loads(lines[5])
    table = read_tables([folder])
    assert table.columns["loss"].tolist() == [row["validation_loss"]]
    assert table.columns["tokens"].tolist() == [row["tokens_seen"]]
    assert "loss: last validation" in table.notes
