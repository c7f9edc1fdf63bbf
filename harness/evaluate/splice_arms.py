"""What `splice` runs beside the model as it is: the caller's arms, checked, and the reference arms of their sites."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from harness.callbacks import evaluating
from harness.config import HarnessError
from harness.data import IGNORED, Batch
from harness.model import Decoder, spliced, tap_sites

Replacement = Callable[[Tensor], Tensor]
Arms = Mapping[str, Mapping[str, Replacement]] | Mapping[str, Replacement]
Reference = Literal["identity", "zero", "mean"]
REFERENCES: tuple[Reference, ...] = get_args(Reference)


@dataclass(frozen=True)
class Arm:
    """Functions that are spliced in together."""

    name: str
    kind: Literal["arm", "identity", "zero", "mean"]
    functions: Mapping[str, Replacement]
    """By site. Each refuses, in one line, a result of another shape, dtype or device than what it was given."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.functions)


def read_arms(arms: Arms, model: Decoder) -> list[Arm]:
    """The caller's arms; raises HarnessError for what is none, and for names that are no sites of `model`."""
    if not arms:
        raise HarnessError("splice: no arms; give {site: function}, or several of these by name")
    if all(callable(value) for value in arms.values()):
        arms = {"arm": cast(Mapping[str, Replacement], arms)}
    known = list(tap_sites(model))
    read = []
    for name, functions in arms.items():
        if not isinstance(functions, Mapping) or not functions or not all(map(callable, functions.values())):
            raise HarnessError(f"splice: arm {name!r} should map sites to functions, and at least one")
        for site in functions:
            if site not in known:
                raise HarnessError(
                    f"splice: arm {name!r}: {site!r} is no site of this model; {_name_sites(site, known)}"
                )
        guarded: dict[str, Replacement] = {
            site: partial(_guarded, name, site, function) for site, function in functions.items()
        }
        read.append(Arm(name, "arm", guarded))
    return read


def reference_arms(arms: Sequence[Arm], wanted: Sequence[Reference], means: Mapping[str, Tensor]) -> list[Arm]:
    """Identity at all sites of `arms` together; zero and mean at each set of sites that an arm has, called "zero of
    ARM" after the first arm that has it where there are several sets.

    Raises HarnessError for unknown kinds, and for names that `arms` have too.
    """
    for kind in wanted:
        if kind not in REFERENCES:
            raise HarnessError(f"splice: reference {kind!r} is unknown; there are {', '.join(REFERENCES)}")
    sets: dict[frozenset[str], Arm] = {}
    for arm in arms:
        sets.setdefault(frozenset(arm.sites), arm)
    made: list[Arm] = []
    if "identity" in wanted:
        every = dict.fromkeys(chain.from_iterable(arm.sites for arm in arms))
        made.append(Arm("identity", "identity", dict.fromkeys(every, _same)))
    for arm in sets.values():
        ending = f" of {arm.name}" if len(sets) > 1 else ""
        if "zero" in wanted:
            made.append(Arm("zero" + ending, "zero", dict.fromkeys(arm.sites, torch.zeros_like)))
        if "mean" in wanted:
            made.append(Arm("mean" + ending, "mean", {site: partial(_constant, means[site]) for site in arm.sites}))
    clash = {arm.name for arm in arms} & {arm.name for arm in made}
    if clash:
        raise HarnessError(f"splice: {min(clash)!r} is the name of a reference arm; call that arm something else")
    return made


@torch.no_grad()
def site_means(
    model: Decoder,
    sites: Iterable[str],
    batches: Iterable[Batch],
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The mean activation at each site over the tokens that have a target, summed in fp64: (hidden,), or (this rank's
    heads, head width) at q, k and v. To rounding the same on every layout.

    `batches` lie on the model's device; `add_up` as `splice` takes it.
    """
    sums: dict[str, Tensor] = {}
    weights: Tensor
    count: Tensor | None = None

    def record(site: str, x: Tensor) -> Tensor:
        if x.dim() == 4:  # q, k, v: all tokens, this rank's heads
            part = torch.where(weights[..., None, None], x.double(), 0.0).sum((0, 1))
        else:  # split as the activation is: (batch, sequence, 1), or (this rank's tokens, 1)
            weight = model.tensor.split(weights[..., None])
            part = torch.where(weight, x.double(), 0.0).flatten(0, -2).sum(0)
            part = model.tensor.sum_over_tokens(part)
        sums[site] = sums[site] + part if site in sums else part
        return x

    recorders: dict[str, Replacement] = {site: partial(record, site) for site in sites}
    with evaluating(model), spliced(model, recorders):
        for batch in batches:
            weights = batch.targets != IGNORED
            found = weights.sum().double()
            count = found if count is None else count + found
            model.hidden_states(batch.tokens, batch.positions, batch.document_ids)
    if count is None:
        raise HarnessError("splice: no batches")
    if add_up is not None:
        count, sums = add_up(count), {site: add_up(total) for site, total in sums.items()}
    return {site: total / count for site, total in sums.items()}


def _same(x: Tensor) -> Tensor:
    return x


def _constant(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).expand_as(x).contiguous()


def _guarded(arm: str, site: str, function: Replacement, x: Tensor) -> Tensor:
    shape, dtype, device = x.shape, x.dtype, x.device  # before the function, which may change x itself
    result: Any = function(x)
    if not isinstance(result, Tensor):
        raise HarnessError(
            f"splice: arm {arm!r}, site {site}: its function returned {type(result).__name__}, no tensor"
        )
    if (result.shape, result.dtype, result.device) != (shape, dtype, device):
        given = f"{dtype} {tuple(shape)} on {device}"
        got = f"{result.dtype} {tuple(result.shape)} on {result.device}"
        raise HarnessError(f"splice: arm {arm!r}, site {site}: its function made {got} of {given}; all three must stay")
    return result


def _name_sites(wrong: str, known: Sequence[str]) -> str:
    """The sites in one short line whatever the depth, and the nearest to what was said."""
    inside = [site.split(".", 2) for site in known if site.startswith("layers.")]
    places = list(dict.fromkeys(place for _, _, place in inside))
    last = max(int(number) for _, number, _ in inside)
    near = difflib.get_close_matches(wrong, known, 1)
    outside = [site for site in known if not site.startswith("layers.")]
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"sites are layers.0 to layers.{last} with .{', .'.join(places)}; {', '.join(outside)}{meant}"
