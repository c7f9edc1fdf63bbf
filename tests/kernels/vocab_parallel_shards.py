"""Topics of a shared vocabulary about the shards themselves: how long they live, their copies, those that do not fit
each other or the call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch

from harness.kernels import CompSum, VocabShard, linear_cross_entropy
from tests.kernels.cases import solve
from tests.kernels.vocab_parallel_ranks import REDUCTIONS, Ranks, draw_cut


def a_shard_is_dropped(ranks: Ranks) -> None:
    """A backward that computes the logits again needs the shard, and says so; one that has its gradients doesn't."""
    for reduction in REDUCTIONS:
        for output in (None, "lse"):
            ranks.label = f"{reduction}, {output or 'loss'} differentiated"
            problem, ends = draw_cut(ranks, 12, 5, 23, padding=4)
            own = ranks.part(problem, ends, False)
            _, wanted, _ = solve(own, torch.tensor(0.7, dtype=torch.float64), reduction="sum")
            hidden, key = own.hidden.clone().requires_grad_(), own.shard.key
            result = linear_cross_entropy(
                hidden, own.weight, own.targets, shard=own.shard, reduction=reduction, outputs=("lse",)
            )
            total = (result.loss if output is None else getattr(result, output)).sum() * 0.7
            del own
            said = "nothing raised"
            try:
                total.backward()
            except RuntimeError as error:
                said = str(error)
            if reduction != "none" and output is None:
                ranks.expect(said == "nothing raised", said)
                scale = 1 / 12 if reduction == "mean" else 1.0
                assert hidden.grad is not None
                ranks.expect_close("gradient of hidden", hidden.grad, wanted[0] * scale, wanted[0] * scale, 1e-13)
            else:
                line = f"{key}: dropped, or of another process; keep the VocabShard as long as its losses"
                ranks.expect(said == line, f"said {said!r}, must say {line!r}")


