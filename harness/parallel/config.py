"""The configuration of where a run computes, and how its work is divided."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.config import Section


class ZeroSection(Section):
    """What DeepSpeed's ZeRO stages 1 to 3 may be told; without effect on stage 0."""

    bucket_elements: int = Field(50_000_000, ge=1)
    """Elements that are reduced or gathered in one collective at stages 1 and 2, and reduced at stage 3."""

    overlap: bool = True
    """Reduce gradients while the backward pass goes on."""

    keep_whole_below: int = Field(100_000, ge=0)
    """Stage 3: parameters of at most so many elements stay whole on every rank (DeepSpeed's
    stage3_param_persistence_threshold)."""

    live_elements: int = Field(1_000_000_000, ge=1)
    """Stage 3: elements that may be gathered at one time (stage3_max_live_parameters)."""

    reuse_distance: int = Field(1_000_000_000, ge=0)
    """Stage 3: a parameter used again within so many elements is not released (stage3_max_reuse_distance)."""

    prefetch_elements: int = Field(50_000_000, ge=0)
    """Stage 3: elements that are gathered ahead of their use (stage3_prefetch_bucket_size)."""


class ParallelSection(Section):
    """Devices and processes. The number of processes is the launcher's; `tensor` of them share one model, and the
    rest is data parallelism: data-parallel size = processes / tensor."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes the GPU where torch sees one, else the CPU; the choice is in environment.json."""

    threads: int | None = Field(None, ge=1)
    """CPU threads that torch computes with. null: as torch chooses (one a core, or OMP_NUM_THREADS)."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size: how many neighbouring ranks share each layer's weights. Divides model.heads,
    model.kv_heads and the MLP's width; best no larger than one machine's GPUs."""

    sequence_parallel: bool = False
    """Divide the activations between the blocks' products over the tensor-parallel ranks too (Korthikanti et al., arXiv
    2205.05198): less memory, the same volume of communication. Needs tensor of at least 2."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks divide among them (Rajbhandari et al., arXiv 1910.02054). 0: nothing, plain torch.
    1: optimizer state and masters. 2: gradients too. 3: weights too. 1 to 3 run DeepSpeed (the extra `zero`)."""

    zero: ZeroSection = ZeroSection()
    """Tuning of stages 1 to 3."""

    timeout_seconds: float = Field(600.0, gt=0)
    """How long a collective operation may wait for the other ranks before the run ends with an error, in seconds."""

    lost_after_seconds: float = Field(30.0, ge=1)
    """A rank without a sign of life for so long is lost, and the run ends, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel divides among tensor-parallel ranks: set tensor to 2 or more, or it to false"
            )
        return self

    def on_one_process(self) -> ParallelSection:
        """The same devices, nothing divided: for work on a trained model, whatever layout trained it."""
        return self.model_copy(update={"tensor": 1, "sequence_parallel": False, "zero_stage": 0})
