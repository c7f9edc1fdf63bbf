"""Megatron-core's checkpoints: against the library itself on two ranks, and against what must be refused."""

from __future__ import annotations

import _pickle
import contextlib
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from harness.checkpoint import Box
from harness.config import HarnessError
from harness.convert import open_source, streamed_logits
from harness.convert.megatron import COMMON, CONFIG, MODEL, TRACKER, MegatronSource, is_megatron, write_megatron
from harness.convert.megatron_chunks import METADATA
from harness.convert.megatron_pickles import Made, read_pickle
from harness.convert.megatron_writer import DATA, Piece, write_chunks
from harness.convert.source import decoder_shapes
from harness.model import ModelSection
from harness.parallel import Fragment
from tests.convert.megatron_worker import NAMINGS, RANKS
from tests.convert.refusals import refusal
from tests.convert.sources import DecoderSource, read_all

ROOT = Path(__file__).parents[2]
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
CASES = {
    "gpt2": ModelSection(family="gpt2", layers=2, hidden_size=48, heads=4, vocab_size=71, max_positions=33),
    "gpt2-untied-one-layer": ModelSection(
        family="gpt2", layers=1, hidden_size=32, heads=2, vocab_size=50, max_positions=40, mlp_size=44, tied_head=False,
        norm_epsilon=1e-3,
    ),
    "llama-gqa-wide-heads": ModelSection(
        layers=3, hidden_size=48, heads=4, kv_heads=2, head_size=20, mlp_size=36, vocab_size=71, qk_norm=True,
        rope_theta=500.0, norm_epsilon=1e-2,
    ),
    "llama-tied-biases-stretched": ModelSection(
        layers=2, hidden_size=64, heads=2, vocab_size=64, bias=True, tied_head=True, rope_theta=1e6,
        rope_scaling=SCALING, max_positions=64,
    ),
    "rope-layernorm-gelu-qkv-bias": ModelSection(
        family="gpt2", layers=2, hidden_size=32, heads=8, kv_heads=4, vocab_size=49, positions="rope", bias=False,
        qkv_bias=True,
    ),
}  # fmt: skip


def tokens_of(name: str) -> Tensor:
    section = CASES[name]
    return torch.randint(section.vocab_size, (2, 31), generator=torch.Generator().manual_seed(len(name)))


