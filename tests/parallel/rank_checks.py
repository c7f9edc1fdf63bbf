"""Checks that run on several real ranks; started by torchrun from test_ranks.py. `rank_checks.py NAME ...`"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import harness.model.dropout
from harness.config import HarnessError, validate
from harness.model import Decoder, ModelSection, build_decoder, initialise_masters
from harness.parallel import (
    Engine,
    ParallelLayout,
    ParallelSection,
    TorchEngine,
    build_divider,
    build_engine,
)

DIVIDED = {"keep_whole_below": 0, "live_elements": 1, "reuse_distance": 0, "prefetch_elements": 0}


def section(**changes: Any) -> ModelSection:
    values = {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 4, "max_positions": 16, "vocab_size": 90}
    return validate(ModelSection, {**values, **changes}, "rank_checks")


def layouts(**changes: Any) -> Iterator[ParallelLayout]:
    """Every layout of this number of processes."""
    world = dist.get_world_size()
    for tensor in (size for size in (1, 2, 4) if world % size == 0):
        for stage in range(4):
            for sequence in (False, True) if tensor > 1 else (False,):
                settings = {"tensor": tensor, "zero_stage": stage, "sequence_parallel": sequence, "zero": DIVIDED}
                with ParallelLayout(validate(ParallelSection, {"device": "cpu", **settings}, "checks")) as layout:
                    yield layout


def in_turn(*choices: Sequence[Any]) -> Iterator[tuple[ParallelLayout, tuple[Any, ...]]]:
    """Every layout with one combination of choices, such that each ZeRO stage meets as many as it has layouts."""
    combinations = list(product(*choices))
    seen = [0] * 4
    for layout in layouts():
        stage = layout.section.zero_stage
        yield layout, combinations[(stage + seen[stage]) % len(combinations)]
        seen[stage] += 1


def build(layout: ParallelLayout, precision: str, model_section: ModelSection) -> tuple[Decoder, Engine]:
    model = build_decoder(
        model_section, seed=5, tensor=layout.tensor_parallel(), divide=build_divider(layout, precision)
    )
    engine = build_engine(
        model, lambda masters: torch.optim.AdamW(masters.values(), eps=1e-4), precision, model.placements(), layout
    )
    return model, engine


def close(ours: Tensor, theirs: Tensor, where: object, **tolerances: float) -> None:
    torch.testing.assert_close(ours, theirs, msg=lambda text: f"{where}: {text}", **tolerances)


def every_rank(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


# ---- initial weights -------------------------------------------------------------------------------------------------


def check_initial_weights() -> None:
    """Masters are the one-rank model's weights, bit for bit, whatever holds them, and each exactly once."""
    models = [section(), section(family="llama", kv_heads=4, heads=8, qk_norm=True)]
    for layout, (precision, model_section) in in_turn(("fp32", "bf16"), models):
        expected = dict(build_decoder(model_section, seed=5).named_parameters())
        _, engine = build(layout, precision, model_section)
        if precision == "bf16" and layout.section.zero_stage > 0:
            initialise_masters(engine.fragments(), model_section, 5)
        engine.refresh_weights()
        for fragment in engine.fragments():
            if fragment.kind == "master":
                real = expected[fragment.name][: fragment.global_shape[0]]
                assert torch.equal(fragment.tensor, real[fragment.slices]), (layout, fragment.key)
        sizes = {name: torch.zeros(1) for name in expected}
        for fragment in engine.fragments(owned=True):
            if fragment.kind == "master":
                sizes[fragment.name] += fragment.tensor.numel()
        for name, size in sizes.items():
            dist.all_reduce(size)
            rows = 90 if name in ("token_embedding.weight", "head.weight") else len(expected[name])
            assert int(size) == rows * expected[name][0].numel(), (layout, name)


# ---- the engine ------------------------------------------------------------------------------------------------------


