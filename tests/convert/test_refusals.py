"""Sources that are wrong or foreign, disks that are full, killed processes: a line, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoint import tensor_file
from harness.config import HarnessError
from harness.convert import convert, hf_config, names, open_source, proof
from tests.convert.killed import convert_killed
from tests.convert.library import library_model, save_library_model
from tests.convert.refusals import refusal


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    model = library_model("llama-gqa")
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def refused(source: Path) -> str:
    """What a conversion says; after it there is nothing beside the source."""
    before = sorted(source.parent.iterdir())
    said = refusal(lambda: convert(source, source.parent / "target"))
    assert sorted(source.parent.iterdir()) == before
    return said


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architectures: MambaForCausalLM cannot be read; one of",
        ),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "config.json: architectures: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gemma2"}, "config.json: architectures: model_type 'gemma2' cannot be"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', and only 'silu' can be read"),
        ({"mlp_bias": True}, "config.json: mlp_bias is True, and only False can be read"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters: rope_type is 'yarn'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "config.json: rope_scaling: type is 'linear', and",
        ),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config: quantized weights cannot be read"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_key_value_heads": 3}, "config.json as our model section: kv_heads 3 does not divide heads 4"),
        (
            {"vocab_size": 212},
            "tensor model.embed_tokens.weight has shape (211, 64), and (212, 64) by the configuration",
        ),
        ({"num_hidden_layers": 3}, "tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "tensor model.layers.1."),
        ({"tie_word_embeddings": True}, "tensor lm_head.weight is not model.embed_tokens.weight, although config.json"),
        ({"intermediate_size": 101}, "has shape"),
        ({"num_hidden_layers": 2_000_000_000}, "layers: input should be less than or equal to 10000"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "config.json: num_hidden_layers is '2', and not a number"),
        ({"num_hidden_layers": 2.0}, "config.json: num_hidden_layers is 2.0, and not a whole number"),
        ({"architectures": [["x"]]}, "config.json: architectures is [['x']], and not a list of texts"),
        ({"architectures": "LlamaForCausalLM"}, "config.json: architectures is 'LlamaForCausalLM', and not a list"),
        ({"rope_parameters": "yes"}, "config.json: rope_parameters is 'yes', and not a mapping"),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}},
            "do not agree",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: low_freq_factor is missing"),
        ({"attention_dropout": "0"}, "transformers cannot read it ("),
        ({"tie_word_embeddings": 1}, "config.json: tie_word_embeddings is 1, and only True or False can be read"),
    ],
)
def test_configurations(theirs: Path, changes: dict[str, Any], line: str) -> None:
    edit_config(theirs, **changes)
    assert line in refused(theirs)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window is '4096', and not a number"),
        ("gpt2", {"resid_pdrop": [1]}, "resid_pdrop is [1], and not a number"),
        ("qwen3", {"layer_types": 5}, "layer_types is 5, and not a list of texts"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64, less than max_position_embeddings 128"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9}, "sliding_window is 9, less than"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, and only False can be read"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ],
)
def test_what_other_architectures_may_say(tmp_path: Path, name: str, changes: dict[str, Any], line: str) -> None:
    library_model(name).save_pretrained(tmp_path / "theirs")
    open_source(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    assert line in refused(tmp_path / "theirs")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop(GATE), f"tensor {GATE}: not there, and the model that its configuration describes has such"),
        (
            lambda w: w.update(extra=torch.ones(2)),
            "tensor extra: there, and the model that its configuration describes",
        ),
        (lambda w: w.update({GATE: w[GATE].T.contiguous()}), f"model.safetensors: tensor {GATE} has shape (64, 100)"),
        (lambda w: w.update({GATE: w[GATE].double()}), f"tensor {GATE} is F64, and only F32, BF16 and F16 can be read"),
        (lambda w: w.update({GATE: w[GATE].to(torch.int8)}), f"tensor {GATE} is I8, and only"),
        (lambda w: w.update({GATE: w[GATE].to(torch.float8_e4m3fn)}), f"tensor {GATE} is F8_E4M3, and only"),
    ],
)
def test_tensors(theirs: Path, change: Callable[[dict[str, torch.Tensor]], Any], line: str) -> None:
    change_weights(theirs, change)
    assert line in refused(theirs)


def test_pickled_weights_are_not_touched(theirs: Path, tmp_path: Path) -> None:
    (theirs / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    torch.save({"w": Evil()}, theirs / "pytorch_model.bin")
    assert "pytorch_model.bin: pickled weights can run any code when they are read, and are not" in refused(theirs)
    assert not marker.exists()
    (theirs / "pytorch_model.bin").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(theirs)


def test_a_window_that_is_not_said_is_the_librarys(tmp_path: Path) -> None:
    library_model("mistral", max_position_embeddings=8192).save_pretrained(tmp_path / "theirs")
    open_source(tmp_path / "theirs")  # it says null
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sliding_window"}))
    assert "sliding_window is 4096, less than max_position_embeddings 8192" in refused(tmp_path / "theirs")


def test_a_single_file_goes_before_an_index_as_in_the_library(tmp_path: Path) -> None:
    save_library_model(tmp_path / "theirs", "llama-gqa")
    weights = {name: 1.5 * value for name, value in library_model("llama-gqa").state_dict().items()}
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    assert convert(tmp_path / "theirs", tmp_path / "run", proof="transformers").proof is not None


def test_files_of_an_index(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    save_library_model(theirs, "gpt2")
    index = theirs / "model.safetensors.index.json"
    whole = index.read_text()
    shard = sorted(theirs.glob("*.safetensors"))[1]
    content = shard.read_bytes()

    shard.write_bytes(content[:-5])
    assert f"{shard.name}: is not a safetensors file" in refused(theirs)
    shard.unlink()
    assert f"{shard.name}: no such file, and model.safetensors.index.json says that it holds" in refused(theirs)
    shard.write_bytes(content)
    names = json.loads(whole)["weight_map"]
    for wrong, line in (
        ("{", "model.safetensors.index.json: is not JSON"),
        ("[]", "model.safetensors.index.json: is not a mapping"),
        ("{}", "model.safetensors.index.json: has no weight_map"),
        (json.dumps({"weight_map": names | {"w": "../x.safetensors"}}), "w lies in 'x.safetensors', which is no"),
        (json.dumps({"weight_map": names | {"w": shard.name}}), f"{shard.name}: has no tensor w"),
    ):
        index.write_text(wrong)
        assert line in refused(theirs)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no model that is known here; give" in refused(tmp_path / "empty")
    assert "nowhere: no such folder; give" in refused(tmp_path / "nowhere")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "config.json: is not JSON" in refused(tmp_path / "empty")


def test_targets_that_are_there(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link", "theirs"):
        said = refusal(lambda name=name: convert(theirs, tmp_path / name))
        assert f"{name}: is there already" in said
    assert (tmp_path / "full" / "precious").exists()
    (tmp_path / "vacant").mkdir()
    assert convert(theirs, tmp_path / "vacant" / "deeper", to="huggingface").target.is_dir()
    said = refusal(lambda: convert(theirs, tmp_path / "new", to="gguf"))
    assert "--to gguf: is none of harness, huggingface" in said
    assert "--dtype bfloat16: master weights are float32" in refusal(
        lambda: convert(theirs, tmp_path / "new", dtype="bfloat16")
    )
    assert "has no steps to choose from" in refusal(lambda: convert(theirs, tmp_path / "new", step=3))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["harness", "huggingface"])
def test_full_disks(theirs: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    target = theirs.parent / "target"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: _Usage(1000))
        said = refusal(lambda: convert(theirs, target, to=to))
        assert "MB are needed there and 0.0 MB are free; make room" in said
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refusal(lambda: convert(theirs, target, to=to))
    assert sorted(entry.name for entry in theirs.parent.iterdir()) == ["theirs"]
    convert(theirs, target, to=to)


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_folder_that_was_written_here_is_compared_with_its_record(theirs: Path) -> None:
    convert(theirs, theirs.parent / "run", proof=None)
    exported = convert(theirs.parent / "run", theirs.parent / "exported", proof=None).target
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-3] ^= 16
    (exported / "model.safetensors").write_bytes(content)
    said = refusal(lambda: convert(exported, theirs.parent / "again", proof=None))
    assert "model.safetensors: digest differs from conversion.json: the file is damaged" in said
    (exported / "conversion.json").unlink()
    convert(exported, theirs.parent / "again", proof=None)


def test_what_cannot_be_rounded_is_named(theirs: Path) -> None:
    change_weights(theirs, lambda w: w[GATE].view(-1)[5].fill_(1e6))
    convert(theirs, theirs.parent / "run", proof="streamed")
    said = refusal(lambda: convert(theirs.parent / "run", theirs.parent / "half", dtype="float16"))
    assert "layers.1.mlp.gate.weight, rounded to float16, has 1 values that are no finite numbers (too large" in said
    change_weights(theirs, lambda w: w[GATE].view(-1)[5].fill_(float("nan")))
    said = refusal(lambda: convert(theirs, theirs.parent / "nan"))
    assert "tensor layers.1.mlp.gate.weight has 1 values that are no finite numbers (the source's own)" in said


def test_places_that_look_like_runs(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = theirs.parent
    (theirs / "checkpoints").mkdir()
    (theirs / "config.yaml").write_text("name: not ours\n")
    assert open_source(theirs).format == "Hugging Face"
    for place in ("p/checkpoints/step-5000", "q/checkpoints/hf"):
        (root / place).parent.mkdir(parents=True)
        shutil.copytree(theirs, root / place)
        assert open_source(root / place).format == "Hugging Face"
    run = convert(theirs, root / "run", proof=None).target
    step = run / "checkpoints" / "step-00000000"
    places = [(run, "."), (step, "."), (step.parent, step.name), (step.parent, "."), (root, "run/checkpoints/")]
    for where, name in places:
        monkeypatch.chdir(where)
        source = open_source(Path(name))
        assert source.format == "harness", (where, name)
        assert source.verify() == []
    (root / "q" / "here").mkdir()
    monkeypatch.chdir(root / "q" / "here")
    assert "is the folder that this runs in" in refusal(lambda: convert(theirs, Path(".")))
    assert "neither side is a Hugging Face folder" in refusal(
        lambda: convert(run, root / "again", to="megatron", proof="transformers")
    )


def test_another_model_is_not_kept(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that makes a mistake in the last bits is found by the proof."""
    write = tensor_file.bytes_of

    def wrong(tensor: torch.Tensor) -> memoryview:
        return write(tensor if tensor.dim() < 2 else tensor.flip(0))

    monkeypatch.setattr(tensor_file, "bytes_of", wrong)
    assert "the result is not the same model, and is not kept: tensor token_embedding.weight has other bits" in refused(
        theirs
    )


