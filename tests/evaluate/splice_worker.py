"""Splices on several real ranks; started by torchrun from test_splice_ranks.py. `splice_worker.py JOB`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.config import validate
from harness.data import DataSection, EvaluationWindows, Prepared, prepare
from harness.evaluate import SpliceResult, splice
from harness.evaluate.splice_arms import site_means
from harness.model import ModelSection, build_decoder, tap_sites
from harness.parallel import ParallelLayout, ParallelSection

MODEL = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 4, "max_positions": 24, "init_std": 0.25, "seed": 5}


def halve(x: Tensor) -> Tensor:
    return x / 2


ARMS = {
    "values": {"layers.0.v": torch.tanh, "layers.1.v": torch.tanh},
    "halved stream": {"layers.0.residual_between": halve},
    "scores": {"layers.1.q": halve, "layers.1.k": halve, "layers.1.attention_out": torch.tanh},
    "last": {"final_residual": torch.tanh, "layers.1.residual_after": halve, "layers.0.mlp_out": halve},
}


def measure(
    layout: ParallelLayout, model_section: ModelSection, data: DataSection, prepared: Prepared
) -> tuple[SpliceResult, dict[str, Tensor]]:
    """The arms and the means of all sites on this layout."""
    model = build_decoder(model_section, seed=5, tensor=layout.tensor_parallel())
    windows = EvaluationWindows(prepared, data, "validation", 2, layout.data_rank, layout.data_size, limit_samples=9)
    result = splice(model, ARMS, windows, skip_first=3, skip_last=1, add_up=layout.sum_over_data)
    batches = [batch for _, batch in windows]
    return result, site_means(model, tap_sites(model), batches, layout.sum_over_data)


def model_of(family: str, vocabulary: int) -> ModelSection:
    values: dict[str, Any] = {**MODEL, "family": family, "vocab_size": vocabulary}
    values.pop("seed")
    if family == "gpt2":
        values.pop("kv_heads")
    return validate(ModelSection, values, "splice_worker")


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    data = validate(DataSection, job["data"], "splice_worker")
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)):
        prepared = prepare(data)
        for case in job["cases"]:
            parallel = {"device": "cpu", "tensor": case["tensor"], "sequence_parallel": case["sequence_parallel"]}
            with ParallelLayout(validate(ParallelSection, parallel, "splice_worker")) as layout:
                section = model_of(case["family"], prepared.tokenizer.vocab_size)
                result, means = measure(layout, section, data, prepared)
                told = {
                    "result": result.as_json(),
                    "means": {site: mean.tolist() for site, mean in means.items()},
                    "tensor_rank": layout.tensor_rank,
                }
                every: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(every, told)
                if layout.rank == 0:
                    (Path(job["folder"]) / f"{case['name']}.json").write_text(json.dumps(every))


if __name__ == "__main__":
    main()
