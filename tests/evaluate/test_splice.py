"""Splicing against transformers' models with hooks, in float64, and standard errors against their definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.config import HarnessError
from harness.data import IGNORED, Batch
from harness.evaluate import splice
from harness.model import Decoder, build_decoder, tap_sites
from tests.model.reference import reference_model
from tests.model.sections import SECTIONS

Function = Callable[[Tensor], Tensor]
LENGTH = 9


def sharp_model(name: str, **options: bool) -> Decoder:
    """Random weights large enough that every site matters."""
    section = SECTIONS[name].model_copy(update={"init_std": 0.25})
    return build_decoder(section, seed=int(torch.randint(1 << 30, ())), **options)


def ragged_batches(vocabulary: int) -> list[Batch]:
    """Windows with holes, one of them without any target."""
    batches = []
    for rows in (3, 1, 4):
        tokens, targets = torch.randint(vocabulary, (2, rows, LENGTH))
        targets[torch.rand(rows, LENGTH) < torch.rand(rows, 1)] = IGNORED
        targets[:, 4] = 5
        batches.append(Batch(tokens, targets))
    batches[-1].targets[2] = IGNORED
    return batches


def hook_gpt2(model: nn.Module, site: str, function: Function) -> list[torch.utils.hooks.RemovableHandle]:
    """Install `function` in a GPT-2 of transformers with the means of torch alone."""
    if site == "final_residual":
        return [model.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]),))]
    _, layer, place = site.split(".")
    block = model.transformer.h[int(layer)]

    def of_output(_: nn.Module, __: object, output: Tensor | tuple) -> Tensor | tuple:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    if place == "residual_before":
        return [block.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]), *inputs[1:]))]
    if place == "residual_between":  # f(x + a) is x plus what attention would have to add for it: f(x + a) - x
        seen = {}

        def replace_attention(_: nn.Module, __: object, output: tuple) -> tuple:
            return (function(seen["x"] + output[0]) - seen["x"], *output[1:])

        before = block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
        return [before, block.attn.register_forward_hook(replace_attention)]
    if place in "qkv":

        def of_third(_: nn.Module, __: object, output: Tensor) -> Tensor:
            thirds = list(output.chunk(3, -1))
            number = "qkv".index(place)
            heads = thirds[number].unflatten(-1, (model.config.n_head, -1))
            thirds[number] = function(heads).flatten(-2)
            return torch.cat(thirds, -1)

        return [block.attn.c_attn.register_forward_hook(of_third)]
    module = {"attention_out": block.attn, "mlp_out": block.mlp, "residual_after": block}[place]
    return [module.register_forward_hook(of_output)]


class Truth:
    """Per-token losses in float64, from logits of transformers' model."""

    def __init__(self, model: Decoder, batches: list[Batch], skip_first: int, skip_last: int) -> None:
        self.model = reference_model(model.section, model).eval().double()
        self.batches = batches
        self.scored = []
        for batch in batches:
            keep = batch.targets != IGNORED
            keep[:, :skip_first] = False
            keep[:, LENGTH - skip_last :] = False
            self.scored.append(keep)
        self.windows = np.concatenate([(100 * n + keep.nonzero()[:, 0]).numpy() for n, keep in enumerate(self.scored)])

    @torch.no_grad()
    def losses(self, functions: dict[str, Function]) -> np.ndarray:
        handles = [handle for item in functions.items() for handle in hook_gpt2(self.model, *item)]
        found = []
        for batch, keep in zip(self.batches, self.scored, strict=True):
            logits = self.model(batch.tokens).logits
            found.append(nn.functional.cross_entropy(logits[keep], batch.targets[keep], reduction="none").numpy())
        for handle in handles:
            handle.remove()
        return np.concatenate(found)

    def mean(self, site: str) -> Tensor:
        kept: list[Tensor] = []
        self.losses({site: lambda x: kept.append(x) or x})
        return torch.cat([x[keep] for x, keep in zip(kept, self.scored, strict=True)]).mean(0)


