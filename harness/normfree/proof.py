"""The proof that a model needs no norms: that it is exactly what the frozen one was, that nothing of a norm is left in
it, and what taking the norms away cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.config import HarnessError
from harness.convert import RunSource
from harness.data import Batch, DataSection, EvaluationWindows, prepare_for_training
from harness.evaluate import read_model, restore
from harness.model import Decoder

from .exactness import Gap, attribution_error, logit_gap, norm_operations, operations, superposition_error
from .quality import Quality, freezing_cost, measure, rare_tokens, site_statistics
from .source import FoldedSource, read_exactly
from .statistics import Average

FOLDED_FP64, FOLDED_FP32, LOADED, SUPERPOSITION, ATTRIBUTION = 1e-12, 1e-5, 1e-4, 1e-5, 1e-3
"""Largest relative errors that the proof holds with."""
RESULT_NATS = 0.2
"""Freezing all norms of the source without training costs at least this, or a gap is no result: then its sigma hardly
varies, and there was little to remove."""


@dataclass(frozen=True)
class NormFreeProof:
    """What was measured; `holds` says whether the model is free of norms, `gaps_are_results` whether what that cost
    means anything."""

    folded_fp64: Gap
    """Folded in float64 beside frozen in float64: the folding itself."""
    folded_fp32: Gap
    """As saved, computed in fp32, beside frozen in float64."""
    frozen_fp32: Gap
    """For comparison: what fp32 alone does to the frozen model."""
    loaded: Gap | str
    """The Hugging Face folder in stock transformers, fp32, beside frozen in float64; or why that was not measured."""
    superposition: float
    superposition_with_norms: float | None
    """The same of the original, with norms; None where there is no original."""
    attribution: float
    attribution_with_norms: float | None
    norm_operations: list[str]
    """Operations of a norm in the exported graph."""
    norm_operations_before: list[str]
    """The same of the frozen model, whose graph has them: the search finds what it looks for."""
    sites: dict[str, dict[str, float | None]]
    """By site: the sigma it was frozen at, and of the model as it is the mean sigma of ordinary tokens, of others
    ones of a document, ends of text), and their ratio."""
    sites_before: dict[str, dict[str, float | None]]
    """The same of the original."""
    quality: dict[str, dict[str, Quality]]
    """By model (original, norm-free, each control), on validation text and on the rare-token probe."""
    missing_bytes: int
    """Of 256, those that the tokenizer has no token for, and the probe not either."""
    freezing_cost: float | None
    """Nats a token that it costs the original to freeze all norms at once, without training."""
    gaps: dict[str, dict[str, float]]
    """By control, or original: the norm-free model's mean loss less that one's, and the standard error of that over
    windows, on validation text."""

    @property
    def failures(self) -> list[str]:
        """What is not as it must be, a line each."""
        found = []
        checks = {
            "folded against frozen, float64": (self.folded_fp64.relative, FOLDED_FP64),
            "folded as saved against frozen": (self.folded_fp32.relative, FOLDED_FP32),
            "superposition": (self.superposition, SUPERPOSITION),
            "direct logit attribution": (self.attribution, ATTRIBUTION),
        }
        if isinstance(self.loaded, Gap):
            checks["loaded in transformers against frozen"] = (self.loaded.relative, LOADED)
        for name, (value, limit) in checks.items():
            if not value <= limit:
                found.append(f"{name}: error {value:.2g}, more than {limit:g}")
        gaps = {"folded": self.folded_fp32, "loaded in transformers": self.loaded}
        for name, gap in gaps.items():
            if isinstance(gap, Gap) and not gap.all_top_equal:
                found.append(f"{name}: {gap.tokens - gap.same_top} of {gap.tokens} likeliest tokens are others")
        if self.norm_operations:
            found.append(f"the exported graph has {', '.join(self.norm_operations)}")
        if not self.norm_operations_before:
            found.append("the search for norm operations finds none in the frozen model either, and so shows nothing")
        return found

    @property
    def holds(self) -> bool:
        return not self.failures

    @property
    def gaps_are_results(self) -> bool:
        return self.freezing_cost is not None and self.freezing_cost >= RESULT_NATS

    def as_json(self) -> dict[str, Any]:
        """For json.dumps; None where a number is none."""
        values = asdict(self)
        whole = {"holds": self.holds, "failures": self.failures, "gaps_are_results": self.gaps_are_results, **values}
        return {name: _finite(value) for name, value in whole.items()}

    def lines(self) -> list[str]:
        """The proof as it is printed."""
        loaded = self.loaded if isinstance(self.loaded, str) else _gap(self.loaded)
        lines = [
            "the norm-free model beside the frozen one (float64), largest difference of a logit:",
            f"  folded, float64          {_gap(self.folded_fp64)}",
            f"  folded, as saved, fp32   {_gap(self.folded_fp32)}",
            f"  (frozen, fp32            {_gap(self.frozen_fp32)})",
            f"  loaded in transformers   {loaded}",
            f"superposition of residual stream to logits   error {self.superposition:.1e}"
            + _control(self.superposition_with_norms, ".2f"),
            f"direct logit attribution                     error {self.attribution:.1e}"
            + _control(self.attribution_with_norms, ".2f"),
            "norm operations in the exported graph        "
            + (", ".join(self.norm_operations) or f"none (frozen: {', '.join(self.norm_operations_before)})"),
            "loss in nats a token            mean   median    99.9 %      max   entropy   calibration error",
        ]
        for text in ("validation", "rare bytes"):
            for model, qualities in self.quality.items():
                q = qualities[text]
                lines.append(
                    f"  {text:<11}{model:<16}{q.mean:8.4f} {q.median:8.4f} {q.p999:9.3f} {q.largest:8.3f} "
                    f"{q.entropy:9.4f} {q.calibration_error:12.4f}"
                )
        if self.missing_bytes:
            lines.append(f"  ({self.missing_bytes} of 256 bytes have no token of their own)")
        for name, sites in (("original", self.sites_before), ("norm-free", self.sites)):
            ratios = {site: values["ratio"] for site, values in sites.items() if values["ratio"] is not None}
            if ratios:
                most = max(ratios, key=lambda site: ratios[site] or 0.0)
                lines.append(
                    f"sigma of first tokens and ends over that of others, {name}: at most {ratios[most]:.1f} ({most})"
                )
        if self.freezing_cost is not None:
            lines.append(f"freezing all norms of the original without training costs {self.freezing_cost:.3f} nats")
        for other, gap in self.gaps.items():
            lines.append(f"norm-free less {other}: {gap['nats']:+.4f} ± {gap['standard_error']:.4f} nats")
        if self.gaps and not self.gaps_are_results:
            why = "no original to freeze" if self.freezing_cost is None else f"that is less than {RESULT_NATS}"
            lines.append(f"these gaps are no result: {why}, so little may have been there to remove")
        verdict = "the proof holds: there is no norm left" if self.holds else "THE PROOF FAILS:"
        return [*lines, verdict, *(f"  {line}" for line in self.failures)]


def prove(
    run: Path,
    *,
    folded: Path,
    data: DataSection,
    step: int | None = None,
    huggingface: Path | str = "no Hugging Face folder was written",
    original: Path | None = None,
    controls: Mapping[str, Path] | None = None,
    windows: int = 64,
    device: torch.device | str = "cpu",
) -> NormFreeProof:
    """Measure the removal of `run` (its checkpoint of `step`) and what was saved of it in `folded` and `huggingface`.

    On `windows` validation windows of `data`. huggingface: a folder, or why there is none. original: the model before;
    controls: runs that fine-tuned it otherwise. Raises HarnessError where one of them cannot be read, or has another
    tokenizer.
    """
    source = RunSource(run, step)
    frozen = read_model(source, device=device).double().eval()
    exact = read_exactly(FoldedSource(source), device).eval()
    saved = restore(folded, device=device).model
    prepared = prepare_for_training(data)
    tokenizer = source.tokenizer
    if tokenizer is None or tokenizer.fingerprint != prepared.tokenizer.fingerprint:
        raise HarnessError(f"{prepared.folder}: tokenized with another tokenizer than {run} has")
    held_out = list(EvaluationWindows(prepared, data, "validation", 8, limit_samples=windows))
    batches = [batch.to(device) for _, batch in held_out]
    some = [batch.tokens for batch in batches[: max(16 // max(len(batches[0].tokens), 1), 1)]]

    def restored(place: Path, switchable_norms: bool = False) -> Decoder:
        found = restore(place, device=device, switchable_norms=switchable_norms)
        if found.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
            raise HarnessError(f"{place}: has another tokenizer than {run}; its losses cannot be compared")
        return found.model

    start = None if original is None else restored(original, switchable_norms=True)
    generator = torch.Generator().manual_seed(0)
    first = batches[0]
    targets = first.targets.clamp(min=0)
    frozen.end_of_text = tokenizer.eod
    if start is not None:
        start.end_of_text = tokenizer.eod
    models = {} if start is None else {"original": start}
    models |= {name: restored(place) for name, place in (controls or {}).items()}
    models["norm-free"] = saved
    rows = min(8, len(batches) * len(first.tokens))
    text = torch.cat([batch.tokens.flatten() for batch in batches]).cpu()
    probe, missing = rare_tokens(tokenizer, text, rows, first.tokens.shape[1], seed=0)
    probe = [batch.to(device) for batch in probe]
    quality: dict[str, dict[str, Quality]] = {}
    losses: dict[str, np.ndarray] = {}
    for name, model in models.items():
        on_text, losses[name] = measure(model, batches)
        quality[name] = {"validation": on_text, "rare bytes": measure(model, probe)[0]}
    graph = torch.cat(some)[:2]
    return NormFreeProof(
        folded_fp64=logit_gap(frozen.logits, exact.logits, some),
        folded_fp32=logit_gap(frozen.logits, saved.logits, some),
        frozen_fp32=logit_gap(frozen.logits, read_model(source, device=device).eval().logits, some),
        loaded=_in_transformers(huggingface, frozen, some),
        superposition=superposition_error(saved, first.tokens, generator),
        superposition_with_norms=None if start is None else superposition_error(start, first.tokens, generator),
        attribution=attribution_error(saved, first.tokens, targets),
        attribution_with_norms=None if start is None else attribution_error(start, first.tokens, targets),
        norm_operations=norm_operations(operations(saved, graph)),
        norm_operations_before=norm_operations(operations(frozen, graph)),
        sites=_sites(frozen, batches, {site: state.sigma for site, state in source.norm_states.items()}),
        sites_before={} if start is None else _sites(start, batches, {}),
        quality=quality,
        missing_bytes=missing,
        freezing_cost=None if start is None else freezing_cost(start, batches, batches),
        gaps={name: _paired(losses["norm-free"], losses[name], batches) for name in models if name != "norm-free"},
    )


def _in_transformers(folder: Path | str, frozen: Decoder, batches: Sequence[Tensor]) -> Gap | str:
    if isinstance(folder, str):
        return f"not measured: {folder}"
    if find_spec("transformers") is None:
        return "not measured: transformers is not installed"
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(batches[0].device)
    return logit_gap(frozen.logits, lambda tokens: loaded(tokens).logits, batches)


def _sites(
    model: Decoder, batches: list[Batch], frozen: Mapping[str, float | None]
) -> dict[str, dict[str, float | None]]:
    now = site_statistics(model, batches).sites
    return {site: _site(frozen.get(site), average) for site, average in now.items()}


def _site(sigma: float | None, average: Average) -> dict[str, float | None]:
    return {"frozen": sigma, "ordinary": average.ordinary, "others": average.others, "ratio": average.ratio}


def _paired(mine: np.ndarray, theirs: np.ndarray, batches: Sequence[Batch]) -> dict[str, float]:
    """The mean difference of per-token losses, and its standard error over windows: tokens of one are not
    independent."""
    lengths = [int(count) for batch in batches for count in (batch.targets >= 0).sum(1) if count > 0]
    windows = np.split(mine - theirs, np.cumsum(lengths)[:-1])
    totals, counts = np.array([part.sum() for part in windows]), np.array(lengths)
    mean = totals.sum() / counts.sum()
    spread = totals - mean * counts  # of a ratio of sums, to first order
    error = np.sqrt((spread**2).sum() * len(counts) / max(len(counts) - 1, 1)) / counts.sum()
    return {"nats": float(mean), "standard_error": float(error)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _gap(gap: Gap) -> str:
    return f"{gap.largest:.1e}, relative {gap.relative:.1e}; {gap.same_top} of {gap.tokens} likeliest tokens equal"


def _control(value: float | None, form: str) -> str:
    return "" if value is None else f"   (with norms: {value:{form}})"
