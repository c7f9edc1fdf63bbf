"""The proof of a conversion: every weight of source and result, and their logits on the same tokens, in fp32.

harness's decoder computes them one block at a time, so that the proof needs no more memory than the conversion. Where a
folder of Hugging Face's is on either side, `transformers` itself computes them as well: it shares no code with the
tables that converted the weights, so that a mistake which is made in both directions cannot hide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.config import HarnessError
from harness.model import Decoder, LossSection, ModelSection, count_parameters
from harness.parallel import Fragment

from .bits import compare_weights
from .source import ModelSource

Method = Literal["auto", "transformers", "streamed"]
TOKENS = 64
LARGEST_POSITION = 2048
TOLERANCE = 1e-4
"""Of the largest logit, and no less than this: what fp32 arithmetic in another order may differ by."""


@dataclass(frozen=True)
class Comparison:
    """Logits of the same tokens, computed twice."""

    one: str
    other: str
    max_difference: float
    largest_logit: float
    top1_agreement: float
    """Share of the tokens after which both find the same one most likely."""

    @property
    def holds(self) -> bool:
        """Also false where a difference is no number."""
        return self.max_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        return (
            f"{self.one} and {self.other}: largest difference {self.max_difference:.3g} "
            f"(logits up to {self.largest_logit:.3g}), top-1 agreement {100 * self.top1_agreement:.2f} %"
        )


@dataclass(frozen=True)
class Proof:
    """What was compared, and what came out."""

    tensors: int
    """Weights of ours that were compared bit for bit, all of them, and are the same."""
    tokens: int
    comparisons: list[Comparison]
    rounding: Comparison | None
    """Where the result's weights are rounded: how far that took its logits from the source's. It proves nothing."""
    left_out: str | None
    """Why `transformers` was not asked; None where it was, or where neither side is a folder of its kind."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The proof as it is printed."""
        once = "" if self.rounding is None else ", once rounded"
        lines = [f"all {self.tensors} tensors are the same bit for bit{once}"]
        lines += [f"logits of {self.tokens} tokens in fp32", *(f"  {each}" for each in self.comparisons)]
        if self.rounding is not None:
            lines.append(f"  rounding: {self.rounding}")
        if self.left_out is not None:
            lines.append(f"  transformers was not asked: {self.left_out}")
        return lines


def prove(source: ModelSource, result: ModelSource, method: Method) -> Proof:
    """Compare the weights and the logits of `source` with those of `result`, which was made of it and read back.

    Raises HarnessError where they are not the same, or where transformers is asked for by name and cannot be had.
    """
    rounded = result.dtype if result.dtype != torch.float32 else None
    weights = compare_weights(source, result, rounded)
    tokens, positions = _proof_tokens(source.section)
    ours = streamed_logits(source, tokens, positions, rounded_to=rounded)
    if not ours.isfinite().all() or not ours.any():
        raise HarnessError(
            f"{source.path}: its logits are no numbers, or all 0, so that they prove nothing: look at its weights; "
            f"--no-proof converts it as it is"
        )
    named = "source" if rounded is None else f"source rounded to {str(rounded).removeprefix('torch.')}"
    comparisons = [_compare(named, ours, "result", streamed_logits(result, tokens, positions))]
    rounding = None
    if rounded is not None:
        rounding = _compare("source", streamed_logits(source, tokens, positions), "result", ours)
    left_out, folders = None, [each for each in (source, result) if each.format == "Hugging Face"]
    if folders:
        left_out = None if method == "transformers" else _why_not_transformers(source.section, method)
    for each in folders if left_out is None else []:
        name = "source" if each is source else "result"
        unrounded = streamed_logits(each, tokens, positions) if each is source and rounded is not None else ours
        theirs = transformers_logits(each.path, tokens, positions)
        comparisons.append(_compare(name, unrounded, f"{name} in transformers", theirs))
    proof = Proof(weights, tokens.numel(), comparisons, rounding, left_out)
    # A stand-in LayerNorm takes the stream's mean away; matrices that ignored it do so no more once they are rounded.
    centred = source.section.norm_free and source.section.norm == "layernorm"
    slack = rounding.max_difference if rounding is not None and centred else 0.0
    for comparison in comparisons:
        if not comparison.holds and not comparison.max_difference <= slack:
            raise HarnessError(f"{source.path}: the result is not the same model, and is not kept: {comparison}")
    return proof