def errors_by_definition(difference: np.ndarray, windows: np.ndarray) -> tuple[float, float]:
    """Of a mean: for windows that are drawn together, and for tokens that are drawn one by one."""
    count, mean = len(difference), difference.mean()
    residuals = [np.sum(difference[windows == window] - mean) for window in np.unique(windows)]
    clusters = len(residuals)
    by_window = math.sqrt(clusters / (clusters - 1) * np.sum(np.square(residuals))) / count
    return by_window, float(np.std(difference, ddof=1) / math.sqrt(count))


def gate(gains: Tensor, x: Tensor) -> Tensor:
    return x * gains.to(x.dtype) + 0.2 * torch.tanh(x)


@pytest.mark.parametrize(("skip_first", "skip_last"), [(0, 0), (2, 1)])
def test_every_site_follows_hooks_in_float64(skip_first: int, skip_last: int) -> None:
    model = sharp_model("gpt2")
    section = model.section
    batches = ragged_batches(section.vocab_size)
    truth = Truth(model, batches, skip_first, skip_last)
    arms = {}
    for site in tap_sites(model):
        width = section.head_width if site[-1] in "qkv" else section.hidden_size
        arms[site] = {site: partial(gate, torch.rand(width))}
    pair = ["layers.0.v", "layers.1.mlp_out"]
    arms["both"] = {site: arms[site][site] for site in pair}
    result = splice(model, arms, batches, skip_first=skip_first, skip_last=skip_last)
    original = truth.losses({})
    assert (result.tokens, result.windows) == (len(original), len(np.unique(truth.windows)))
    assert result.windows == 7
    assert result.loss == pytest.approx(original.mean(), rel=1e-5)
    assert result.arms["identity"].delta == 0.0
    assert result.arms["identity"].standard_error == result.arms["identity"].token_standard_error == 0.0
    assert len(result.arms["identity"].sites) == len(tap_sites(model))
    for name, functions in arms.items():
        means = {site: truth.mean(site) for site in functions}
        losses = {
            name: truth.losses(functions),
            f"zero of {name}": truth.losses(dict.fromkeys(functions, torch.zeros_like)),
            f"mean of {name}": truth.losses({site: lambda x, m=m: m.expand_as(x) for site, m in means.items()}),
        }
        zero, mean = losses[f"zero of {name}"].mean(), losses[f"mean of {name}"].mean()
        for key, expected in losses.items():
            found, difference = result.arms[key], expected - original
            assert found.loss == pytest.approx(expected.mean(), rel=2e-5), key
            assert found.delta == pytest.approx(difference.mean(), rel=1e-4, abs=2e-5), key
            by_window, by_token = errors_by_definition(difference, truth.windows)
            assert found.standard_error == pytest.approx(by_window, rel=1e-3, abs=1e-5), key
            assert found.token_standard_error == pytest.approx(by_token, rel=1e-3, abs=1e-5), key
            for kind, ablated in (("zero", zero), ("mean", mean)):
                if abs(ablated - original.mean()) > 0.01:  # k's mean costs nothing: it adds the same to all scores
                    share = (ablated - expected.mean()) / (ablated - original.mean())
                    assert found.recovered[kind] == pytest.approx(share, rel=5e-3, abs=5e-3), (key, kind)
    assert result.arms["zero of both"].recovered["zero"] == 0.0
    assert sum(abs(result.arms[name].delta) > 0.01 for name in arms) > 12, "sites that change nothing prove nothing"


