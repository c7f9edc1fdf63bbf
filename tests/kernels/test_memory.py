"""Memory, by the profiler's record of allocations: a chunk of logits beside the results, and no copies of those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness.kernels import linear_cross_entropy


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU, in order."""

    def walk(nodes: list[Any]) -> Iterator[Any]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as traced:
        work()
    events = [
        event
        for event in walk(traced.profiler.kineto_results.experimental_event_tree())
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation"
    ]
    return [event.extra_fields.alloc_size for event in sorted(events, key=lambda event: event.start_time_ns)]


def peak_bytes(work: Callable[[], object]) -> int:
    live = peak = 0
    for size in allocations(work):
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_memory_is_a_chunk_whatever_the_tokens(reduction: str) -> None:
    vocab_size, dim = 1500, 8
    weight = torch.randn(vocab_size, dim, requires_grad=True)
    beyond_results = {}
    for tokens in (2048, 6144):
        hidden = torch.randn(tokens, dim, requires_grad=True)
        targets = torch.randint(0, vocab_size, (tokens,))

        def work(hidden: Tensor = hidden, targets: Tensor = targets) -> None:
            weight.grad = hidden.grad = None
            loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).loss
            loss.backward(torch.full_like(loss, 0.3))

        peak = peak_bytes(work)
        assert peak > 1024 * vocab_size * 4  # the profiler sees the chunk at all
        beyond_results[tokens] = peak - 4 * (hidden.numel() + weight.numel())
    chunk_bytes = 1024 * vocab_size * 4
    assert max(beyond_results.values()) < 1.15 * chunk_bytes
    # What grows with the tokens is a few numbers each, far from a row of logits.
    assert beyond_results[6144] - beyond_results[2048] < 4096 * 64


def test_the_weight_gradient_is_handed_over_not_copied() -> None:
    weight = torch.randn(40_000, 32, requires_grad=True)
    hidden, targets = torch.randn(16, 32), torch.randint(0, 40_000, (16,))

    def work() -> None:
        (linear_cross_entropy(hidden, weight, targets, reduction="mean").loss * 0.5).backward()

    chunk_bytes = 16 * 40_000 * 4
    assert peak_bytes(work) < 1.05 * weight.numel() * 4 + chunk_bytes
