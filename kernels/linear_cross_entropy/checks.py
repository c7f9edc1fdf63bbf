"""What may be passed to the linear cross-entropy; everything else is a ValueError of one line, before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .comp_sum import CompSum, CrossEntropy
from .types import OUTPUTS, Terms, VocabShard
from .vocab_parallel import agree

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def host_sees(tensor: Tensor) -> bool:
    """Whether the host can look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    token_weights: Tensor | None,
    shard: VocabShard | None,
) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit together."""
    named = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "bias": bias,
        "class_weights": class_weights,
        "token_weights": token_weights,
    }
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense torch.Tensor, got {_kind(tensor)}")
    for name, tensor in given.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: they must be on one device")
        if name != "targets" and tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}; float32, bfloat16, float16 and float64 will do")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; int64 token ids are wanted")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must be (V, D) with V and D at least 1, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must end in the D of weight {tuple(weight.shape)}")
    if shard is not None and not isinstance(shard, VocabShard):
        raise ValueError(f"shard must be a VocabShard or None, got {_kind(shard)}")
    if shard is not None and shard.sequence_parallel:
        if hidden.shape[:-1].numel() * shard.ranks != targets.numel():
            raise ValueError(
                f"hidden {tuple(hidden.shape)} must hold 1/{shard.ranks} of the {targets.numel()} tokens of targets "
                f"{tuple(targets.shape)}, since shard.sequence_parallel divides them equally among {shard.ranks} ranks"
            )
    elif hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the shape of hidden {tuple(hidden.shape)} without D"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    vocab_size = len(weight) if shard is None else shard.vocab_size
    if class_weights is not None:
        if class_weights.shape != (vocab_size,):
            raise ValueError(
                f"class_weights must have shape ({vocab_size},), one for each token of the whole vocabulary, got "
                f"{tuple(class_weights.shape)}"
            )
        if class_weights.requires_grad:
            raise ValueError("class_weights gets no gradient: detach it")
    if token_weights is not None:
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"token_weights {tuple(token_weights.shape)} must have the shape of targets {tuple(targets.shape)}"
            )
        if token_weights.requires_grad:
            raise ValueError("token_weights gets no gradient: detach it, or weight the losses of reduction='none'")


def _kind(value: object) -> str:
    return f"a {value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_kinds(terms: Terms, outputs: Sequence[str], filter_bound: float | None) -> None:
    """Raises ValueError where a constant is not a number, or outputs are no sequence of names."""
    numbers = {
        "label_smoothing": terms.label_smoothing,
        "z_loss": terms.z_loss,
        "softcap": 1.0 if terms.softcap is None else terms.softcap,
        "temperature": terms.temperature,
        "filter_bound": 0.0 if filter_bound is None else filter_bound,
    }
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, float | int):
            raise ValueError(f"{name} must be a number, got {_kind(number)}")
    for name, whole in (("shift", terms.shift), ("ignore_index", terms.ignore_index)):
        if isinstance(whole, bool) or not isinstance(whole, int) or not -(2**63) <= whole < 2**63:
            raise ValueError(f"{name} must be an int of 64 bits, got {whole!r}")
    if isinstance(outputs, str):
        raise ValueError(f"outputs must be a sequence of names such as ({outputs!r},), got the string {outputs!r}")
    if not isinstance(outputs, list | tuple):
        raise ValueError(f"outputs must be a list or tuple of names, got {_kind(outputs)}")


def check_terms(
    terms: Terms,
    reduction: str,
    outputs: Sequence[str],
    weight_grad_dtype: torch.dtype | None,
    filter_bound: float | None,
) -> None:
    """Raises ValueError where a constant is out of its range or a name is not one of those known."""
    check_kinds(terms, outputs, filter_bound)
    if terms.shift < 0:
        raise ValueError(f"shift must not be negative, got {terms.shift}")
    if not 0.0 <= terms.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {terms.label_smoothing}")
    if not 0.0 <= terms.z_loss < float("inf"):
        raise ValueError(f"z_loss must be finite and not negative, got {terms.z_loss}")
    if terms.softcap is not None and not 0.0 < terms.softcap < float("inf"):
        raise ValueError(f"softcap must be finite and positive, or None for no cap, got {terms.softcap}")
    if not 0.0 < terms.temperature < float("inf"):
        raise ValueError(f"temperature must be finite and positive, got {terms.temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if weight_grad_dtype is not None and weight_grad_dtype not in FLOATS:
        raise ValueError(f"weight_grad_dtype must be a floating-point dtype or None, got {weight_grad_dtype}")
    if filter_bound is not None and not 0.0 <= filter_bound < 1.0:
        raise ValueError(f"filter_bound must lie in [0, 1), or be None for no filter, got {filter_bound}")
    if filter_bound and terms.label_smoothing:
        raise ValueError(
            "filter_bound does not go together with label_smoothing, whose gradient is not small where p is small"
        )
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"outputs may name {', '.join(OUTPUTS)}; got {name!r}")


def check_perturbation(
    loss: CrossEntropy | CompSum, perturbed: Tensor | None, hidden: Tensor, softcap: float | None
) -> None:
    """Raises ValueError unless there is a perturbation exactly where the loss has a term for it."""
    if not isinstance(loss, CrossEntropy | CompSum):
        raise ValueError(f"loss must be a CrossEntropy or a CompSum, got {loss!r}")
    if isinstance(loss, CompSum) and loss.nu > 0.0:
        if perturbed is None:
            raise ValueError(f"loss has nu {loss.nu}: perturbed_hidden must be given, with the shape of hidden")
        if perturbed.shape != hidden.shape or perturbed.device != hidden.device or perturbed.dtype not in FLOATS:
            raise ValueError(
                f"perturbed_hidden must be like hidden, {tuple(hidden.shape)} on {hidden.device}, got "
                f"{tuple(perturbed.shape)} {perturbed.dtype} on {perturbed.device}"
            )
        if softcap is not None:
            raise ValueError("a loss with nu needs a linear head: it does not go together with softcap")
    elif perturbed is not None:
        raise ValueError("perturbed_hidden is only for a loss CompSum(nu=...) with nu above 0")


def check_shard(shard: VocabShard, weight: Tensor) -> None:
    """Raises ValueError unless the weight's rows, over all ranks, are the whole vocabulary, padding included.

    The first time a shard over several ranks is seen all ranks compare theirs, and all raise the same error.
    """
    rows = len(weight)
    if shard.ranks > 1:
        if not shard.stops:
            agree(shard, weight)
        if shard.stop - shard.start != rows:
            raise ValueError(f"weight has {rows} rows, its shard [{shard.start}, {shard.stop}) another number")
        return
    if shard.start != 0 or shard.stop != rows:
        raise ValueError(
            f"shard [{shard.start}, {shard.stop}) must be all {rows} rows of weight: one rank holds them all"
        )
    if shard.vocab_size > rows:
        raise ValueError(f"shard.vocab_size {shard.vocab_size} exceeds the {rows} rows of weight")


def check_targets(targets: Tensor, terms: Terms) -> None:
    """Refuses a target that is neither ignore_index nor in [0, vocab_size).

    Raises ValueError naming value and position on the CPU. Elsewhere, where looking at the values would make the host
    wait for the device, an assertion is queued on the device.
    """
    fine = ((targets >= 0) & (targets < terms.vocab_size)) | (targets == terms.ignore_index)
    if host_sees(targets):
        if not fine.all():
            where = tuple((~fine).nonzero()[0].tolist())
            raise ValueError(
                f"targets[{', '.join(map(str, where))}] is {int(targets[where])}: "
                f"neither a token id in [0, {terms.vocab_size}) nor ignore_index {terms.ignore_index}"
            )
    else:
        torch._assert_async(
            fine.all(),
            f"a target is neither a token id in [0, {terms.vocab_size}) nor ignore_index {terms.ignore_index}",
        )


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raises NotImplementedError where one carries a forward-mode tangent, which the operator would drop in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in inputs):
        raise NotImplementedError("linear_cross_entropy has no forward-mode derivative: use implementation='reference'")
