"""A job laid out on one process: places, shapes, errors, and nothing left behind."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from harness.cli import main
from harness.config import HarnessError
from harness.model import count_parameters
from harness.parallel import ParallelLayout
from harness.plan import DryRun, describe, lay_out
from harness.settings import Settings
from harness.train import train
from tests.plan.settings import settings_of


def dry_run_of(processes: int, rank: int, **sections: dict[str, Any]) -> DryRun:
    return lay_out(settings_of(dry_run={"processes": processes, "rank": rank}, **sections))


def big(rank: int, **dry_run: int) -> Settings:
    """llama-8b on 64 processes, 8 a machine."""
    return settings_of(
        data={"sequence_length": 4096},
        model={"shape": "llama-8b", "vocab_size": 128256},
        train={"global_batch_size": 512, "micro_batch_size": 2, "precision": "bf16"},
        parallel={"tensor": 8, "zero_stage": 3, "sequence_parallel": True},
        dry_run={"processes": 64, "rank": rank, "processes_per_machine": 8, **dry_run},
    )


def test_a_rank_of_many() -> None:
    run = lay_out(big(13))
    assert (run.tensor_rank, run.data_rank, run.data_size) == (5, 1, 8)
    assert run.tensor_ranks == list(range(8, 16))
    assert run.data_ranks == [5, 13, 21, 29, 37, 45, 53, 61]
    shapes = {shape.name: shape for shape in run.shapes}
    gate = shapes["layers.*.mlp.gate.weight"]
    assert (gate.local, gate.place.global_shape, gate.place.offsets, gate.count) == (
        (1792, 4096),
        (14336, 4096),
        (8960, 0),
        32,
    )
    output = shapes["layers.*.attention.output.weight"]
    assert (output.local, output.place.offsets) == ((4096, 512), (0, 2560))
    # 8 kv heads on 8 ranks: each has one group of 4 query heads, a key and a value head of width 128.
    assert shapes["layers.*.attention.qkv.weight"].local == (6 * 128, 4096)
    assert run.counts.total == 8_030_261_248  # as released
    assert run.micro_batches == 512 // (8 * 2)
    text = "\n".join(describe(run))
    assert "machine 1 of 8" in text
    assert "8 to 15" in text
    assert "crosses" not in text
    assert "2,097,152 tokens" in text
    assert not dist.is_initialized()


def test_a_group_over_two_machines_is_pointed_out() -> None:
    assert "crosses machines" in "\n".join(describe(lay_out(big(13, processes_per_machine=6))))


@pytest.mark.parametrize(
    ("tensor", "model"),
    [
        (2, {}),
        (2, {"family": "gpt2", "qk_norm": True, "vocab_multiple": 128}),
        (1, {"vocab_multiple": 64, "tied_head": True}),
        (4, {"shape": "gpt2-124m", "vocab_size": 50257}),
        (8, {"shape": "llama-1b", "vocab_size": 128256}),
    ],
)
def test_the_ranks_parts_make_the_model(tensor: int, model: dict[str, Any]) -> None:
    """Summed over tensor ranks, what is divided, and once what is not, is the closed-form count."""
    settings = settings_of(
        parallel={"tensor": tensor},
        model=model,
        dry_run={"processes": 2 * tensor},
    )
    total = 0
    for rank in range(tensor, 2 * tensor):
        run = lay_out(settings.model_copy(update={"dry_run": settings.dry_run.model_copy(update={"rank": rank})}))
        for shape in run.shapes:
            if shape.place.sharded or rank == tensor:
                total += shape.count * prod(shape.place.shape)
        weights = sum(part.elements for part in run.state if part.kind == "weights")
        assert weights == run.elements
        assert run.padding == run.elements - sum(shape.count * prod(shape.place.shape) for shape in run.shapes)
    assert total == count_parameters(lay_out(settings).work.model).total


def test_nothing_is_written_and_no_data_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(settings_of(run={"folder": str(tmp_path / "runs")}, parallel={"tensor": 2}))
    assert result.record is None
    assert list(tmp_path.iterdir()) == []
    assert "tensor rank 0 of 2" in capsys.readouterr().out


def test_bad_layouts_get_the_line_of_a_real_start(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(parallel={"tensor": 3})
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(HarnessError) as real:
        ParallelLayout(settings.parallel)
    with pytest.raises(HarnessError) as pretended:
        lay_out(settings)
    assert str(pretended.value) == str(real.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tensor": 4}}, "parallel.tensor: 4 does not divide model.heads 6"),
        ({"train": {"global_batch_size": 12}}, "train.global_batch_size: 12 sequences do not divide"),
        (
            {"parallel": {"tensor": 2, "sequence_parallel": True}, "data": {"sequence_length": 31}},
            "data.sequence_length: 31 does not divide by parallel.tensor 2",
        ),
        ({"model": {"vocab_size": 200}}, "model.vocab_size: 200 is less than the tokenizer's 257"),
        ({"dry_run": {"rank": 8}}, "dry_run.rank: 8 of 8 processes; ranks are 0 to 7"),
        (
            {"data": {"tokenizer": {"kind": "huggingface", "path": "/no.json"}}, "model": {"vocab_size": None}},
            "/no.json: .*set model.vocab_size",
        ),
    ],
)
def test_errors(sections: dict[str, dict[str, Any]], message: str) -> None:
    sections = {**sections, "dry_run": {"processes": 8, **sections.get("dry_run", {})}}
    with pytest.raises(HarnessError, match=message) as caught:
        lay_out(settings_of(**sections))
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_running_process_group_is_left_alone() -> None:
    settings = settings_of()
    with ParallelLayout(settings.parallel), pytest.raises(HarnessError, match="process of its own"):
        lay_out(settings)


@pytest.mark.parametrize(
    ("tokenizer", "said", "vocab_size"),
    [
        ({"kind": "bytes"}, None, 257),
        ({"kind": "bytes"}, 300, 300),
        ({"kind": "sentencepiece", "vocab_size": 1234}, None, 1234),
        ({"kind": "huggingface", "path": "/no.json"}, 999, 999),
    ],
)
def test_vocabulary_without_a_corpus(tokenizer: dict[str, Any], said: int | None, vocab_size: int) -> None:
    run = lay_out(settings_of(data={"tokenizer": tokenizer}, model={"vocab_size": said}))
    assert run.work.model.vocab_size == vocab_size
    assert run.shapes[0].place.global_shape[0] == vocab_size


def test_under_a_launcher_the_first_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    train(settings_of(model={"heads": 4, "kv_heads": 4}, parallel={"tensor": 3}))  # not even the error
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    train(settings_of(parallel={"tensor": 2}, dry_run={"rank": 3}))
    assert "dry run of 4 processes" in (text := capsys.readouterr().out)
    assert "tensor rank 1 of 2, data rank 1 of 2" in text


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [f"run.folder={tmp_path / 'runs'}", "train.dry_run=true", "dry_run.processes=6"]
    assert main(["train", "quickstart", *run]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["train", "quickstart", *run, "dry_run.processes=4", "parallel.tensor=2"]) == 0
    assert "tensor 2 x data 2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_divides_memory() -> None:
    """Stages and precision do to the parts what the ZeRO paper says; tokens and recomputation what theirs do."""
    whole = dry_run_of(4, 0)
    for stage, divided in ((1, {"masters", "moments"}), (2, {"masters", "moments", "gradients"})):
        run = dry_run_of(4, 0, parallel={"zero_stage": stage})
        assert {part.kind for part in run.state if part.divided} == divided
    run = dry_run_of(4, 0, parallel={"zero_stage": 3}, train={"precision": "bf16"})
    assert {part.kind for part in run.state if part.divided} == {"weights", "masters", "moments", "gradients"}
    assert dry_run_of(4, 0, train={"micro_batch_size": 2}).activation_bytes == 2 * whole.activation_bytes
    kept = [dry_run_of(4, 0, train={"recompute": r}).activation_bytes for r in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    sizes = [
        dry_run_of(4, 0, parallel={"tensor": 2, "sequence_parallel": split}).activation_bytes for split in (False, True)
    ]
    assert sizes[1] < sizes[0] < whole.activation_bytes
