"""The gradient filter: what it leaves out is within the bound, and what it may not touch is as without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.kernels import linear_cross_entropy
from tests.kernels import interpreter
from tests.kernels.cases import Problem, differentiate, draw

pytestmark = pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))

TILE_TOKENS, TILE_COLUMNS = 32, 64


def sharp(tokens: int, vocab_size: int) -> Problem:
    """Neighbouring tokens that agree on few tiles of the vocabulary: there is something to leave out."""
    problem = draw(tokens, 16, vocab_size, ignored=0.1)
    tiles = -(-vocab_size // TILE_COLUMNS)
    liked = torch.arange(tokens) // TILE_TOKENS % tiles
    # Targets of a token tile's own liking, or the next tile's: random ones would need all tiles.
    chosen = (liked + torch.randint(0, 2, (tokens,))) % tiles * TILE_COLUMNS + torch.randint(0, TILE_COLUMNS, (tokens,))
    problem.targets = torch.where(problem.targets == -100, problem.targets, chosen.clamp(max=vocab_size - 1))
    directions = torch.randn(tiles, 16, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    problem.hidden = 0.5 * problem.hidden + 16 * directions[liked]
    problem.weight = problem.weight / 6 + directions[torch.arange(vocab_size) // TILE_COLUMNS]
    for name in ("hidden", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).float())
    return problem


def solve(problem: Problem, upstream: Tensor, **settings: object) -> tuple[object, list[Tensor]]:
    with interpreter.sizes(descriptors=False, chunk=64, strip=128):
        output, gradients, _ = differentiate(
            problem, ("loss",), {"loss": upstream}, implementation="triton", reduction="none", bias=True, **settings
        )
    return output, gradients


@pytest.mark.parametrize("filter_weight", [False, True])
@pytest.mark.parametrize("bound", [1e-4, 0.01, 0.2])
def test_a_token_loses_no_more_than_the_bound(bound: float, filter_weight: bool) -> None:
    problem = sharp(150, 600)
    upstream = torch.randn(150)
    plain, dense = solve(problem, upstream)
    output, gradients = solve(problem, upstream, filter_bound=bound, filter_weight=filter_weight)
    assert torch.equal(output.loss, plain.loss)
    assert plain.kept_share is None
    assert 0.0 < output.kept_share < 1.0
    longest = problem.weight.norm(dim=1).max()
    lost = (gradients[0] - dense[0]).norm(dim=1)
    assert lost.max() > 0.0
    assert (lost <= bound * longest * upstream.abs() + 1e-5 * dense[0].abs().max()).all()
    for got, wanted in zip(gradients[1:], dense[1:], strict=True):
        if filter_weight:  # a column loses what its tokens lose, each at most the bound
            assert (got - wanted).abs().max() <= bound * upstream.abs().sum() * problem.hidden.abs().max()
        else:
            assert torch.equal(got, wanted)


def test_the_kept_share_is_what_is_multiplied_out() -> None:
    """Counted from the softmax itself."""
    problem, bound = sharp(96, 640), 0.05
    output, _ = solve(problem, torch.ones(96), filter_bound=bound)
    logits = problem.hidden.double() @ problem.weight.double().T + problem.bias.double()
    masses = logits.softmax(1).unflatten(1, (-1, TILE_COLUMNS)).sum(2)
    least, order = masses.sort(dim=1)
    needed = torch.ones_like(masses, dtype=torch.bool).scatter(1, order, least.cumsum(1) > bound)
    counted = problem.targets != -100
    needed[counted, problem.targets[counted] // TILE_COLUMNS] = True
    needed &= counted[:, None]
    kept = needed.unflatten(0, (-1, TILE_TOKENS)).any(1)
    assert abs(float(output.kept_share) - float(kept.double().mean())) < 1e-6


def test_a_bound_of_nothing_is_no_filter() -> None:
    problem, upstream = sharp(64, 200), torch.randn(64)
    output, gradients = solve(problem, upstream, filter_bound=0.0)
    assert output.kept_share is None
    assert all(torch.equal(*pair) for pair in zip(gradients, solve(problem, upstream)[1], strict=True))


def test_the_likeliest_token_is_kept_where_its_probability_is_differentiated() -> None:
    """Its gradient is −max_prob at every other token: nothing that a bound on p covers."""
    problem = sharp(64, 640)
    upstream = {"max_prob": torch.randn(64)}
    arguments = {"implementation": "triton", "outputs": ("max_prob",), "reduction": "none"}
    with interpreter.sizes(descriptors=False):
        _, dense, _ = differentiate(problem, ("max_prob",), upstream, **arguments)
        output, (hidden, _), _ = differentiate(problem, ("max_prob",), upstream, filter_bound=0.3, **arguments)
    assert output.kept_share < 1.0
    longest = problem.weight.norm(dim=1).max()
    bound = 0.3 * longest * (upstream["max_prob"] * output.max_prob.detach()).abs() + 1e-5
    assert ((hidden - dense[0]).norm(dim=1) <= bound).all()


def test_a_flat_softmax_keeps_all_but_the_bound() -> None:
    problem = draw(64, 16, 640, dtype=torch.float32)
    problem.weight *= 1e-3
    problem.bias *= 1e-3
    output, _ = solve(problem, torch.ones(64), filter_bound=0.05)
    assert output.kept_share == 1.0  # each of ten tiles has a tenth


def test_the_blocked_form_leaves_out_nothing() -> None:
    problem = draw(9, 8, 30)
    output = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, filter_bound=0.1)
    assert output.kept_share == 1.0
