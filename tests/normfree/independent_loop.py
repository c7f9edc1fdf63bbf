"""The published algorithm as a plain loop: a float64 decoder written out from the definitions, full logits, torch's
AdamW; it shares the batches and the initial weights with the trainer, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.data import TokenStream, prepare
from harness.model import SiteState, build_decoder
from harness.parallel import ParallelLayout
from harness.settings import Settings
from tests.model.frozen_reference import reference_logits, sigmas


@dataclass
class Trace:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    frozen: dict[str, float] = field(default_factory=dict)
    """By site, the sigma that it was frozen at."""
    began: dict[str, int] = field(default_factory=dict)


def independent_loop(settings: Settings, events: dict[str, int]) -> Trace:
    """`events`: by site, the first step that is trained without its norm."""
    section, options, steps = settings.norm_removal, settings.optimizer, settings.train.steps
    keep, trace = 1 - 1 / section.average_steps, Trace()
    with ParallelLayout(settings.parallel):
        prepared = prepare(settings.data)
        stream = TokenStream(prepared, settings.data, seed=settings.train.seed)
        model_section = settings.resolved(prepared.tokenizer.vocab_size).model
        model = build_decoder(model_section, seed=settings.train.seed).double()
        eps, layernorm = model_section.norm_epsilon, model_section.norm == "layernorm"
        weights = list(model.parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": [w for w in weights if w.dim() > 1], "weight_decay": options.weight_decay},
                {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
        )
        averages: dict[str, float] = {}
        target: Tensor | None = None
        for step in range(1, steps + 1):
            for site, first in events.items():
                if first == step:
                    trace.frozen[site] = averages[site]
                    trace.began[site] = step
            states = {
                site: SiteState(0.5 - 0.5 * math.cos(math.pi * min(1.0, (step - first + 1) / section.ramp_steps)),
                                trace.frozen[site])
                for site, first in trace.began.items()
            }  # fmt: skip
            batch = stream.read(settings.train.global_batch_size, settings.train.global_batch_size)[0]
            seen: dict[str, Tensor] = {}
            logits = reference_logits(model, batch.tokens, states, seen)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
            final = sigmas(seen["final"], layernorm, eps)
            objective = loss
            if target is not None and section.auxiliary.weight > 0:
                scale = target if section.auxiliary.relative else 1.0
                objective = loss + section.auxiliary.weight * ((final - target) / scale).square().mean()
            optimizer.zero_grad()
            objective.backward()
            norm = nn.utils.clip_grad_norm_(weights, options.clip_norm)
            rate = options.learning_rate
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            trace.losses.append(loss.item())
            trace.norms.append(norm.item())
            ordinary = batch.tokens != prepared.tokenizer.eod
            ordinary[:, 0] = False
            target = final.detach()[ordinary].mean()
            for site, x in seen.items():
                on_heads = site.endswith("_norm")
                now = sigmas(x.detach(), layernorm and not on_heads, eps).mean().item()
                averages[site] = now if step == 1 else keep * averages[site] + (1 - keep) * now
        stream.close()
    return trace
