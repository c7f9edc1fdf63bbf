"""Norm removal by the trainer, beside a plain loop of the published algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import runs
from harness.checkpoint import CheckpointStore
from harness.config import ConfigError
from harness.model import norm_sites
from harness.normfree.schedule import fixed_events
from harness.train import train
from tests.normfree.independent_loop import independent_loop
from tests.normfree.small_removal import small_removal


def removal_state(folder: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = CheckpointStore(folder / "checkpoints").read_state(step)["callbacks"]["norm_removal"]
    return state


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("gpt2", {"ramp_steps": 3, "auxiliary": {"weight": 0.5, "relative": True}}),
        ("llama", {"ramp_steps": 2, "average_steps": 1}),
    ],
)
def test_every_step_is_that_of_the_published_algorithm(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    steps = 14 + options.get("ramp_steps", 1)
    settings = small_removal(tmp_path, family, norm_removal=options, train={"steps": steps})
    result = train(settings)
    metrics = runs.read(result.folder).metrics
    sites = norm_sites(settings.model)
    events = {event.site: event.step for event in fixed_events(sites, settings.norm_removal, steps)}
    assert len(events) == (7 if family == "gpt2" else 11)
    trace = independent_loop(settings, events)
    state = removal_state(result.folder, steps)
    for record, loss, norm in zip(metrics, trace.losses, trace.norms, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=2e-5), record["step"]
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-4), record["step"]
    assert {site: value["alpha"] for site, value in state["sites"].items()} == dict.fromkeys(events, 1.0)
    for site, sigma in trace.frozen.items():
        assert state["sites"][site]["sigma"] == pytest.approx(sigma, rel=2e-5), site
    gone = [event for event in runs.read(result.folder).events if event["event"] == "norm_removed"]
    assert {event["site"]: event["step"] for event in gone} == events
    assert [record["norm_sites_left"] for record in metrics][-1] == 0


@pytest.mark.parametrize("control", ["plain", "aux"])
def test_a_control_removes_nothing(tmp_path: Path, control: str) -> None:
    settings = small_removal(tmp_path, norm_removal={"control": control})
    result = train(settings)
    assert {value["alpha"] for value in removal_state(result.folder, 14)["sites"].values()} == {0.0}
    plain = small_removal(tmp_path, norm_removal={"enabled": False}, run={"name": "without"})
    without = [record["loss"] for record in runs.read(train(plain).folder).metrics]
    losses = [record["loss"] for record in runs.read(result.folder).metrics]
    # The same kernels in the same order; the auxiliary loss begins to act after the second step.
    assert (losses == without) is (control == "plain")
    assert losses[:2] == without[:2]


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
def test_killed_at_any_event_it_goes_on_bit_for_bit(tmp_path: Path, schedule: str) -> None:
    """After any step the process could have died: what goes on from that step's checkpoint is the run itself. The steps
    here lie before, at and after events, and within ramps."""
    options: dict[str, Any] = {"schedule": schedule, "ramp_steps": 2}
    adaptive = {"start": 3, "gap": 2, "tolerance": 9.0, "patience": 4}
    settings = small_removal(tmp_path, norm_removal={**options, "adaptive": adaptive}, train={"steps": 18})
    whole = train(settings).folder
    records = {record["step"]: record for record in runs.read(whole).metrics}
    last = CheckpointStore(whole / "checkpoints")
    for cut in range(2, 18, 2 if schedule == "fixed" else 4):
        folder = tmp_path / f"cut-{cut}"
        copy_until(whole, folder / "small", cut)
        again = settings.model_copy(update={"run": settings.run.model_copy(update={"folder": str(folder)})})
        result = train(again)
        for record in runs.read(result.folder).metrics:
            for column in ("loss", "grad_norm", "norm_sites_left", "final_sigma", "sigma_spread"):
                assert record.get(column) == records[record["step"]].get(column), (cut, record["step"], column)
        assert removal_state(result.folder, 18) == removal_state(whole, 18), cut
        mine = CheckpointStore(result.folder / "checkpoints")
        assert digests(mine, 18) == digests(last, 18), cut


def copy_until(run: Path, folder: Path, step: int) -> None:
    """The run as a kill right after the save of `step` would have left it."""
    import shutil

    shutil.copytree(run, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08}" and checkpoint.name.startswith("step-"):
            shutil.rmtree(checkpoint)


def digests(store: CheckpointStore, step: int) -> dict[str, str]:
    """Of the tensors, not of the state, which has times in it."""
    manifest = json.loads((store.folder_of(step) / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


def test_a_schedule_beyond_the_last_step_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    settings = small_removal(tmp_path, train={"steps": 11})
    with pytest.raises(ConfigError, match=r"times: final would be gone at step 12, after the last one"):
        train(settings)
