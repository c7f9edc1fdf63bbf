"""GPT-2 at its true shape, once: out of the library and back into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from harness.cli import main
from harness.convert import convert, open_source, streamed_logits
from harness.data import TokenizerSection, open_tokenizer
from harness.model import ModelSection, count_parameters
from tests.convert.test_tokenizers import byte_level_bpe

pytestmark = pytest.mark.slow


def test_gpt2_124m(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT2LMHeadModel(GPT2Config()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)  # gains and biases too
    model.save_pretrained(tmp_path / "theirs")
    definition = tmp_path / "theirs" / "tokenizer.json"
    definition.write_bytes(byte_level_bpe(["def read_lines(path):\n    return 日本語", "the lazy dog; " * 9]))
    there = convert(tmp_path / "theirs", tmp_path / "run", proof="transformers")
    back = convert(tmp_path / "run", tmp_path / "back", proof="transformers")
    with capsys.disabled():
        print("\n".join([*there.lines(), *back.lines()]))
    section = open_source(tmp_path / "run").section
    shape = ModelSection(shape="gpt2-124m", vocab_size=50257)  # type: ignore[call-arg]
    assert section.architecture() == shape.architecture()
    assert there.record["weights"]["parameters"] == count_parameters(shape).total == 124_439_808

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    theirs = model.state_dict()
    assert theirs.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in theirs.items())
    tokens, positions = torch.randint(50257, (2, 1024)), torch.arange(1024)[None].expand(2, -1)
    with torch.inference_mode():
        expected = model(tokens).logits
    found = streamed_logits(open_source(tmp_path / "run"), tokens, positions)
    difference, largest = (found - expected).abs().max(), expected.abs().max()
    with capsys.disabled():
        print(f"2 x 1024 tokens: largest difference {difference:.3g}, logits up to {largest:.3g}")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    ours = open_tokenizer(TokenizerSection(kind="huggingface", path=str(definition)))
    text = "def read_lines(path):\n    return 日本語"
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    assert prompt.input_ids[0].tolist() == ours.encode(text)
    with torch.inference_mode():
        written = loaded.generate(
            **prompt,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(ours.vocab_size, 50257)),  # the model knows more tokens than the tokenizer
        )
    capsys.readouterr()
    options = [f"generate.prompt={text}", "generate.temperature=0", "generate.max_tokens=12"]
    assert main(["generate", str(tmp_path / "back"), *options]) == 0
    new = [int(token) for token in written[0, prompt.input_ids.shape[1] :]]
    assert capsys.readouterr().out == text + ours.decode(new) + "\n"
