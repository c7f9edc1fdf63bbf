"""What the proof sees, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from harness.convert import bits, convert, proof
from harness.convert.bits import compare_weights
from harness.convert.proof import prove
from harness.parallel import Fragment
from tests.convert.library import save_library_model
from tests.convert.refusals import refusal
from tests.convert.sources import DecoderSource
from tests.model.sections import SECTIONS


class Changed(DecoderSource):
    """The same model but for one element."""

    def change(self, name: str, place: tuple[int, ...], by: float) -> Changed:
        self._name, self._place, self._by = name, place, by
        return self

    def read(self, fragments: Sequence[Fragment]) -> None:
        super().read(fragments)
        for fragment in fragments:
            if fragment.name == self._name:
                assert fragment.tensor.shape == fragment.global_shape
                fragment.tensor[self._place] += self._by


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("gpt2", "position_embedding.weight", (39, 5)),  # the last of all
        ("gpt2", "token_embedding.weight", (210, 3)),
        ("gpt2", "layers.1.mlp.down.bias", (0,)),
        ("llama", "head.weight", (100, 0)),  # of a token that is not asked
        ("llama", "final_norm.weight", (7,)),
        ("llama-qk-norm", "layers.0.attention.k_norm.weight", (3,)),
        ("llama-qkv-bias", "layers.1.attention.qkv.bias", (20,)),
    ],
)
def test_one_element_is_enough(kind: str, name: str, place: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    same = DecoderSource(SECTIONS[kind], 3)
    assert prove(same, DecoderSource(SECTIONS[kind], 3), "streamed").comparisons[0].max_difference == 0
    other = Changed(SECTIONS[kind], 3).change(name, place, 0.5)
    said = refusal(lambda: prove(same, other, "streamed"))
    assert f"the result is not the same model, and is not kept: tensor {name} has other bits" in said
    monkeypatch.setattr(proof, "compare_weights", lambda *_: 0)
    said = refusal(lambda: prove(same, other, "streamed"))
    assert "the result is not the same model, and is not kept: source and result: largest difference" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_proven(value: float) -> None:
    source = Changed(SECTIONS["llama"], 3).change("layers.0.mlp.up.weight", (0, 0), value)
    said = refusal(lambda: prove(source, source, "streamed"))
    assert "layers.0.mlp.up.weight has 1 values that are no finite numbers (the source's own)" in said


def test_logits_of_nothing_prove_nothing() -> None:
    source = DecoderSource(SECTIONS["llama"], 3)
    source.weights["head.weight"].zero_()
    assert "its logits are no numbers, or all 0" in refusal(lambda: prove(source, source, "streamed"))


@pytest.mark.parametrize("pieces", [1, 50, 1 << 20])
def test_weights_are_compared_to_the_last(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "_ELEMENTS", pieces)
    same, other = DecoderSource(SECTIONS["gpt2"], 3), DecoderSource(SECTIONS["gpt2"], 3)
    assert compare_weights(same, other, None) == 28
    last = other.weights["layers.1.mlp.down.weight"]
    last[-1, -1] = torch.nextafter(last[-1, -1], torch.tensor(9.0))
    assert "tensor layers.1.mlp.down.weight has other bits" in refusal(lambda: compare_weights(same, other, None))


def test_rounded_from_a_folder_of_the_library(tmp_path: Path) -> None:
    """The library's logits of the source are those of its weights as they are."""
    save_library_model(tmp_path / "theirs", "llama-gqa")
    conversion = convert(tmp_path / "theirs", tmp_path / "rounded", to="huggingface", dtype="bfloat16")
    assert conversion.proof is not None
    assert len(conversion.proof.comparisons) == 3
    assert all(each.max_difference < 1e-5 for each in conversion.proof.comparisons)
    assert conversion.proof.rounding is not None
    assert conversion.proof.rounding.max_difference > 1e-4


def test_damaged_weights_are_not_converted(tmp_path: Path) -> None:
    save_library_model(tmp_path / "theirs", "gpt2")
    convert(tmp_path / "theirs", tmp_path / "run", proof=None)
    file = next((tmp_path / "run" / "checkpoints" / "step-00000000").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    said = refusal(lambda: convert(tmp_path / "run", tmp_path / "back", proof=None))
    assert f"{file.name}: digest differs from the manifest: the file is damaged" in said
    assert not (tmp_path / "back").exists()


def test_tokens_and_positions_reach_the_ends() -> None:
    from harness.convert.proof import _proof_tokens

    for kind, last in (("gpt2", 39), ("llama-rope-scaling", 79)):
        section = SECTIONS[kind]
        tokens, positions = _proof_tokens(section)
        assert tokens.shape == positions.shape
        assert positions[0, -1] == last
        assert positions[0, 0] == 0
        assert (positions.diff() > 0).all()
        assert section.vocab_size is not None
        assert len(torch.unique(tokens)) > 20
        assert int(tokens.max()) == section.vocab_size - 1
