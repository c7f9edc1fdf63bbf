"""Each bad input, and the line that it gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.kernels import CompSum, VocabShard, linear_cross_entropy
from harness.kernels.linear_cross_entropy import checks

HIDDEN, WEIGHT, TARGETS = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.int64)

BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.randn(2, 3, 5)}, r"hidden \(2, 3, 5\) must end in the D of weight \(7, 4\)"),
    ({"hidden": torch.randn(2, 4)}, r"targets \(2, 3\) must have the shape of hidden \(2, 4\) without D"),
    ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)}, "hidden has dtype torch.int64"),
    ({"weight": torch.randn(4)}, r"weight must be \(V, D\) with V and D at least 1, got shape \(4,\)"),
    ({"weight": torch.randn(7, 4).to_sparse()}, "weight must be a dense torch.Tensor, got a torch.sparse_coo tensor"),
    ({"class_weights": [1.0] * 7}, "class_weights must be a dense torch.Tensor, got list"),
    ({"shard": (0, 7, 7)}, "shard must be a VocabShard or None, got tuple"),
    ({"shift": 1.0}, "shift must be an int of 64 bits, got 1.0"),
    ({"ignore_index": None}, "ignore_index must be an int of 64 bits, got None"),
    ({"outputs": None}, "outputs must be a list or tuple of names, got NoneType"),
    ({"outputs": (name for name in ("lse",))}, "outputs must be a list or tuple of names, got generator"),
    ({"z_loss": "1e-4"}, "z_loss must be a number, got str"),
    ({"temperature": torch.tensor(1.0)}, "temperature must be a number, got a torch.strided tensor"),
    ({"weight": torch.randn(0, 4)}, r"weight must be \(V, D\) with V and D at least 1, got shape \(0, 4\)"),
    ({"weight": torch.randn(7, 4, device="meta")}, "weight is on meta, hidden on cpu"),
    ({"targets": TARGETS.int()}, "targets has dtype torch.int32; int64 token ids are wanted"),
    ({"bias": torch.randn(6)}, r"bias must have shape \(7,\), got \(6,\)"),
    ({"token_weights": torch.ones(6)}, r"token_weights \(6,\) must have the shape of targets \(2, 3\)"),
    ({"token_weights": torch.ones(2, 3, requires_grad=True)}, "token_weights gets no gradient"),
    ({"class_weights": torch.ones(6)}, r"class_weights must have shape \(7,\), one for each token .*, got \(6,\)"),
    ({"class_weights": torch.ones(7, requires_grad=True)}, "class_weights gets no gradient: detach it"),
    ({"class_weights": torch.ones(7, dtype=torch.int64)}, "class_weights has dtype torch.int64; float32, bfloat16"),
    ({"class_weights": torch.ones(7), "shard": VocabShard(0, 7, 5)}, r"class_weights must have shape \(5,\)"),
    ({"shift": -1}, "shift must not be negative, got -1"),
    ({"loss": "cross_entropy"}, "loss must be a CrossEntropy or a CompSum, got 'cross_entropy'"),
    ({"loss": CompSum}, "loss must be a CrossEntropy or a CompSum, got <class"),
    ({"loss": CompSum(nu=0.5)}, "loss has nu 0.5: perturbed_hidden must be given, with the shape of hidden"),
    ({"perturbed_hidden": HIDDEN}, r"perturbed_hidden is only for a loss CompSum\(nu=...\) with nu above 0"),
    ({"perturbed_hidden": HIDDEN, "loss": CompSum()}, r"perturbed_hidden is only for a loss CompSum\(nu=...\)"),
    (
        {"perturbed_hidden": HIDDEN[:1], "loss": CompSum(nu=1.0)},
        r"perturbed_hidden must be like hidden, \(2, 3, 4\) on cpu, got \(1, 3, 4\) torch.float32 on cpu",
    ),
    (
        {"perturbed_hidden": HIDDEN.long(), "loss": CompSum(nu=1.0)},
        r"perturbed_hidden must be like hidden, \(2, 3, 4\) on cpu, got \(2, 3, 4\) torch.int64 on cpu",
    ),
    (
        {"perturbed_hidden": HIDDEN, "loss": CompSum(nu=1.0), "softcap": 2.0},
        "a loss with nu needs a linear head: it does not go together with softcap",
    ),
    ({"weight_grad_dtype": torch.int64}, "weight_grad_dtype must be a floating-point dtype or None, got torch.int64"),
    ({"filter_bound": 1.0}, r"filter_bound must lie in \[0, 1\), or be None for no filter, got 1.0"),
    ({"filter_bound": float("nan")}, r"filter_bound must lie in \[0, 1\), or be None for no filter, got nan"),
    ({"filter_bound": 0.1, "label_smoothing": 0.1}, "filter_bound does not go together with label_smoothing"),
    ({"temperature": float("nan")}, "temperature must be finite and positive, got nan"),
    ({"softcap": float("inf")}, "softcap must be finite and positive, or None for no cap, got inf"),
    ({"z_loss": float("inf")}, "z_loss must be finite and not negative, got inf"),
    ({"label_smoothing": 1.1}, r"label_smoothing must lie in \[0, 1\], got 1.1"),
    ({"label_smoothing": float("nan")}, r"label_smoothing must lie in \[0, 1\], got nan"),
    ({"z_loss": -0.1}, "z_loss must be finite and not negative, got -0.1"),
    ({"softcap": 0.0}, "softcap must be finite and positive, or None for no cap, got 0.0"),
    ({"temperature": 0.0}, "temperature must be finite and positive, got 0.0"),
    ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ({"outputs": ("logits",)}, "outputs may name lse, logprob, entropy, max_prob, correct; got 'logits'"),
    ({"outputs": "lse"}, r"outputs must be a sequence of names such as \('lse',\)"),
    ({"implementation": "cce"}, "implementation must be 'auto', 'blocked', 'triton' or 'reference', got 'cce'"),
    ({"shard": VocabShard(0, 8, 7)}, r"shard \[0, 8\) must be all 7 rows of weight"),
    ({"shard": VocabShard(1, 7, 7)}, r"shard \[1, 7\) must be all 7 rows of weight"),
    ({"shard": VocabShard(0, 7, 8)}, "shard.vocab_size 8 exceeds the 7 rows of weight"),
    ({"hidden": HIDDEN[:1], "shard": VocabShard(0, 7, 7, None, True)}, r"hidden \(1, 3, 4\) must hold 1/1 of the 6"),
]


@pytest.mark.parametrize(("change", "line"), BAD, ids=[line[:40] for _, line in BAD])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_bad_arguments(change: dict[str, Any], line: str, implementation: str) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "implementation": implementation, **change}
    with pytest.raises(ValueError, match=line) as caught:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [-1, 6, 7, -101, 2**40])
@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_a_target_out_of_range_is_named(target: int, implementation: str) -> None:
    # 6 is a row of the weight, but of its padding.
    targets = TARGETS.clone()
    targets[1, 2] = target
    with pytest.raises(ValueError, match=rf"targets\[1, 2\] is {target}: .*\[0, 6\) nor ignore_index -100"):
        linear_cross_entropy(HIDDEN, WEIGHT, targets, shard=VocabShard(0, 7, 6), implementation=implementation)


def test_a_target_out_of_range_is_asserted_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "host_sees", lambda tensor: False)
    linear_cross_entropy(HIDDEN, WEIGHT, TARGETS)
    with pytest.raises(RuntimeError, match=r"a target is neither a token id in \[0, 7\)"):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGETS + 7)


@pytest.mark.parametrize(
    ("constants", "line"),
    [
        ({"tau": -0.1}, "tau must be finite and not negative, got -0.1"),
        ({"tau": float("inf")}, "tau must be finite and not negative, got inf"),
        ({"tau": float("nan")}, "tau must be finite and not negative, got nan"),
        ({"rho": 0.0}, "rho must be finite and positive, got 0.0"),
        ({"nu": -1.0}, "nu must be finite and not negative, got -1.0"),
    ],
)
def test_impossible_comp_sum_losses(constants: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=f"CompSum: {line}"):
        CompSum(**constants)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.5, float("nan")])
def test_an_impossible_exponent_of_generalized_cross_entropy(q: float) -> None:
    with pytest.raises(ValueError, match=f"q must lie between 0 and 1, got {q}"):
        CompSum.generalized_cross_entropy(q)


def test_a_target_that_the_shift_drops_is_checked_too() -> None:
    targets = TARGETS.clone()
    targets[0, 0] = 9
    with pytest.raises(ValueError, match=r"targets\[0, 0\] is 9"):
        linear_cross_entropy(HIDDEN, WEIGHT, targets, shift=1)


@pytest.mark.parametrize(("start", "stop", "vocab_size"), [(-1, 4, 4), (4, 4, 4), (0, 4, 0)])
def test_impossible_shards(start: int, stop: int, vocab_size: int) -> None:
    with pytest.raises(ValueError, match="VocabShard"):
        VocabShard(start, stop, vocab_size)


def test_a_shard_of_a_group_that_this_process_is_not_in() -> None:
    with pytest.raises(ValueError, match="group must be a ProcessGroup that this process is in, or None, got -100"):
        VocabShard(0, 4, 4, group=dist.GroupMember.NON_GROUP_MEMBER)