class Batches:
    """Random tokens with ragged targets; the same on every rank, which takes its data rank's share."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, micro_batches: int, data_size: int) -> tuple[list[Tensor], list[Tensor], int]:
        shape = (micro_batches, data_size * 2, 16)
        tokens = torch.randint(0, 90, shape, generator=self._generator)
        targets = torch.randint(0, 90, shape, generator=self._generator)
        kept = (
            torch.rand(shape, generator=self._generator) < torch.rand(shape[:2], generator=self._generator)[..., None]
        )
        targets[~kept] = -100
        return list(tokens), list(targets), int((targets >= 0).sum())


Step = tuple[list[Tensor], list[Tensor], int]


def run_step(engine: Engine, data: Step, rank: int, size: int, bad: bool = False) -> None:
    tokens, targets, count = data
    for number, (inputs, labels) in enumerate(zip(tokens, targets, strict=True), 1):
        mine = slice(rank * 2, rank * 2 + 2) if size > 1 else slice(None)
        loss = engine.module(inputs[mine], labels[mine]).loss
        if bad and number == 1:
            loss = loss * float("nan")
        engine.backward(loss, count, last=number == len(tokens))


def check_steps() -> None:
    """Accumulation of changing length, clipping, a skipped step, a NaN on one rank: beside one rank's engine."""
    for layout in layouts():
        model_section = section(tied_head=layout.section.zero_stage < 2)
        if layout.section.zero_stage % 2 == 0:
            model_section = section(
                family="llama", heads=8, kv_heads=4, qk_norm=True, tied_head=model_section.tied_head
            )
        _, engine = build(layout, "fp32", model_section)
        alone = build_decoder(model_section, seed=5)
        plain = TorchEngine(alone, lambda masters: torch.optim.AdamW(masters.values(), eps=1e-4), "fp32")
        batches = Batches(7)
        for number, micro_batches in enumerate((3, 1, 2, 2, 4, 1)):
            data = batches.step(micro_batches, layout.data_size)
            rank, size = layout.data_rank, layout.data_size
            if number in (1, 3):  # 1: skipped on purpose; 3: one rank has a NaN
                run_step(engine, data, rank, size, bad=number == 3 and layout.rank == dist.get_world_size() - 1)
                norm = engine.grad_norm()
                assert bool(norm.isnan()) == (number == 3), (layout, number, norm)
                if number == 3:
                    assert all(bool(each.isnan()) for each in every_rank(norm)), layout
                engine.clip(0.1)
                engine.skip()
                continue
            run_step(engine, data, rank, size)
            run_step(plain, data, 0, 1)
            norms = every_rank(engine.grad_norm())
            assert all(torch.equal(norm, norms[0]) for norm in norms), layout
            close(norms[0], plain.grad_norm(), layout, rtol=2e-6, atol=0)
            for each in (engine, plain):
                if number != 2:
                    each.clip(0.1)  # far below the norm
                each.step(3e-3)
        expected = {(f.kind, f.name): f for f in plain.fragments()}
        for fragment in engine.fragments():
            ours, theirs = fragment.tensor, expected[fragment.kind, fragment.name].tensor
            theirs = theirs[fragment.slices] if theirs.dim() else theirs
            close(ours, theirs, (layout, fragment.key), rtol=1e-4, atol=2e-7)
            if fragment.kind == "step":
                assert float(ours) == 4.0, (layout, "a skipped step does not count")


def check_unused_parameters() -> None:
    """Stage 0 sums gradients of parameters that only some ranks' losses depend on, or none's."""
    with ParallelLayout(ParallelSection(device="cpu")) as layout:
        model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("everywhere", "here and there", "nowhere")})
        nn.init.ones_(model["here and there"].weight)
        engine = TorchEngine(model, lambda masters: torch.optim.AdamW(masters.values()), "fp32", None, layout)
        for last in (False, True):
            loss = model["everywhere"](torch.ones(1, 3)).sum()
            if layout.rank == 1:
                loss = loss + model["here and there"](torch.ones(1, 3)).sum()
            engine.backward(loss, 1, last=last)
        expected = torch.tensor(8 * (2.0 * layout.world_size) ** 2 + 8 * 2.0**2).sqrt()
        torch.testing.assert_close(engine.grad_norm(), expected)


