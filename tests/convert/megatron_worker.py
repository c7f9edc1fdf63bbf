"""Megatron-core itself, on two ranks with tensor parallelism: reads the folders that a test wrote, computes logits, and
writes its own.

Started as a program by the test, once a rank. Where Megatron-core calls CUDA, the CPU is put in its place: nothing that
it computes or stores changes.
- its attention and its rotary tables allocate on `torch.cuda.current_device()`;
- `dist_checkpointing.save` waits for copies with `torch.cuda.synchronize()`;
- it starts a process to hold a queue, which one of this process does as well (and at once);
- its attention draws dropout from CUDA generators, also where the rate is 0.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

RANKS = 2
NAMINGS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "numbered": {"non_homogeneous_layers": True},
    "apart": {"singleton_local_shards": True},
}


def build_model(described: dict[str, dict[str, Any]]) -> torch.nn.Module:
    """The GPTModel of a harness_model.json."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    values, model = dict(described["transformer_config"]), dict(described["gpt_model"])
    values["activation_func"] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[
        values["activation_func"]
    ]
    config = TransformerConfig(
        **values,
        tensor_model_parallel_size=RANKS,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    model["vocab_size"] = -(-model["vocab_size"] // 8) * 8
    model["max_sequence_length"] = model["max_sequence_length"] or 64
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    return GPTModel(config, spec, **model, parallel_output=False).eval()


def randomise(model: torch.nn.Module, rank: int) -> None:
    """Every parameter far from where it starts, and the same on all ranks where all have the same."""
    for name, weight in model.named_parameters():
        own = rank if getattr(weight, "tensor_model_parallel", False) else 0
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + own)
        with torch.no_grad():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) + (0.5 if weight.dim() == 1 else 0.0))


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    count = tokens.shape[1]
    masked = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(tokens, torch.arange(count).expand_as(tokens), masked)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    random.get_cuda_rng_tracker().fork = contextlib.nullcontext
    filesystem_async._results_queue = queue.Queue()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    results: dict[str, torch.Tensor] = {}

    def save(model: torch.nn.Module, name: str, naming: str) -> None:
        target = folder / "theirs" / name
        target.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(
            model.sharded_state_dict(metadata={"dp_cp_group": group, **NAMINGS[naming]}), str(target)
        )

    for ours in sorted((folder / "ours").iterdir()):
        described = json.loads((ours / "harness_model.json").read_text())
        tokens = torch.load(folder / f"{ours.name}.tokens.pt")
        model = build_model(described)
        model.load_state_dict(
            dist_checkpointing.load(model.sharded_state_dict(metadata={"dp_cp_group": group}), str(ours))
        )
        results[f"{ours.name} ours"] = logits(model, tokens)
        save(model, f"{ours.name}-again", "stacked")
        randomise(model, rank)
        results[f"{ours.name} theirs"] = logits(model, tokens)
        for naming in NAMINGS:
            save(model, f"{ours.name}-{naming}", naming)
    if rank == 0:
        torch.save(results, folder / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