def streamed_logits(
    source: ModelSource, tokens: Tensor, positions: Tensor, *, rounded_to: torch.dtype | None = None
) -> Tensor:
    """fp32 logits (batch, sequence, vocab_size) by harness's decoder, of int64 tokens and positions (batch, sequence).

    Each part of the model is read when its turn comes, into the memory of those before it: all that is held is one
    part of each shape, such as a block and the embedding.
    `rounded_to`: weights are rounded to this dtype first.
    """
    section = source.section.model_copy(update={"vocab_multiple": 1, "dropout": 0.0})
    with torch.device("meta"):
        model = Decoder(section, LossSection()).eval()
    shapes = {name: place.global_shape for name, place in model.placements().items()}

    memory: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def load(part: nn.Module, prefix: str) -> None:
        """Into the memory of an earlier part where shapes agree: what malloc is given back it does not always reuse."""
        used: Counter[tuple[int, ...]] = Counter()
        fragments = []
        for name, weight in [*part.named_parameters()]:
            shape = tuple(weight.shape)
            key = shape, used[shape]
            if key not in memory:
                memory[key] = torch.empty(shape)
            place = memory[key]
            used[shape] += 1
            owner, _, last = name.rpartition(".")
            setattr(part.get_submodule(owner), last, nn.Parameter(place, requires_grad=False))
            tied = prefix == "head" and section.tied_head
            ours = "token_embedding.weight" if tied else f"{prefix}.{name}"
            fragments.append(Fragment(ours, "master", shapes[ours], (0,) * len(shape), place))
        source.read(fragments)
        if rounded_to is not None:
            for fragment in fragments:
                fragment.tensor.copy_(fragment.tensor.to(rounded_to))

    for prefix, part in model.parts():
        if part is not model.head:
            part.register_forward_pre_hook(_before(load, prefix))
    with torch.inference_mode():
        hidden = model.hidden_states(tokens, positions)
        load(model.head, "head")
        return model.head.logits(hidden)


def _before(load: Callable[[nn.Module, str], None], prefix: str) -> Callable[..., None]:
    return lambda part, _inputs: load(part, prefix)


def transformers_logits(folder: Path, tokens: Tensor, positions: Tensor) -> Tensor:
    """The same by the stock `transformers` model of a folder, which is held whole."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise HarnessError("transformers is not installed: pip install transformers, or --proof streamed") from None
    try:
        return _library_logits(AutoModelForCausalLM, logging, folder, tokens, positions)
    except Exception as error:  # of any kind: whatever it is that transformers does not take
        reason = " ".join(str(error).split())[:200]
        raise HarnessError(
            f"{folder}: transformers cannot read it ({type(error).__name__}: {reason}); --proof streamed leaves it out"
        ) from None


def _library_logits(classes: Any, logging: Any, folder: Path, tokens: Tensor, positions: Tensor) -> Tensor:
    with _quiet(logging), torch.inference_mode():
        model = classes.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        # A mask is given, or positions with gaps would be taken for several sequences.
        output = model.eval()(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions)
    logits: Tensor = output.logits
    return logits.float()


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the library's messages and progress bars."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _proof_tokens(section: ModelSection) -> tuple[Tensor, Tensor]:
    """Tokens over the whole vocabulary, at positions over all that learned tables have, (1, TOKENS) each."""
    assert section.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    limit = section.max_positions or LARGEST_POSITION
    if section.positions == "rope":  # far out, angles are large and the rounding of a frequency shows
        limit = min(limit, LARGEST_POSITION)
    count = min(TOKENS, limit)
    tokens = torch.randint(section.vocab_size, (1, count), generator=generator)
    tokens[0, -1] = section.vocab_size - 1
    return tokens, torch.linspace(0, limit - 1, count).round().long()[None]


def _compare(one: str, logits: Tensor, other: str, others: Tensor) -> Comparison:
    if logits.shape != others.shape:
        raise HarnessError(f"logits of {one} are {tuple(logits.shape)}, of {other} {tuple(others.shape)}")
    return Comparison(
        one,
        other,
        max_difference=(logits - others).abs().max().item(),
        largest_logit=logits.abs().max().item(),
        top1_agreement=(logits.argmax(-1) == others.argmax(-1)).double().mean().item(),
    )


def _why_not_transformers(section: ModelSection, method: Method) -> str | None:
    """None where it can be asked: it is there, and holds the model in half of the memory that can be had."""
    if method == "streamed":
        return "--proof streamed"
    if find_spec("transformers") is None:
        return "it is not installed (pip install transformers)"
    needed, free = 4 * count_parameters(section).total, _available_bytes()
    if needed > free / 2:
        return f"it would hold {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free; --proof transformers does"
    return None


def _available_bytes() -> int:
    """Memory that can be had without swapping: free, or a cache of files."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