def check_fragments_load() -> None:
    """State that is loaded into fragments is what the model computes with after refresh_weights."""
    for layout, (precision,) in in_turn(("fp32", "bf16")):
        model, engine = build(layout, precision, section())
        held = {getattr(weight, "ds_tensor", weight).dtype for weight in model.parameters()}
        assert held == {torch.float32 if precision == "fp32" else torch.bfloat16}, (layout, held)
        other = copy.deepcopy(dict(build_decoder(section(), seed=6).named_parameters()))
        for fragment in engine.fragments():
            if fragment.kind == "master":
                fragment.tensor.copy_(other[fragment.name].detach()[fragment.slices])
        engine.refresh_weights()
        alone = build_decoder(section(), seed=6)
        if precision == "bf16":
            alone = alone.to(torch.bfloat16)
        tokens = torch.arange(32).reshape(2, 16) % 90
        with torch.no_grad():
            ours, theirs = model(tokens, tokens).loss, alone(tokens, tokens).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if precision == "fp32" else 2e-3, atol=0)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def check_dropout() -> None:
    """Masks agree where tensor-parallel ranks hold the same activations, differ where they hold different ones and
    between data-parallel ranks, and come again."""
    dropping = section(dropout=0.5)
    tokens = torch.arange(32).reshape(2, 16) % 90
    for layout in layouts():
        if layout.section.zero_stage:
            continue
        model = build_decoder(dropping, seed=5, tensor=layout.tensor_parallel())
        masks: dict[str, Tensor] = {}
        seeds: dict[str, int] = {}
        original = harness.model.dropout.seed_dropout

        def record(device: torch.device, seed: int, place: str, tensor_rank: int | None) -> None:
            original(device, seed, place, tensor_rank)  # noqa: B023
            seeds[place] = torch.default_generator.initial_seed()  # noqa: B023

        harness.model.dropout.seed_dropout = record  # type: ignore[assignment]
        for name, module in model.named_modules():
            if type(module).__name__ == "Dropout":
                module.register_forward_hook(lambda _, inputs, output, name=name: masks.update({name: output == 0}))  # noqa: B023

        def forward(step: int) -> tuple[dict[str, Tensor], dict[str, int], Tensor]:
            layout.seed_everything(3, "step", step)  # noqa: B023
            loss = model(tokens, tokens).loss  # noqa: B023
            return dict(masks), dict(seeds), loss.detach()  # noqa: B023

        first, first_seeds, loss = forward(1)
        other, _, _ = forward(2)
        again, again_seeds, loss_again = forward(1)
        harness.model.dropout.seed_dropout = original  # type: ignore[assignment]
        assert len(first) == 5, "the embedding, and two a block"
        assert len(first_seeds) == 7, "and the attention weights of each block"
        assert first_seeds == again_seeds
        assert torch.equal(loss, loss_again)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)
        for place, seed in first_seeds.items():
            name = place if place == "embedding" else place.replace("_out", "_dropout")
            tensor_seeds = [int(each) for each in every_rank(torch.tensor(seed), layout.tensor_group)]
            data_seeds = [int(each) for each in every_rank(torch.tensor(seed), layout.data_group)]
            assert len(set(data_seeds)) == layout.data_size, (layout, place)
            sharded = place.endswith("weights") or (layout.section.sequence_parallel and place != "embedding")
            assert len(set(tensor_seeds)) == (layout.tensor_size if sharded else 1), (layout, place)
            if name in first or place == "embedding":
                mask = first["dropout" if place == "embedding" else name].float()
                assert 0.35 < mask.mean() < 0.65
                copies = every_rank(mask, layout.tensor_group)
                same = all(torch.equal(each, copies[0]) for each in copies)
                assert same == (not sharded or layout.tensor_size == 1), (layout, place)


# ---- what ranks tell each other --------------------------------------------------------------------------------------


def check_messages() -> None:
    with ParallelLayout(ParallelSection(device="cpu")) as layout:
        assert layout.first_decides(lambda: {"a": [layout.rank, 0.1]}) == {"a": [0, 0.1]}
        assert layout.first_number(layout.rank + 7) == 7
        size = layout.world_size
        assert layout.all_max([layout.rank == 1, -layout.rank, 5]) == [1, 0, 5]
        # From threads too, beside collectives of the main thread, on two channels at a time.
        channels = [layout.channel(), layout.channel()]
        with ThreadPoolExecutor(2) as pool:
            for turn in range(5):
                sums = [pool.submit(channel.add_up, [layout.rank, turn, 0, -1]) for channel in channels]
                layout.all_max([turn])
                assert [each.result() for each in sums] == [[size * (size - 1) // 2, turn * size, 0, -size]] * 2
                mine = [f"{turn}.{layout.rank}.{line}" for line in range(layout.rank)]
                said = [f"{turn}.{rank}.{line}" for rank in range(size) for line in range(rank)]
                assert channels[0].all_lines(mine) == said
                assert channels[0].all_lines([]) == []
        assert layout.sum_over_data(torch.tensor(layout.rank + 1)) == sum(range(1, layout.world_size + 1))

        def refuse() -> None:
            raise HarnessError("no such thing; use another")

        with pytest.raises(HarnessError, match="no such thing; use another") as caught:
            layout.first_decides(refuse)
        assert getattr(caught.value, "said_elsewhere", False) == (layout.rank != 0)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def main() -> None:
    torch.set_num_threads(1)
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as layout:
        for name in sys.argv[1:]:
            CHECKS[name]()
            if layout.rank == 0:
                print("passed", name, flush=True)


if __name__ == "__main__":
    main()