def our_logits(source: MegatronSource | DecoderSource, tokens: Tensor) -> Tensor:
    return streamed_logits(source, tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Our folders, as Megatron-core read them; its own; and the logits that it computed of either."""
    folder = tmp_path_factory.mktemp("megatron")
    for number, (name, section) in enumerate(CASES.items()):
        ours = folder / "ours" / name
        ours.mkdir(parents=True)
        write_megatron(ours, DecoderSource(section, seed=number), torch.float32)
        torch.save(tokens_of(name), folder / f"{name}.tokens.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("megatron_worker.py"))]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate()[0].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0] * RANKS, "\n".join(said)[-4000:]
    return folder, torch.load(folder / "logits.pt")


@pytest.mark.parametrize("name", CASES)
def test_megatron_computes_the_same_of_what_we_write(name: str, exchanged: tuple[Path, dict[str, Tensor]]) -> None:
    _, logits = exchanged
    source = DecoderSource(CASES[name], seed=list(CASES).index(name))
    ours, theirs = our_logits(source, tokens_of(name)), logits[f"{name} ours"][..., : CASES[name].vocab_size]
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_megatron_read_and_wrote_again_is_the_same_to_the_bit(
    name: str, exchanged: tuple[Path, dict[str, Tensor]]
) -> None:
    """In two ranks' shards, and padded."""
    section = CASES[name]
    source = DecoderSource(section, seed=list(CASES).index(name))
    found = read_all(MegatronSource(exchanged[0] / "theirs" / f"{name}-again", section), decoder_shapes(section))
    assert found.keys() == source.weights.keys()
    for weight, expected in source.weights.items():
        assert torch.equal(found[weight], expected), weight


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", CASES)
def test_we_compute_the_same_of_what_megatron_writes(
    name: str, naming: str, exchanged: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, logits = exchanged
    section = CASES[name]
    source = MegatronSource(folder / "theirs" / f"{name}-{naming}", section)
    assert source.section == section
    assert source.padding_rows == -section.vocab_size % 8  # type: ignore[operator]
    assert source.details["vocabulary_padding_rows_left_out"] == source.padding_rows
    assert source.verify() == []
    theirs = logits[f"{name} theirs"][..., : section.vocab_size]
    assert theirs.std() > 0.3
    torch.testing.assert_close(our_logits(source, tokens_of(name)), theirs, atol=2e-5, rtol=2e-5)


def test_the_namings_are_three(exchanged: tuple[Path, dict[str, Tensor]]) -> None:
    """So that the test above reads what it is meant to."""
    name = "decoder.layers.{}mlp.linear_fc1.weight{}"
    for naming, number, halves in (("stacked", "", [""]), ("numbered", "2.", [""]), ("apart", "2.", ["_w", "_v"])):
        source = MegatronSource(
            exchanged[0] / "theirs" / f"llama-gqa-wide-heads-{naming}", CASES["llama-gqa-wide-heads"]
        )
        fc1 = {each for each in source.links.their_shapes if "linear_fc1.weight" in each and (number in each)}
        assert fc1 == {name.format(number, half) for half in halves}


def test_any_slice_is_read_from_the_chunks_of_two_ranks(exchanged: tuple[Path, dict[str, Tensor]]) -> None:
    name = "llama-gqa-wide-heads"
    source = MegatronSource(exchanged[0] / "theirs" / f"{name}-stacked", CASES[name])
    shapes = decoder_shapes(CASES[name])
    whole = read_all(source, shapes)
    fragments = []
    for weight, shape in shapes.items():
        for _ in range(3):
            starts = [random.randrange(size) for size in shape]
            sizes = [random.randint(1, size - start) for size, start in zip(shape, starts, strict=True)]
            fragments.append(Fragment(weight, "master", shape, tuple(starts), torch.full(sizes, torch.nan)))
    source.read(fragments)
    for each in fragments:
        box = Box(tuple(each.offsets), tuple(each.tensor.shape))
        assert torch.equal(each.tensor, whole[each.name][box.slices]), (each.name, box)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_we_wrote_says_its_model_and_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source = DecoderSource(CASES["llama-gqa-wide-heads"])
    files = write_megatron(tmp_path, source, dtype)
    found = open_source(tmp_path)
    assert isinstance(found, MegatronSource)
    assert found.section == source.section
    assert (found.dtype, found.padding_rows, found.tokenizer) == (dtype, 0, None)
    for name, weight in read_all(found, decoder_shapes(source.section)).items():
        assert torch.equal(weight, source.weights[name].to(dtype).float()), name
    assert files.keys() == {DATA, METADATA}
    for name, file in files.items():
        content = (tmp_path / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert torch.load(tmp_path / COMMON) == {}


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    held: list[weakref.ref[Tensor]] = []

    def fetch() -> Tensor:
        assert not [one for one in held if one() is not None]
        tensor = torch.ones(4, 5)
        held.append(weakref.ref(tensor))
        return tensor

    pieces = [Piece(f"w{number}", (4, 5), Box((0, 0), (4, 5)), fetch) for number in range(5)]
    write_chunks(tmp_path, pieces, {}, torch.float32)
    assert len(held) == 5


def test_errors_while_writing_come_out_as_they_are(tmp_path: Path) -> None:
    def fetch() -> Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_chunks(tmp_path, [Piece("w", (1,), Box((0,), (1,)), fetch)], {}, torch.float32)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"logit_softcap": 3.0}, "model.logit_softcap 3.0"),
        ({"bias": True, "qkv_bias": False}, "model.qkv_bias false"),
        ({"norm": "layernorm", "qk_norm": True}, "model.qk_norm with norm layernorm"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 5.0}}, "model.rope_scaling.high_freq_factor 5.0: it is 4.0"),
    ],
)
def test_what_megatron_cannot_express_is_not_written(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = DecoderSource(ModelSection(layers=1, hidden_size=16, heads=2, vocab_size=9, **values))
    assert said in refusal(lambda: write_megatron(tmp_path, source, torch.float32))
    assert not list(tmp_path.iterdir())


# Folders that torch's own writer made, without Megatron-core.

SMALL = ModelSection(layers=2, hidden_size=16, heads=2, kv_heads=1, mlp_size=12, vocab_size=9)


def small_state() -> tuple[DecoderSource, dict[str, Tensor]]:
    """A model, and its weights as a checkpoint names and shapes them whose norms stand apart, padded."""
    source = DecoderSource(SMALL)
    w = source.weights

    def pad(name: str) -> Tensor:
        return torch.cat((w[name], torch.full((7, 16), 9.0)))

    state = {
        "embedding.word_embeddings.weight": pad("token_embedding.weight"),
        "output_layer.weight": pad("head.weight"),
        "decoder.final_layernorm.weight": w["final_norm.weight"],
    }
    for i in range(2):
        ours, theirs = f"layers.{i}.", f"decoder.layers.{i}."
        state |= {
            theirs + "input_layernorm.weight": w[ours + "attention_norm.weight"],
            theirs + "pre_mlp_layernorm.weight": w[ours + "mlp_norm.weight"],
            theirs + "self_attention.linear_qkv.weight": w[ours + "attention.qkv.weight"],
            theirs + "self_attention.linear_proj.weight": w[ours + "attention.output.weight"],
            theirs + "mlp.linear_fc1.weight": torch.cat((w[ours + "mlp.gate.weight"], w[ours + "mlp.up.weight"])),
            theirs + "mlp.linear_fc2.weight": w[ours + "mlp.down.weight"],
        }
    return source, {name: tensor.clone() for name, tensor in state.items()}


def save_state(folder: Path, state: dict[str, Any], **config: Any) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=2), no_dist=True)
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1} | config))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_old_and_prefixed_checkpoints_and_what_is_no_weight(prefix: str, tmp_path: Path) -> None:
    source, state = small_state()
    named: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    named["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight"] = torch.ones(3, dtype=torch.float64)
    named["chained_0.optimizer.state.fp32_param.output_layer.weight"] = torch.ones(3)
    named[prefix + "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"] = {"amax": 3}
    named[prefix + "decoder.layers.1.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    named["rng_state/shard_0_1"] = [torch.zeros(8)]
    found = MegatronSource(save_state(tmp_path / "m", named), SMALL)
    assert found.padding_rows == 7
    weights = read_all(found, decoder_shapes(SMALL))
    for name, expected in source.weights.items():
        assert torch.equal(weights[name], expected), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_latest_checkpoint_below_a_folder_is_read(tmp_path: Path) -> None:
    _, state = small_state()
    save_state(tmp_path / "iter_0000120", state)
    assert not is_megatron(tmp_path)
    (tmp_path / TRACKER).write_text("120\n")
    assert is_megatron(tmp_path)
    assert is_megatron(tmp_path / "iter_0000120")
    assert MegatronSource(tmp_path, SMALL).details["checkpoint"] == "iter_0000120"
    (tmp_path / "iter_0000120").rename(tmp_path / "release")
    (tmp_path / TRACKER).write_text("release")
    assert MegatronSource(tmp_path, SMALL).folder == tmp_path / "release"
    (tmp_path / TRACKER).write_text("../secret")
    assert "says '../secret', and not an iteration" in refusal(lambda: MegatronSource(tmp_path, SMALL))
    (tmp_path / TRACKER).write_text("7")
    assert "iter_0000007: has no metadata.json" in refusal(lambda: MegatronSource(tmp_path, SMALL))
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    assert "an old checkpoint, whose weights are pickled" in refusal(lambda: MegatronSource(tmp_path, SMALL))


def with_tensor(name: str, tensor: Tensor | None) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[name] = tensor
        if tensor is None:
            del state[name]

    return change


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_tensor("decoder.layers.1.mlp.linear_fc2.weight", None), "layers.1.mlp.linear_fc2.weight: not there"),
        (with_tensor("decoder.layers.1.mlp.router.weight", torch.ones(2)), "layers.1.mlp.router.weight: there, and"),
        (with_tensor("decoder.layers.0.mlp.linear_fc2.bias", torch.ones(16)), "linear_fc2.bias: there, and"),
        (with_tensor("decoder.layers.0.mlp.linear_fc2.weight", torch.ones(16, 11)), "(16, 11), and (16, 12)"),
        (with_tensor("decoder.layers.0.mlp.linear_fc1.weight", torch.ones(25, 16)), "(25, 16), and (24, 16)"),
        (with_tensor("embedding.word_embeddings.weight", torch.ones(8, 16)), "(8, 16), and (9, 16)"),
        (with_tensor("decoder.final_layernorm.weight", torch.ones(16).double()), "is float64, and only F32, BF16"),
        (with_tensor("decoder.final_layernorm.weight", torch.ones(16).to(torch.float8_e4m3fn)), "is float8_e4m3fn"),
        (with_tensor("decoder.final_layernorm.weight", torch.ones(16).int()), "is int32, and only F32"),
    ],
)
def test_tensors_that_the_model_has_not_are_refused(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    _, state = small_state()
    change(state)
    folder = save_state(tmp_path / "m", state)
    refused = refusal(lambda: MegatronSource(folder, SMALL))
    assert said in refused
    assert str(folder) in refused


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_not_said_is_asked_for(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "m", small_state()[1])
    said = refusal(lambda: MegatronSource(folder))
    assert "--model FILE.yaml" in said
    assert "hidden_size 16 and 16 rows of tokens" in said
    unsaid = SMALL.model_copy(update={"vocab_size": None})
    assert "model.vocab_size is not said" in refusal(lambda: MegatronSource(folder, unsaid))
    (folder / MODEL).write_text("{}")
    assert f"{MODEL}: model is not there" in refusal(lambda: MegatronSource(folder))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("config", [{"sharded_backend": "zarr"}, {"sharded_backend": "fsdp_dtensor"}])
def test_other_backends_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = save_state(tmp_path / "m", small_state()[1], **config)
    assert is_megatron(folder)
    assert f"sharded_backend is '{config['sharded_backend']}'" in refusal(lambda: MegatronSource(folder, SMALL))
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 2}))
    assert "sharded_backend_version is 2" in refusal(lambda: MegatronSource(folder, SMALL))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "m", small_state()[1])
    data = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole, described = data.read_bytes(), (folder / METADATA).read_bytes()

    data.write_bytes(whole[:-1])
    assert f"{data}: is truncated: it has {len(whole) - 1} bytes" in refusal(lambda: MegatronSource(folder, SMALL))
    data.unlink()
    assert f"{data}: no such file" in refusal(lambda: MegatronSource(folder, SMALL))

    data.write_bytes(bytes(len(whole)))  # of the right size, and no archives
    source = MegatronSource(folder, SMALL)
    assert f"{data}: the part of " in refusal(lambda: read_all(source, decoder_shapes(SMALL)))
    assert all("is damaged" in problem for problem in source.verify())
    assert len(source.verify()) == len(source.verify((0, 2))) + len(source.verify((1, 2))) > 2

    source = MegatronSource(folder, SMALL)
    name, tensor = next(each for each in source._chunks.tensors.items() if each[1].chunks[0].file == data)
    elements = tensor.chunks[0].start + tensor.chunks[0].length // 2
    data.write_bytes(whole[:elements] + bytes([whole[elements] ^ 1]) + whole[elements + 1 :])
    (problem,) = source.verify()
    assert name in problem
    assert "checksum" in problem

    data.write_bytes(whole)
    assert source.verify() == []
    for content in (b"", described[: len(described) // 2], b"\x80\x04N.", b"garbage", described[:-30] + b"."):
        (folder / METADATA).write_bytes(content)
        assert f"{folder / METADATA}: is " in refusal(lambda: MegatronSource(folder, SMALL))
    (folder / METADATA).unlink()
    assert f"{folder / METADATA}: cannot be read" in refusal(lambda: MegatronSource(folder, SMALL))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_metadata_cannot_lead_out_of_the_folder_nor_leave_parts_out(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "m", small_state()[1])
    metadata = pickle.loads((folder / METADATA).read_bytes())
    info = next(iter(metadata.storage_data.values()))
    path, info.relative_path = info.relative_path, "../elsewhere.distcp"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert "'../elsewhere.distcp'" in refusal(lambda: MegatronSource(folder, SMALL))
    info.relative_path, info.transform_descriptors = path, ["zstd"]
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert "is stored through ['zstd']" in refusal(lambda: MegatronSource(folder, SMALL))
    info.transform_descriptors = None
    metadata.state_dict_metadata["output_layer.weight"].chunks.clear()
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert "output_layer.weight: only 0 of its 256 elements" in refusal(lambda: MegatronSource(folder, SMALL))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_elements_that_do_not_lie_in_order_are_refused(tmp_path: Path) -> None:
    _, state = small_state()
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    state[name] = state[name].T.contiguous().T
    source = MegatronSource(save_state(tmp_path / "m", state), SMALL)
    assert "its elements are not stored in order" in refusal(lambda: read_all(source, decoder_shapes(SMALL)))


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_does_harm_is_not_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    folder = save_state(tmp_path / "m", small_state()[1])
    described = (folder / METADATA).read_bytes()
    metadata = pickle.loads(described)
    metadata.planner_data = Harm(mark)
    for content in (pickle.dumps(Harm(mark), protocol), pickle.dumps(metadata, protocol)):
        (folder / METADATA).write_bytes(content)
        said = refusal(lambda: MegatronSource(folder, SMALL))
        assert f"{folder / METADATA}: names '{os.mkdir.__module__}.mkdir'" in said
        assert "nothing of it was run" in said
    assert not mark.exists()
    pickle.loads(content)  # it would have been
    assert mark.exists()

    mark.rmdir()
    source, chunk = restored(folder, described)
    data = chunk.file.read_bytes()
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Harm(mark), protocol))
    assert evil.stat().st_size <= chunk.length
    padding = chunk.length - evil.stat().st_size
    content = bytes(padding) + evil.read_bytes()  # a zip archive may have anything before it
    chunk.file.write_bytes(data[: chunk.start] + content + data[chunk.start + chunk.length :])
    assert "mkdir'" in refusal(lambda: read_all(source, decoder_shapes(SMALL)))
    assert not mark.exists()