def copies_of_a_shard(ranks: Ranks) -> None:
    ranks.label = "copies"
    alone = VocabShard(0, 5, 4)
    for copied in (copy.copy(alone), copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        ranks.expect(copied == alone and copied.ranks == 1 and not copied.key, f"{copied}")
        linear_cross_entropy(torch.randn(3, 2), torch.randn(5, 2), torch.zeros(3).long(), shard=copied)
    # A model that holds one may be copied: the copy has to be found after the first is gone.
    for duplicate in (copy.copy, copy.deepcopy):
        problem, ends = draw_cut(ranks, 12, 5, 23, padding=4)
        own = ranks.part(problem, ends, False)
        own.shard = duplicate(own.shard)
        solve(own, reduction="none")
    try:
        pickle.dumps(own.shard)
        said = "nothing raised"
    except TypeError as error:
        said = str(error)
    ranks.expect("ProcessGroup" in said, f"pickling a shard with a group: {said}")


def shards_that_do_not_fit(ranks: Ranks) -> None:
    """The same line on all ranks, whichever of them is wrong; and afterwards they still meet."""
    last = ranks.count - 1
    hidden, targets = torch.randn(4 * ranks.count, 3), torch.zeros(4 * ranks.count, dtype=torch.int64)
    ways: dict[str, dict[str, Any]] = {
        "in need of gradients": {},
        "under no_grad": {},
        "none": {"reduction": "none"},
        "reference": {"implementation": "reference"},
    }
    start, stop = 5 * ranks.rank, 5 * ranks.rank + 5
    odd = ranks.rank == last
    consecutive = "since ranks hold consecutive rows from 0 on"
    for way, settings in ways.items():
        ranks.label = f"bad shards, {way}"

        def loss(
            start: int,
            stop: int,
            vocab_size: int = 5,
            rows: int | None = None,
            sequence_parallel: bool = False,
            way: str = way,
            settings: dict[str, Any] = settings,
        ) -> None:
            shard = VocabShard(start, stop, vocab_size, ranks.group, sequence_parallel)
            weight = torch.zeros(stop - start if rows is None else rows, 3, requires_grad=True)
            mine = hidden.chunk(ranks.count)[ranks.rank] if sequence_parallel else hidden
            with torch.set_grad_enabled(way != "under no_grad"):
                linear_cross_entropy(mine, weight, targets, shard=shard, **settings)

        fault = f"shard of rank {last}:"
        ranks.expect_same_error(
            f"{fault} start is {5 * last + 1}, must be {5 * last}, {consecutive}", lambda: loss(start + odd, stop)
        )
        ranks.expect_same_error(
            f"shard of rank 0: start is 5, must be 0, {consecutive}", lambda: loss(start + 5, stop + 5)
        )
        ranks.expect_same_error(
            f"{fault} [{5 * last}, {5 * last + 5}) is not the 6 rows of its weight",
            lambda: loss(start, stop, rows=5 + odd),
        )
        ranks.expect_same_error(
            f"{fault} vocab_size is 6, on rank 0 5; it must be the same", lambda: loss(start, stop, vocab_size=5 + odd)
        )
        ranks.expect_same_error(
            f"{fault} sequence_parallel is 1, on rank 0 0; it must be the same",
            lambda: loss(start, stop, sequence_parallel=odd),
        )
        ranks.expect_same_error(
            f"shard.vocab_size 99 exceeds the {5 * ranks.count} rows of all ranks' weights",
            lambda: loss(start, stop, vocab_size=99),
        )
        loss(start, stop)
    agreed = VocabShard(start, stop, 5, ranks.group)
    linear_cross_entropy(hidden, torch.zeros(5, 3), targets, shard=agreed)
    ranks.expect_same_error(
        f"weight has 4 rows, its shard [{start}, {stop}) another number",
        lambda: linear_cross_entropy(hidden, torch.zeros(4, 3), targets, shard=agreed),
    )


def arguments_that_do_not_fit(ranks: Ranks) -> None:
    """Refused on all ranks before any of them waits for others."""
    ranks.label = "arguments"
    rows, tokens = 5, 4 * ranks.count
    vocab_size, start = rows * ranks.count, rows * ranks.rank
    hidden, weight = torch.randn(tokens, 3), torch.randn(rows, 3)
    targets = torch.zeros(tokens, dtype=torch.int64)
    shard = VocabShard(start, start + rows, vocab_size, ranks.group)
    split = VocabShard(start, start + rows, vocab_size, ranks.group, sequence_parallel=True)
    linear_cross_entropy(hidden, weight, targets, shard=shard)

    def refused(line: str, **given: Any) -> None:
        arguments = {"hidden": hidden, "weight": weight, "targets": targets, "shard": shard, **given}
        ranks.expect_same_error(line, lambda: linear_cross_entropy(**arguments))

    refused(
        f"class_weights must have shape ({vocab_size},), one for each token of the whole vocabulary, got ({rows},)",
        class_weights=torch.ones(rows),
    )
    refused(
        f"hidden ({tokens}, 3) must hold 1/{ranks.count} of the {tokens} tokens of targets ({tokens},), since "
        f"shard.sequence_parallel divides them equally among {ranks.count} ranks",
        shard=split,
    )
    refused(
        f"perturbed_hidden must be like hidden, (4, 3) on cpu, got ({tokens}, 3) torch.float32 on cpu",
        shard=split,
        hidden=hidden.chunk(ranks.count)[ranks.rank],
        perturbed_hidden=hidden,
        loss=CompSum(nu=0.1),
    )
    wrong = targets.clone()
    wrong[2] = vocab_size
    for reduction in REDUCTIONS:
        refused(
            f"targets[2] is {vocab_size}: neither a token id in [0, {vocab_size}) nor ignore_index -100",
            targets=wrong,
            reduction=reduction,
        )
    linear_cross_entropy(hidden, weight, targets, shard=shard)
