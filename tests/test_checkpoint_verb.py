"""`harness checkpoint`: what it takes for a target, what it answers, and its exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.checkpoint import CheckpointStore
from harness.cli import CHECKPOINT_ACTIONS, load_settings, main
from harness.config import dump_yaml
from harness.parallel import Fragment


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at rest with the steps 100, 200 and 300."""
    folder = tmp_path / "runs" / "mine"
    store = CheckpointStore(folder / "checkpoints")
    for step in (100, 200, 300):
        fragment = Fragment.whole("w", "master", torch.full((5,), float(step)))
        store.save(step, [fragment], {"validation_loss": step / 100})
    settings = load_settings("quickstart", [f"run.folder={tmp_path / 'runs'}", "run.name=mine"])
    (folder / "config.yaml").write_text(dump_yaml(settings))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["checkpoint", *arguments]) == status
    return capsys.readouterr().out


def test_every_kind_of_target(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = run / "checkpoints" / "step-00000200"
    here = [f"run.folder={run.parent}", "run.name=mine"]
    for target in ([str(run)], [str(run) + "/"], [str(run / "checkpoints")], [str(one)], ["quickstart", *here]):
        assert answer(capsys, "path", *target) == f"{run}\n"
        assert answer(capsys, "latest", *target) == "300\n"
        assert len(answer(capsys, "list", *target).splitlines()) == 4
        steps = [200] if str(one) in target else [100, 200, 300]
        lines = answer(capsys, "verify", *target).splitlines()
        assert [line.partition(":")[0] for line in lines] == [f"step {step}" for step in steps]
        shown = json.loads(answer(capsys, "show", *target, "--json"))
        assert shown["step"] == steps[-1]
        assert json.loads(answer(capsys, "show", "--step", "100", *target, "--json"))["step"] == 100
    for place, target in (
        (run, "."),
        (one, "."),
        (one, ".."),
        (run / "checkpoints", one.name),
        (run.parent, "mine"),
    ):
        monkeypatch.chdir(place)
        assert answer(capsys, "path", target) == f"{run}\n"
    (run / "config.yaml").unlink()  # looking needs no configuration, and none that this version understands
    assert answer(capsys, "latest", str(run)) == "300\n"


def test_before_there_is_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a job script asks ahead of its first start."""
    target = ("quickstart", f"run.folder={tmp_path / 'runs'}")
    assert answer(capsys, "latest", *target) == "\n"
    assert answer(capsys, "path", *target) == f"{tmp_path}/runs/quickstart\n"
    assert answer(capsys, "list", *target, "--json") == "[]\n"
    assert not (tmp_path / "runs").exists()
    for action, line in (("show", "no good checkpoint"), ("verify", "no checkpoints"), ("prune", "no such folder")):
        assert main(["checkpoint", action, *target]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(f"harness checkpoint: error: {tmp_path}/runs/quickstart/checkpoints: {line}")
    assert not (tmp_path / "runs").exists()


def test_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step-00000300" / "tensors-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    lines = answer(capsys, "verify", str(run), status=1).splitlines()
    assert lines[2:] == ["step 300: damaged", f"  {path}: digest differs from the manifest: the file is damaged"]
    assert answer(capsys, "verify", str(run), "--step", "200").startswith("step 200: whole")
    assert answer(capsys, "verify", str(path.parent), status=1)
    path.unlink()
    command = [sys.executable, "-m", "harness", "checkpoint", "latest", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "200\n"
    assert result.stderr.startswith(f"checkpoint of step 300 is passed over: {path}: cannot be read")
    assert f"{path}: cannot be read" in answer(capsys, "list", str(run))
    assert main(["checkpoint", "show", str(path.parent)]) == 2
    assert "; use an earlier step: 200" in capsys.readouterr().err


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options may stand before and behind overrides; a run that writes there is left alone."""
    before = sorted(path.name for path in run.iterdir())
    for arguments in (["--dry-run", "checkpoint.keep_last=1"], ["checkpoint.keep_last=1", "--dry-run"]):
        lines = answer(capsys, "prune", str(run), *arguments).splitlines()
        assert lines[:2] == ["step 100: would be deleted", "step 200: would be deleted"]
        assert lines[2] == "step 300: kept: of the newest 1"
    assert sorted(path.name for path in run.iterdir()) == before
    program = f"from harness.runs import RunFolder; run = RunFolder({str(run)!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writing:
        assert writing.stdout is not None
        writing.stdout.readline()
        assert main(["checkpoint", "prune", str(run), "checkpoint.keep_last=1"]) == 2
        assert f"{run}: another process is writing into this run (process {writing.pid}" in capsys.readouterr().err
        answer(capsys, "prune", str(run), "--dry-run")  # looks only
        writing.communicate("\n")
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")
    assert answer(capsys, "prune", str(run), *kept).splitlines() == [
        "step 100: kept: validation loss 1.0000, of the best 1",
        "step 200: deleted",
        "step 300: kept: of the newest 1",
    ]
    assert answer(capsys, "prune", str(run / "checkpoints"), "checkpoint.keep_last=1")
    assert CheckpointStore(run / "checkpoints").steps() == [300]


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusals = [
        (("list", str(tmp_path)), f"{tmp_path}: a folder without config.yaml; give a YAML file or a run folder"),
        (("list", str(run / "gone")), f"{run}/gone: no such file"),
        (("list", str(run), "checkpoint.keep_lsat=1"), "command line: checkpoint.keep_lsat: unknown key; did you"),
        (("prune", str(run), "checkpoint.keep_last=0"), "command line: checkpoint.keep_last: input should be"),
        (("verify", str(run), "--step", "250"), f"{run}/checkpoints: has no step 250; steps there: 100, 200, 300"),
        (("show", str(run / "checkpoints/step-00000300"), "--step", "250"), f"{run}/checkpoints: has no step 250"),
    ]  # fmt: skip
    for arguments, line in refusals:
        assert main(["checkpoint", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith(f"harness checkpoint: error: {line}")
    for arguments in (
        (),
        ("tidy", str(run)),
        ("list",),
        ("list", str(run), "--step", "3"),
        ("path", str(run), "--x"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["checkpoint", *arguments])
        assert caught.value.code == 2
        assert "usage: harness" in capsys.readouterr().err


def test_help_names_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "--help"])
    text = capsys.readouterr().out
    assert all(f"    {action} " in text for action in CHECKPOINT_ACTIONS)
