"""The weights of a model without norms, made of one whose norms are frozen.

A frozen LayerNorm is y = ((x - mean) / sigma) g + b, g its weight and b its bias, and what reads it is a projection
W y + c. With C = I - 11'/H, which takes the mean away, that is W' x + c' where W' = W diag(g / sigma) C and
c' = c + W b (Heimersheim, arXiv 2409.13710). RMSNorm has no C and no b. The norm of query or key heads, which stands
behind the projection, is diag(g / sigma) on the projection's rows. The final norm stays as an affine map.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from harness.config import HarnessError
from harness.model import ModelSection, SiteState, norm_sites

Fetch = Callable[[str, int, int], Tensor]
"""Rows [start, stop) of a tensor of the frozen model, by its name; of any float dtype."""
ROWS = 64
"""Of a matrix that are computed together: always the same ones, or a sum's last bit could depend on what is asked."""
_PROJECTION = re.compile(r"layers\.(\d+)\.(attention\.qkv|mlp\.up|mlp\.gate)\.(weight|bias)")


def folded_section(section: ModelSection) -> ModelSection:
    """What a model is once its norms are folded. LayerNorm's bias needs biases to go into."""
    changes: dict[str, object] = {"norm_free": True, "qk_norm": False}
    changes["norm_epsilon"] = ModelSection.model_fields["norm_epsilon"].default  # it means nothing any more
    if section.norm == "layernorm":
        changes |= {"bias": True, "qkv_bias": None}
    return section.model_copy(update=changes)


class Folding:
    """Every tensor of the folded model, any rows of it, in float64.

    sites: the states of the norm sites; those that are not named are real. fetch: of the frozen model's tensors.
    Raises HarnessError, naming them, where sites are not frozen.
    """

    def __init__(self, section: ModelSection, sites: Mapping[str, SiteState], fetch: Fetch) -> None:
        if section.norm_free:
            raise HarnessError("the model has no norms; there is nothing to fold")
        names = [site.name for site in norm_sites(section)]
        states = [sites.get(name, SiteState()) for name in names]
        open_ = [name for name, state in zip(names, states, strict=True) if state.alpha != 1 or not state.sigma]
        if open_:
            listed = ", ".join(open_[:8]) + (f" and {len(open_) - 8} more" if len(open_) > 8 else "")
            raise HarnessError(f"its norms cannot be folded, for these sites are not frozen: {listed}")
        # What the frozen model computed with: 1 / sigma as its norms hold it, in fp32.
        self._rates = {
            name: torch.tensor(1.0 / (state.sigma or 0.0), dtype=torch.float32).double().item()
            for name, state in zip(names, states, strict=True)
        }
        self.section, self._before, self._fetch = folded_section(section), section, fetch
        self._vectors: dict[str, Tensor] = {}

    def changes(self, name: str) -> bool:
        """Whether a tensor of the folded model is not simply the frozen model's."""
        if name == "final_norm.weight" or _PROJECTION.fullmatch(name):
            return True
        return name.endswith((".output.bias", ".down.bias")) and not self._before.bias

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """float64 rows [start, stop) of a tensor that folding changes."""
        first = start - start % ROWS
        groups = [self._group(name, row) for row in range(first, stop, ROWS)]
        return torch.cat(groups)[start - first : stop - first]

    def _group(self, name: str, start: int) -> Tensor:
        """Rows [start, start + ROWS), or to the end."""
        found = _PROJECTION.fullmatch(name)
        if found is None:
            stop = min(start + ROWS, self._before.hidden_size)
            if name != "final_norm.weight":
                return torch.zeros(stop - start, dtype=torch.float64)
            return self._fetch(name, start, stop).double() * self._rates["final"]
        layer, projection, kind = f"layers.{found[1]}.", found[2], found[3]
        attends = projection == "attention.qkv"
        norm = f"{layer}attention_norm" if attends else f"{layer}mlp_norm"
        stop = min(start + ROWS, self._row_count(projection))
        rows, inner = self._row_scales(layer, projection, start, stop)
        if kind == "bias":
            has_bias = self._before.has_qkv_bias if attends else self._before.bias
            bias = torch.zeros(stop - start, dtype=torch.float64)
            if has_bias:
                bias += self._fetch(name, start, stop).double()
            if self._before.norm == "layernorm":
                weight = self._fetch(f"{layer}{projection}.weight", start, stop).double()
                bias += (weight * self._vector(f"{norm}.bias")).sum(-1)
            return bias * rows
        folded = self._fetch(name, start, stop).double() * self._vector(f"{norm}.weight")
        if self._before.norm == "layernorm":
            folded -= folded.mean(-1, keepdim=True)
        return folded * (rows * inner)[:, None]

    def _row_count(self, projection: str) -> int:
        section = self._before
        if projection != "attention.qkv":
            return section.mlp_width
        return (section.heads + 2 * section.key_value_heads) * section.head_width

    def _row_scales(self, layer: str, projection: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of rows [start, stop): what their outputs, biases and all, are multiplied by (the norms of heads), and
        1 / sigma of the norm before them."""
        if projection != "attention.qkv":
            ones = torch.ones(stop - start, dtype=torch.float64)
            return ones, ones * self._rates[f"{layer}mlp"]
        section = self._before
        width, per_group = section.head_width, section.heads // section.key_value_heads
        rows = torch.arange(start, stop)
        place = rows // width % (per_group + 2)  # within its group: its query heads, its key head, its value head
        values, keys = place == per_group + 1, place == per_group
        inner = torch.where(values, self._rates[f"{layer}v"], self._rates[f"{layer}qk"]).double()
        outer = torch.ones_like(inner)
        if section.qk_norm:
            for kind, chosen in (("q_norm", place < per_group), ("k_norm", keys)):
                gains = self._vector(f"{layer}attention.{kind}.weight") * self._rates[f"{layer}{kind}"]
                outer = torch.where(chosen, gains[rows % width], outer)
        return outer, inner

    def _vector(self, name: str) -> Tensor:
        """A norm's whole weight or bias."""
        if name not in self._vectors:
            size = self._before.head_width if name.endswith(("q_norm.weight", "k_norm.weight")) else None
            self._vectors[name] = self._fetch(name, 0, size or self._before.hidden_size).double()
        return self._vectors[name]