def test_one_arm_keeps_plain_names_and_reads_as_text_and_json() -> None:
    model = sharp_model("llama-qk-norm")
    batches = ragged_batches(model.section.vocab_size)
    result = splice(model, {"layers.1.q": torch.zeros_like}, [("corpus", batch) for batch in batches], skip_last=1)
    assert list(result.arms) == ["arm", "identity", "zero", "mean"]
    assert result.arms["arm"].loss == result.arms["zero"].loss != result.loss
    assert (result.arms["identity"].recovered["zero"], result.arms["arm"].recovered["zero"]) == (1.0, 0.0)
    head, titles, *rows = result.table()
    assert f"{result.tokens} tokens of 7 windows, without the first 0 and the last 1 of each" in head
    assert " ".join(titles.split()) == "arm CE delta CE +- windows +- tokens of zero of mean"
    assert [row.split()[0] for row in rows] == list(result.arms)
    assert rows[1].split()[2:5] == ["0", "0.000000", "0.000000"]
    assert len({len(row) for row in (titles, *rows)}) == 1
    read = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert read["arms"]["arm"]["delta"] == result.arms["arm"].delta
    assert model.training, "left as it was found"
    one = Batch(batches[0].tokens[:1], torch.full((1, LENGTH), IGNORED).index_fill(1, torch.tensor(4), 3))
    alone = splice(model, {"layers.1.q": torch.tanh}, iter([one]), references=["identity"])
    assert math.isnan(alone.arms["arm"].standard_error)
    assert alone.as_json()["arms"]["arm"]["token_standard_error"] is None
    assert alone.table()[-2].split()[-2:] == ["-", "-"]


def test_dropout_is_off_and_compiled_blocks_give_the_same_bits() -> None:
    section = SECTIONS["llama"].model_copy(update={"dropout": 0.5})
    batches = ragged_batches(section.vocab_size)
    arms = {"layers.0.mlp_out": torch.tanh}
    plain, compiled = (
        splice(build_decoder(section, seed=3, compile_blocks=compile_blocks), arms, batches)
        for compile_blocks in (False, True)
    )
    assert plain == compiled
    assert plain.arms["arm"].delta != 0.0


def test_what_does_not_fit_is_said_in_one_line() -> None:
    model = sharp_model("gpt2")
    batches = ragged_batches(211)
    site = "layers.0.mlp_out"

    def refused(words: str, arms: object, items: object = batches, **options: object) -> None:
        with pytest.raises(HarnessError, match=words) as caught:
            splice(model, arms, items, **options)
        assert "\n" not in str(caught.value)
        assert not any(tap.replacement for tap in tap_sites(model).values())

    refused(r"arm 'arm': 'layers.0.mlp' is no site .* layers.0 to layers.1 with .* .v, .*mlp_out.*; final_residual.*"
            r"\(did you mean layers.0.mlp_out\?\)", {"layers.0.mlp": torch.tanh})  # fmt: skip
    refused("no arms", {})
    refused("arm 'a' should map sites to functions", {"a": {}})
    refused("arm 'b' should map", {"a": {site: torch.tanh}, "b": torch.tanh})
    refused("'zero' is the name of a reference", {"zero": {site: torch.tanh}})
    refused("reference 'median' is unknown; there are identity, zero, mean", {site: torch.tanh}, references=["median"])
    refused(r"layers.0.mlp_out: its function made torch.float64 \(3, 9, 48\) on cpu of torch.float32 \(3, 9, 48\)",
            {site: Tensor.double})  # fmt: skip
    refused(r"torch.float32 \(3, 9, 47\) on cpu of .* \(3, 9, 48\)", {site: lambda x: x[..., 1:]})
    refused("returned NoneType, no tensor", {site: lambda x: None})
    refused("arm 'bad' .layers.0.mlp_out.: the loss of .* tokens is not finite",
            {"good": {site: torch.tanh}, "bad": {site: lambda x: x / 0}})  # fmt: skip
    refused("no batches", {site: torch.tanh}, [])
    refused("only once", {site: torch.tanh}, iter(batches))
    refused("should be 0 or more", {site: torch.tanh}, skip_first=-1)
    refused("no token is left to score in windows of 9 without the first 8", {site: torch.tanh}, skip_first=8,
            skip_last=1)  # fmt: skip
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    refused("the model as it is: the loss of", {site: torch.tanh})


def test_an_identity_that_changes_losses_is_refused() -> None:
    model = sharp_model("gpt2")
    calls = []

    def unsteady(x: Tensor) -> Tensor:
        calls.append(x)
        return x * (1 + 1e-4 * len(calls))

    model.final_norm.register_forward_hook(lambda _, __, output: unsteady(output))
    with pytest.raises(HarnessError, match=r"identity changes the loss of .* no difference is to be trusted"):
        splice(model, {"layers.0.q": torch.tanh}, ragged_batches(211), references=["identity"])
