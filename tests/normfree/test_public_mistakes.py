"""What goes wrong in public code for norm removal: a test named after each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import runs
from harness.data import prepare
from harness.model import Decoder, ModelSection, SiteState, build_decoder, norm_sites
from harness.train import Trainer, train
from tests.model.frozen_reference import reference_logits, sigmas
from tests.model.sections import SECTIONS
from tests.model.test_switchable import draw, random_decoder
from tests.normfree.independent_loop import independent_loop
from tests.normfree.small_removal import TIMES, small_removal
from tests.normfree.test_removal import removal_state

GPT2, LLAMA = SECTIONS["gpt2"], SECTIONS["llama"]


def counted(model: Decoder, tokens: Tensor, **options: Any) -> dict[str, np.ndarray]:
    """The sums of one training pass and its backward pass."""
    states = model.norm_states
    assert states is not None
    model.train()
    states.gather(True)
    loss = model(tokens, tokens, **options).loss
    states.gather(False)
    loss.backward()
    return states.take(lambda sums: sums)


def test_sigma_is_not_taken_from_one_sequence() -> None:
    model, tokens = random_decoder(GPT2, 1), draw(GPT2, 6)
    model.token_embedding.weight.data[tokens[0]] *= 40  # the first row is unlike the others
    sums = counted(model, tokens)["final"].sum(0)
    seen: dict[str, Tensor] = {}
    reference_logits(model, tokens, {}, seen)
    sigma = sigmas(seen["final"], True, GPT2.norm_epsilon).detach()
    assert sums[1] / sums[0] == pytest.approx(sigma.mean().item(), rel=1e-5)
    assert sums[1] / sums[0] != pytest.approx(sigma[0].mean().item(), rel=0.1)


def test_sigma_of_qk_stands_still_while_v_is_still_real(tmp_path: Path) -> None:
    """They share a module, and in public code a buffer: qk's drifts on until v is removed."""
    times = {**TIMES, "qk": {"first": 4}, "v": {"first": 13}, "final": {"first": 14}}
    run = train(small_removal(tmp_path, norm_removal={"times": times})).folder
    frozen = [removal_state(run, step)["sites"]["layers.0.qk"] for step in range(4, 15)]
    assert frozen == [frozen[0]] * 11
    drift = [removal_state(run, step)["averages"]["sites"]["layers.0.qk"][0] for step in (4, 14)]
    assert abs(drift[1] / drift[0] - 1) > 1e-3, "what was measured meanwhile did move"
    assert removal_state(run, 14)["sites"]["layers.0.v"]["sigma"] != frozen[0]["sigma"]


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_the_average_moves_once_a_step_and_not_once_a_micro_batch(tmp_path: Path, micro: int) -> None:
    settings = small_removal(tmp_path, train={"steps": 14, "global_batch_size": 8, "micro_batch_size": micro})
    state = removal_state(train(settings).folder, 14)
    events = {site: when[0] for site, when in state["began"].items()}
    for site, sigma in independent_loop(settings, events).frozen.items():
        assert state["sites"][site]["sigma"] == pytest.approx(sigma, rel=2e-5), site


def test_evaluation_does_not_move_the_average(tmp_path: Path) -> None:
    states = []
    for number, every in enumerate((None, 1)):
        validation = {"every_steps": every, "samples": 8, "batch_size": 4}
        settings = small_removal(tmp_path, run={"name": f"run-{number}"}, validation=validation)
        states.append(removal_state(train(settings).folder, 14))
    assert states[0] == states[1]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_do_not_move_the_average_again(tmp_path: Path, recompute: str) -> None:
    states = []
    for way in ("none", recompute):
        train_section = {"steps": 14, "global_batch_size": 8, "recompute": way}
        settings = small_removal(tmp_path, run={"name": way}, train=train_section)
        states.append(removal_state(train(settings).folder, 14))
    assert states[0] == states[1]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("section", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_no_forward_pass_waits_for_the_device(section: ModelSection, alpha: float) -> None:
    model, tokens = random_decoder(section, 2).train(), draw(section)
    states = model.norm_states
    assert states is not None
    with Waits() as waits:
        states.set({site.name: SiteState(alpha, 1.1) for site in norm_sites(section)})
        states.gather(True)
        model.hidden_states(tokens)
        states.gather(False)
    assert waits.count == 0
    with Waits() as waits:
        float(tokens.sum())
    assert waits.count == 1, "the count counts"


def test_without_a_bias_the_mean_is_still_taken_away() -> None:
    """LayerNorm centres whatever becomes of its bias: a frozen site with a bias of zero is no RMSNorm."""
    model, tokens = random_decoder(GPT2, 3).double(), draw(GPT2)
    for block in model.layers:
        block.attention_norm.bias.data.zero_()
        block.mlp_norm.bias.data.zero_()
    model.token_embedding.weight.data += 3.0  # a mean worth taking away
    states = {site.name: SiteState(1.0, 0.8) for site in norm_sites(GPT2)}
    assert model.norm_states is not None
    model.norm_states.set(states)
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(tokens).double(), reference_logits(model, tokens, states), rtol=1e-5, atol=1e-4
        )


