"""Which norm stands where: plain, switchable, or none."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ModelSection
from .norms import Affine, LayerNorm, RMSNorm, Share
from .switchable import Normed, SwitchableNorm


def build_norm(section: ModelSection, share: Share, *, final: bool = False, sites: int | None = None) -> nn.Module:
    """The norm of a block, or the final one. `sites`: switchable, with so many; None: plain."""
    centre = section.norm == "layernorm"
    if section.norm_free:
        return Affine(section.hidden_size, centre, share) if final else nn.Identity()
    if sites is not None:
        return SwitchableNorm(section.norm, section.hidden_size, section.norm_epsilon, share, sites)
    return (LayerNorm if centre else RMSNorm)(section.hidden_size, section.norm_epsilon, share)


def build_head_norm(section: ModelSection, share: Share, *, switchable: bool) -> nn.Module | None:
    """The norm of each query or key head, if there is one."""
    if not section.qk_norm:
        return None
    if switchable:
        return SwitchableNorm("rmsnorm", section.head_width, section.norm_epsilon, share)
    return RMSNorm(section.head_width, section.norm_epsilon, share)


def apply_norm(norm: nn.Module, x: Tensor, ordinary: Tensor | None) -> Normed:
    """Any of these norms; `ordinary` as SwitchableNorm takes it."""
    if isinstance(norm, SwitchableNorm):
        normed: Normed = norm(x, ordinary)
        return normed
    return Normed(norm(x))
