"""What users of other kernels ran into, each under the project and number where they said so.

Not here: label sentinels under a shared vocabulary (ml-cross-entropy 59) and label smoothing there (Megatron-LM 7452),
which take several ranks: vocab_parallel_*.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from harness.kernels import OUTPUTS, VocabShard, linear_cross_entropy
from harness.kernels.linear_cross_entropy import sweep
from tests.kernels.cases import draw, relative_error, solve


def chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "chunk_length", lambda *_: tokens)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ml_cross_entropy_14_liger_512_and_827_bf16_accumulation_of_the_weight_gradient(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 256 chunks that add to the same row in bf16 would stop at 256 times the first addend, or drift.
    chunks_of(4, monkeypatch)
    problem = draw(1024, 8, 13, dtype=torch.bfloat16)
    problem.hidden = (1 + torch.rand(1024, 8)).bfloat16()
    problem.weight, problem.targets[:] = problem.weight / 8, 3
    _, (_, exact_grad), upstream = solve(
        problem, torch.rand(1024) if reduction == "none" else torch.tensor(0.7), implementation="reference",
        reduction=reduction,
    )  # fmt: skip
    _, (_, got), _ = solve(problem, upstream, reduction=reduction)
    assert relative_error(got, exact_grad) <= 2**-8

    weight = problem.weight.requires_grad_()
    weight.grad_dtype = torch.float32
    output = linear_cross_entropy(
        problem.hidden, weight, problem.targets, reduction=reduction, weight_grad_dtype=torch.float32
    )
    output.loss.backward(upstream.to(output.loss.dtype))
    assert weight.grad.dtype == torch.float32
    wide = problem.weight.detach().double().requires_grad_()
    reference = linear_cross_entropy(
        problem.hidden, wide, problem.targets, reduction=reduction, implementation="reference"
    )
    reference.loss.backward(upstream.double())
    assert relative_error(weight.grad, wide.grad) < 1e-5


def test_without_grad_dtype_autograd_rounds_an_fp32_weight_gradient() -> None:
    problem = draw(33, 8, 13, dtype=torch.bfloat16)
    weight = problem.weight.requires_grad_()
    linear_cross_entropy(problem.hidden, weight, problem.targets, weight_grad_dtype=torch.float32).loss.backward()
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [1, 64, 257])
def test_ml_cross_entropy_52_bias_counted_once_whatever_the_dimension(dim: int) -> None:
    problem = draw(19, dim, 23)
    problem.bias *= 5
    output, gradients, upstream = solve(problem, bias=True, reduction="sum")
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    exact = F.cross_entropy(F.linear(*leaves), problem.targets, reduction="sum")
    assert relative_error(output.loss.detach(), exact.detach()) < 1e-12
    for got, wanted in zip(gradients, torch.autograd.grad(exact, leaves, upstream), strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ml_cross_entropy_49_all_ignored(reduction: str) -> None:
    problem = draw(7, 5, 11, ignored=1.0)
    output, gradients, _ = solve(problem, reduction=reduction, bias=True, class_weights=True, z_loss=0.1)
    assert output.loss.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("probability", [0.99, 0.9999, 1 - 1e-6])
def test_liger_1329_p_minus_1_at_near_certainty(probability: float) -> None:
    # With bf16 logits p − 1 is off by 20 % at 0.99; as a difference in fp32 by 5 % at 1 − 1e-6.
    margin = torch.tensor(probability / (1 - probability)).log()
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.eye(3, dtype=dtype).requires_grad_()
        weight = (torch.eye(3) * margin).to(dtype).requires_grad_()
        linear_cross_entropy(hidden, weight, torch.arange(3), reduction="sum").loss.backward()
        wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        F.cross_entropy(wide[0] @ wide[1].T, torch.arange(3), reduction="sum").backward()
        for got, wanted in zip((hidden, weight), wide, strict=True):
            ratio = got.grad.double() / wanted.grad
            assert (ratio - 1).abs().max() < (2e-6 if dtype == torch.float32 else 2**-8)


def test_liger_1298_weight_gradient_of_unequal_tokens() -> None:
    problem = draw(41, 7, 23)
    upstream = torch.logspace(-3, 3, 41, dtype=torch.float64) * (-1.0) ** torch.arange(41)
    _, gradients, _ = solve(problem, upstream, reduction="none")
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
    exact = F.cross_entropy(leaves[0] @ leaves[1].T, problem.targets, reduction="none")
    wanted = torch.autograd.grad(exact, leaves, upstream)
    assert all(relative_error(got, want) < 1e-12 for got, want in zip(gradients, wanted, strict=True))
    ones = torch.autograd.grad(F.cross_entropy(leaves[0] @ leaves[1].T, problem.targets, reduction="sum"), leaves)
    assert relative_error(gradients[1], ones[1]) > 0.1


def test_trl_7266_more_than_2_31_logits() -> None:
    # Most tokens are ignored; they count for the indices, and not for the time.
    tokens, vocab_size = 2**20 + 3, 2**11 + 5
    assert tokens * vocab_size > 2**31
    hidden, weight = torch.randn(tokens, 1), torch.randn(vocab_size, 1)
    targets = torch.full((tokens,), -100)
    last = slice(tokens - 3000, tokens)
    targets[:5], targets[last] = 3, torch.randint(0, vocab_size, (3000,))
    kept = torch.cat([torch.arange(5), torch.arange(tokens - 3000, tokens)])
    results = []
    for places in (slice(None), kept):
        leaves = hidden[places].requires_grad_(), weight.clone().requires_grad_()
        output = linear_cross_entropy(*leaves, targets[places], reduction="sum", outputs=("entropy",))
        results.append((output.loss, output.entropy, *torch.autograd.grad(output.loss, leaves)))
    (loss, entropy, hidden_grad, weight_grad), exact = results
    assert relative_error(loss.detach(), exact[0].detach()) < 1e-6
    assert torch.equal(entropy[kept], exact[1])
    assert torch.equal(hidden_grad[kept], exact[2])
    assert torch.equal(weight_grad, exact[3])


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_liger_767_and_ml_cross_entropy_31_an_empty_weight_is_refused(shape: tuple[int, ...]) -> None:
    hidden, targets = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight must be \(V, D\) with V and D at least 1, got shape \(0.*") as caught:
        linear_cross_entropy(hidden, torch.empty(shape), targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ml_cross_entropy_48_the_softcap_is_applied(reduction: str) -> None:
    problem = draw(19, 5, 23)
    problem.hidden *= 10
    output, gradients, upstream = solve(problem, reduction=reduction, softcap=2.0)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
    exact = F.cross_entropy(2 * torch.tanh(leaves[0] @ leaves[1].T / 2), problem.targets, reduction=reduction)
    wanted = torch.autograd.grad(exact, leaves, upstream)
    assert relative_error(output.loss.detach(), exact.detach()) < 1e-12
    assert all(relative_error(got, want) < 1e-12 for got, want in zip(gradients, wanted, strict=True))


def test_unsloth_10616_softcap_and_padding_of_minus_infinity() -> None:
    problem = draw(12, 5, 11, padding=6, ignored=0.2)
    problem.weight[11:], problem.bias[11:] = 0.0, float("-inf")
    output, gradients, _ = solve(problem, bias=True, softcap=3.0, outputs=OUTPUTS, label_smoothing=0.1)
    assert output.loss.isfinite()
    assert all(getattr(output, name).isfinite().all() for name in OUTPUTS)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[1][11:].eq(0).all()
    assert gradients[2][11:].eq(0).all()


def test_megatron_7452_label_smoothing_over_the_real_vocabulary() -> None:
    # By V and not by the rows, and of all other tokens as of the target.
    problem = draw(19, 5, 23, padding=7)
    output, gradients, upstream = solve(problem, label_smoothing=0.3)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
    exact = F.cross_entropy(leaves[0] @ leaves[1][:23].T, problem.targets, label_smoothing=0.3)
    wanted = torch.autograd.grad(exact, leaves, upstream)
    assert relative_error(output.loss.detach(), exact.detach()) < 1e-12
    assert all(relative_error(got, want) < 1e-12 for got, want in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("sentinel", [-100, -1, 2**31, 12])
def test_ml_cross_entropy_59_a_sentinel_is_no_row(sentinel: int) -> None:
    # 12 is a padded row: as ignore_index it is ignored, and its row gets no gradient.
    problem = draw(20, 5, 11, padding=6, ignored=0.4, ignore_index=sentinel)
    output, gradients, upstream = solve(problem, ignore_index=sentinel)
    problem.targets[problem.targets == sentinel] = -100
    exact, exact_gradients, _ = solve(problem, upstream)
    assert torch.equal(output.loss, exact.loss)
    assert all(torch.equal(got, wanted) for got, wanted in zip(gradients, exact_gradients, strict=True))
    assert problem.shard == VocabShard(0, 17, 11)


def test_ml_cross_entropy_6_and_verl_4676_import_and_run_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from harness.kernels import linear_cross_entropy\n"
        "weight = torch.randn(5, 3, requires_grad=True)\n"
        "linear_cross_entropy(torch.randn(4, 3), weight, torch.arange(4)).loss.backward()\n"
        "print(weight.grad.shape)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "torch.Size([5, 3])", result.stderr