def test_the_first_position_is_a_row_and_not_a_channel() -> None:
    """`x[:, 0]` of flattened tokens is channel 0. What a frozen norm does to position 0 it does to all of it, and to
    channel 0 of other positions nothing else."""
    model, tokens = random_decoder(LLAMA, 4).train(), draw(LLAMA, 3, 11)
    sums = counted(model, tokens)
    seen: dict[str, Tensor] = {}
    reference_logits(model, tokens, {}, seen)
    for site, (ordinary, others) in sums.items():
        sigma = sigmas(seen[site], False, LLAMA.norm_epsilon).detach()
        assert (ordinary[0], others[0]) == (30, 3)
        assert others[1] == pytest.approx(sigma[:, 0].sum().item(), rel=1e-5), site


def test_statistics_are_not_those_of_one_rank() -> None:
    """On real ranks: test_layouts.py. Here: what other ranks add comes in before the mean."""
    model, tokens = random_decoder(GPT2, 5), draw(GPT2, 4)
    whole = counted(model, tokens)["final"]
    first, second = counted(model, tokens[:1])["final"], counted(model, tokens[1:])["final"]
    np.testing.assert_allclose(first + second, whole, rtol=1e-6)
    states = model.norm_states
    assert states is not None
    calls = []
    states.take(lambda sums: calls.append(tuple(sums.shape)) or sums)  # type: ignore[func-returns-value]
    assert calls == [(2 * GPT2.layers + 1, 2, 3)], "one small tensor, once"


def test_weights_are_not_pure_bf16(tmp_path: Path) -> None:
    """Masters, averages and frozen sigmas are not: updates and differences of one part in 256 would be lost."""
    settings = small_removal(tmp_path, train={"steps": 14, "global_batch_size": 8, "precision": "bf16"})
    trainers: list[Trainer] = []

    from harness.callbacks import Callback

    class Look(Callback):
        name = "look"

        def after_training(self, trainer: Any) -> None:
            trainers.append(trainer)

    state = removal_state(train(settings, [Look()]).folder, 14)
    (trainer,) = trainers
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}
    masters = [fragment.tensor for fragment in trainer.engine.fragments() if fragment.kind == "master"]
    assert {tensor.dtype for tensor in masters} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in masters)
    exact = small_removal(tmp_path, run={"name": "exact"}, train={"steps": 14, "global_batch_size": 8})
    truth = removal_state(train(exact).folder, 14)
    for site, expected in truth["sites"].items():
        assert state["sites"][site]["sigma"] == pytest.approx(expected["sigma"], rel=0.02), site
    norm = trainer.model.layers[0].mlp_norm
    assert (norm.alpha.dtype, norm.inverse.dtype, norm.sums.dtype) == (torch.float32, torch.float32, torch.float64)


def test_a_resume_needs_no_configuration_of_its_own(tmp_path: Path) -> None:
    """Public schedules are arithmetic on the step since the start of the process. Here the checkpoint's state wins:
    what is gone stays as it went, whatever the configuration has become."""
    first = small_removal(tmp_path, norm_removal={"ramp_steps": 1}, train={"steps": 14})
    stopped = first.model_copy(update={"train": first.train.model_copy(update={"steps": 12})})
    run = train(stopped).folder
    before = removal_state(run, 12)
    changed = small_removal(
        tmp_path,
        norm_removal={"times": {**TIMES, "mlp": {"first": 9}, "final": {"first": 13}}, "average_steps": 2},
        train={"steps": 14},
    )
    train(changed)
    after = removal_state(run, 14)
    for site, state in before["sites"].items():
        assert after["sites"][site] == state, site
    assert len([event for event in runs.read(run).events if event["event"] == "norm_removed"]) == 7


def test_end_of_text_is_the_tokenizers_own(tmp_path: Path) -> None:
    settings = small_removal(tmp_path)
    tokenizer = prepare(settings.data).tokenizer
    assert tokenizer.eod != 50256
    for end, others in ((tokenizer.eod, 1 + 3), (tokenizer.eod + 1, 1 + 2)):
        section = settings.resolved(tokenizer.vocab_size + 1).model
        model = build_decoder(section, seed=0, switchable_norms=True)
        model.end_of_text = end
        tokens = torch.full((1, 20), 65)
        tokens[0, [4, 9, 13]] = tokenizer.eod
        tokens[0, [2, 7]] = tokenizer.eod + 1
        assert counted(model, tokens)["final"][1, 0] == others


def test_every_packed_document_has_a_first_position() -> None:
    model = random_decoder(GPT2, 6)
    tokens = draw(GPT2, 2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12])
    positions = torch.tensor([[*range(5), *range(4), *range(3)], [*range(12)]])
    assert counted(model, tokens, positions=positions, document_ids=documents)["final"][1, 0] == 3 + 1


def test_there_is_a_control_of_plain_fine_tuning(tmp_path: Path) -> None:
    """Test_removal.py has what controls do; and that a gap is against one of as many tokens, test_rollback.py."""
    run = train(small_removal(tmp_path, norm_removal={"control": "plain"})).folder
    assert {record["norm_sites_left"] for record in runs.read(run).metrics} == {7}
