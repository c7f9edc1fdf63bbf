"""Reading a run: what is not there, and what is not a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.runs import RunError, RunFolder, read


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing: is not a run folder, it has no config.yaml; there is no run in"):
        read(tmp_path / "nothing")
    with RunFolder(tmp_path / "beta") as run:
        run.begin("a: 1")
    with pytest.raises(RunError, match=r"betb.*; runs in .*: beta"):
        read(tmp_path / "betb")
    (tmp_path / "beta" / "config.yaml").write_text("a: [1\n")
    with pytest.raises(RunError, match=r"beta/config.yaml: cannot be read: .*line 2"):
        read(tmp_path / "beta")


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    run = read(tmp_path)
    assert (run.config, run.environment, run.metrics, run.events) == ({}, {}, [], [])
    assert run.steps.shape == run.column("loss").shape == (0,)
    assert run.steps.dtype == np.int64


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.begin("a: 1")
        run.log_metrics(1, {"loss": 1.0, "grad_norm": 2.0})
    result = read(tmp_path)
    assert result.columns == ["step", "loss", "grad_norm"]
    with pytest.raises(RunError, match=r"no record has 'gradnorm'; did you mean grad_norm\?"):
        result.column("gradnorm")
    with pytest.raises(RunError, match="no record has 'x'; there are step, loss, grad_norm"):
        result.column("x")
