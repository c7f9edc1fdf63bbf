"""The unit in which state leaves and enters a layout: a box of a named global tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of one global tensor that this rank holds: a box, and the memory behind it.

    A one-rank run has whole tensors; under tensor parallelism or ZeRO a tensor is spread over several fragments, on one
    rank or on many. `tensor` is a *view* of live state: saving reads it, loading copies into it. A fragment without
    elements says that its rank knows the tensor and holds nothing of it.

    Raises ValueError where the box does not fit the tensor or the global shape.
    """

    name: str
    """Logical global name, the same on every layout: "layers.0.attention.qkv.weight"."""
    kind: str
    """What of the parameter it is: "master", "exp_avg", "exp_avg_sq", "step", or any other name without a slash."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor; () for a scalar."""
    offsets: tuple[int, ...]
    """Where the box starts in the global tensor, one number a dimension."""
    tensor: torch.Tensor
    """The box, of any stride, on any device; its shape is the box's shape."""

    def __post_init__(self) -> None:
        if not self.kind or "/" in self.kind or not self.name:
            raise ValueError(
                f"fragment {self.kind!r}/{self.name!r}: kind and name are not empty, and kind has no slash"
            )
        shape = tuple(self.tensor.shape)
        fits = len(shape) == len(self.global_shape) == len(self.offsets) and all(
            offset >= 0 and offset + size <= whole
            for offset, size, whole in zip(self.offsets, shape, self.global_shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"fragment {self.key}: a box of shape {shape} at {tuple(self.offsets)} does not lie inside "
                f"a tensor of shape {tuple(self.global_shape)}"
            )

    @property
    def key(self) -> str:
        """ "kind/name": what a checkpoint calls the tensor."""
        return f"{self.kind}/{self.name}"

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.tensor.shape, strict=True))

    @classmethod
    def whole(cls, name: str, kind: str, tensor: torch.Tensor) -> Fragment:
        """A tensor that lies on this rank entirely."""
        shape = tuple(tensor.shape)
        return cls(name, kind, shape, (0,) * len(shape), tensor)