def test_a_mistake_in_both_directions_is_seen_by_the_library(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates and ups changed for one another on the way in and on the way out: bits come back, but no such model."""
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = [
        replace(row, theirs=re.sub("gate_proj|up_proj", lambda found: other[found[0]], row.theirs))
        for row in names.LLAMA
    ]
    monkeypatch.setattr(
        hf_config,
        "ARCHITECTURES",
        tuple(
            replace(each, rows=swapped) if each.name == "LlamaForCausalLM" else each for each in hf_config.ARCHITECTURES
        ),
    )
    said = refused(theirs)
    assert "source and source in transformers: largest difference" in said


def test_not_proven_is_written_down(theirs: Path) -> None:
    target = theirs.parent / "target"
    conversion = convert(theirs, target, proof=None)
    assert conversion.proof is None
    record = json.loads((target / "conversion.json").read_text())
    assert record["proof"] == "none was asked for (--no-proof)"
    proven = json.loads((convert(theirs, theirs.parent / "proven").target / "conversion.json").read_text())
    assert [each["max_difference"] <= 1e-4 for each in proven["proof"]["comparisons"]] == [True, True]
    for name, file in proven["files"].items():
        assert (theirs.parent / "proven" / name).stat().st_size == file["bytes"]


def test_without_the_library_it_says_so(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "find_spec", lambda name: None)
    conversion = convert(theirs, theirs.parent / "target")
    assert conversion.proof is not None
    assert len(conversion.proof.comparisons) == 1
    assert "transformers was not asked: it is not installed" in "\n".join(conversion.lines())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(HarnessError, match="transformers is not installed"):
            convert(theirs, theirs.parent / "other", proof="transformers")


@pytest.mark.parametrize("to_run", [True, False])
def test_killed_at_any_point_nothing_looks_whole(theirs: Path, to_run: bool) -> None:
    source = theirs
    if not to_run:
        source = convert(theirs, theirs.parent / "run", proof=None).target
    target = theirs.parent / "target"

    status, points = convert_killed(source, target, 0)
    assert status == 0
    assert points > 5
    last = points - 1  # the flush of the folder above, once it has its name
    for at in sorted({1, 2, points // 3, points // 2, 2 * points // 3, last - 1, last}):
        target.rename(target.with_name(f"whole-{at}"))
        assert convert_killed(source, target, at) == (-signal.SIGKILL, at)
        assert not target.exists(), f"killed at {at} of {points}"
        refusal(lambda: open_source(target))
        # What was left does not stand in the way.
        assert convert(source, target, proof="streamed").target.is_dir()
        assert not [entry for entry in target.parent.iterdir() if entry.name.startswith(".tmp-")]