def restored(folder: Path, described: bytes) -> tuple[MegatronSource, Any]:
    (folder / METADATA).write_bytes(described)
    source = MegatronSource(folder, SMALL)
    return source, source._chunks.tensors["output_layer.weight"].chunks[0]


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = DecoderSource(SMALL)
    write_megatron(tmp_path, source, torch.float32)

    def barred(*_: Any, **__: Any) -> None:
        raise BaseException("something is unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, barred)
    monkeypatch.setattr(torch, "load", barred)
    found = open_source(tmp_path)
    assert found.verify() == []
    assert read_all(found, decoder_shapes(SMALL)).keys() == source.weights.keys()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_pickle_reads_them(protocol: int) -> None:
    shared = ["shared"]
    value = {
        "numbers": [0, 1, 255, 256, 65536, -1, -(2**31), 2**31, 2**77, 0.5, -1e300], "text": ["", "ä", "x" * 300],
        "truths": [None, True, False], "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "twice": [shared, shared],
        ("a", 1): {}, "many": list(range(2000)), "nested": {"a": {"b": [{}]}},
    }  # fmt: skip
    found = read_pickle(pickle.dumps(value, protocol), "a test")
    assert found == value
    assert found["twice"][0] is found["twice"][1]
    size = read_pickle(pickle.dumps(torch.Size([3, 4]), protocol), "a test")
    assert isinstance(size, Made)
    assert (str(size.of), size.arguments) == ("torch.Size", ((3, 4),))


def test_random_bytes_are_refused_and_nothing_else() -> None:
    generator = random.Random(0)
    good = pickle.dumps({"a": [torch.Size([3]), torch.float32, (1, 2.5)], "b": {"c": {1, 2}}}, 4)
    for _ in range(3000):
        content = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        with contextlib.suppress(HarnessError):
            read_pickle(bytes(content), "a test")
