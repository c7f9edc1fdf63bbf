"""Everything that is known here about DeepSpeed: how it is started, and what is read from inside of it.

Private names are kept to one function each: `_hp_mapping` (stages 1 and 2: where a parameter's part lies in the flat
partition), `grad_position`, `fp32_partitioned_groups_flat`, `ds_tensor`, `ds_numel`, `ds_shape` (stage 3: the same),
`averaged_gradients` and `_get_norm_groups` (the reduced gradient before the step). pyproject.toml pins DeepSpeed for
them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.config import HarnessError

from .layout import ParallelLayout
from .torch_engine import initialise_state


class _ModelParallelUnit:
    """The groups, by the names that DeepSpeed asks for."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.data_group

    def get_data_parallel_rank(self) -> int:
        return self._layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._layout.data_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tensor_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def load(device: torch.device) -> Any:
    """The deepspeed module, quiet. Raises HarnessError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init wants it without a launcher, too
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13's warning about names that DeepSpeed calls, and that torch 2.11 has no others for.
    warnings.filterwarnings("ignore", message=r".*_tensor` is deprecated", category=FutureWarning)
    try:
        import deepspeed
    except ImportError:
        raise HarnessError(
            "parallel.zero_stage: stages 1 to 3 need DeepSpeed, which is not installed; pip install 'harness[zero]', "
            "or set parallel.zero_stage=0"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Its shared-memory collective would be compiled for minutes at the first use; gloo does the same.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settings(layout: ParallelLayout, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping is given for each step (clip_at), accumulation by `last`."""
    zero, stage = layout.section.zero, layout.section.zero_stage
    sharding: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": zero.overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.bucket_elements,
        "allgather_bucket_size": zero.bucket_elements,
    }
    if stage == 3:
        sharding |= {
            "stage3_param_persistence_threshold": zero.keep_whole_below,
            "stage3_max_live_parameters": zero.live_elements,
            "stage3_max_reuse_distance": zero.reuse_distance,
            "stage3_prefetch_bucket_size": zero.prefetch_elements,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its own throughput log reads this
        "gradient_accumulation_steps": 1,
        "zero_optimization": sharding,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def build_divider(layout: ParallelLayout, precision: str) -> Callable[[nn.Module], None]:
    """Stage 3's division of parameters, for parts of a model while it is built."""
    deepspeed = load(layout.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def divide(part: nn.Module) -> None:
        # Without mem_efficient_linear: it would replace torch's linear function in the whole process.
        deepspeed.zero.Init(
            module=part.to(dtype),  # which it does not cast by itself
            data_parallel_group=layout.data_group,
            config_dict_or_path=settings(layout, precision),
            mpu=_ModelParallelUnit(layout),
            dtype=dtype,
            mem_efficient_linear=False,
        )

    return divide


def start(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, layout: ParallelLayout) -> Access:
    """Hand model and optimizer to DeepSpeed."""
    deepspeed = load(layout.device)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings(layout, precision),
        mpu=_ModelParallelUnit(layout),
        dist_init_required=False,
    )
    if layout.section.zero_stage == 3:
        return Stage3Access(engine, optimizer, layout)
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        return Bf16Stage1Access(engine, optimizer, layout)
    return Access(engine, optimizer, layout)


class Access:
    """DeepSpeed's engine at stages 1 and 2."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, layout: ParallelLayout) -> None:
        self.engine = engine
        self._inner = optimizer
        """The torch optimizer that was handed in; its groups hold flat fp32 partitions now."""
        self._layout = layout

    @property
    def _outer(self) -> Any:
        """DeepSpeed's optimizer around it."""
        return self.engine.optimizer

    # ---- a step ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient; at the last micro-batch of a step it is reduced."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> Tensor:
        """DeepSpeed's own norm, ahead of its step; -1 or inf where it is not finite."""
        return self._outer.scaled_global_norm()

    def clip_at(self, norm: float) -> None:
        self._outer.clip_grad = norm

    def step(self, learning_rate: float) -> bool:
        """Whether the step was taken."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self._outer.clip_grad = 0.0
        return bool(self.engine.was_step_applied())

    def drop_gradients(self) -> None:
        """DeepSpeed drops a gradient that is not finite, on all ranks: so make it one."""
        for gradients in self._outer.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)
        self.engine.step()
        self._outer.clip_grad = 0.0
        assert not self.engine.was_step_applied(), "DeepSpeed took a step that was to be skipped"

    # ---- state -----------------------------------------------------------------------------------------------------

    def initialise_state(self) -> None:
        """Moments of zero and a count of zero for every partition."""
        initialise_state(self._inner)

    def shape(self, weight: nn.Parameter) -> tuple[int, ...]:
        """Of the tensor-parallel rank's parameter, before data-parallel ranks divided it."""
        return tuple(weight.shape)

    def local_state(self, weight: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        """Where this rank's range begins in the flattened parameter, and by kind a view of its values; of no elements
        where the rank has no part of it."""
        mapping = weight._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, self._views(self._flat(weight), 0, 0)
        address = mapping.hp_fragment_address
        return mapping.lp_fragment_address.start, self._views(self._flat(weight), address.start, address.numel)

    def step_count(self, weight: nn.Parameter) -> Tensor:
        """The optimizer's count for the partition that this parameter is in, or would be."""
        return self._inner.state[self._flat(weight)]["step"]

    def _views(self, flat: Tensor, start: int, size: int) -> dict[str, Tensor]:
        kinds = {"master": flat, **self._inner.state[flat]}
        return {kind: value.detach()[start : start + size] for kind, value in kinds.items() if value.dim() > 0}

    @torch.no_grad()
    def refresh_weights(self) -> None:
        self._outer.update_lp_params()

    def _flat(self, weight: nn.Parameter) -> Tensor:
        mapping = weight._hp_mapping  # type: ignore[attr-defined]
        return self._inner.param_groups[0 if mapping is None else mapping.param_group_index]["params"][0]


class Bf16Stage1Access(Access):
    """For stage 1 with bf16 weights and fp32 gradients DeepSpeed has an optimizer of its own."""

    def grad_norm(self) -> Tensor:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        gradients, _ = self._outer.get_grads_for_norm()
        return torch.as_tensor(get_global_norm_of_tensors(gradients, mpu=_ModelParallelUnit(self._layout)))

    def drop_gradients(self) -> None:
        self._outer.clear_hp_grads()
        self._outer.clear_lp_grads()
        self._outer.clip_grad = 0.0


class Stage3Access(Access):
    """DeepSpeed's engine at stage 3."""

    def grad_norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self._outer._get_norm_groups())

    def initialise_state(self) -> None:
        # Stage 3 shows the optimizer one sub-group at a time, and none between steps.
        groups = self._inner.param_groups
        for number, flat in enumerate(self._flats()):
            groups[self._outer.sub_group_to_group_id[number]]["params"].append(flat)
        initialise_state(self._inner)
        for group in groups:
            group["params"] = []

    def shape(self, weight: nn.Parameter) -> tuple[int, ...]:
        return tuple(weight.ds_shape)  # type: ignore[attr-defined]

    def local_state(self, weight: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        number, offset, size = self._outer.grad_position[self._outer.get_param_id(weight)]
        start = self._layout.data_rank * size
        real = max(min(size, weight.ds_numel - start), 0)  # type: ignore[attr-defined]
        return start if real else 0, self._views(self._flats()[number], offset, real)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        for group in self._outer.fp16_groups:
            for weight in group:
                number, offset, size = self._outer.grad_position[self._outer.get_param_id(weight)]
                weight.ds_tensor.data.copy_(self._flats()[number].detach()[offset : offset + size])
        # What stays whole on every rank is released and gathered again, as after a step.
        self._outer._partition_all_parameters()
        persistent = self._outer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def _flat(self, weight: nn.Parameter) -> Tensor:
        return self._flats()[self._outer.grad_position[self._outer.get_param_id(weight)][0]]

    def _flats(self) -> list[Tensor]:
        return self._outer.fp32_partitioned_groups_flat
