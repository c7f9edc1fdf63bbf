"""The loop, and how a run is put together. Reads from top to bottom in the order things happen."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.callbacks import Callback, Saving, Validation
from harness.checkpoint import CheckpointStore
from harness.config import HarnessError, dump_yaml, plain
from harness.data import Batch, Prepared, TokenStream, open_prepared, prepare_for_training
from harness.evaluate import Summary
from harness.model import build_decoder, count_parameters, flops_per_token, initialise_masters
from harness.optim import build_adamw, learning_rate
from harness.parallel import ParallelLayout, Peak, build_divider, build_engine, memory_bytes, peak_flops
from harness.plan import print_dry_run
from harness.runs import FILE_ONLY, Progress, RunFolder, configure_logging
from harness.settings import Settings

logger = logging.getLogger("harness.train")


MAY_CHANGE = {"model.dropout", "model.init_std", "model.position_init_std", "model.scale_residual_init"}
"""Keys of the model that a resume may change: they do not touch what the trained weights compute."""


class NonFiniteError(HarnessError):
    """A loss or gradient that is not a number, found before the optimizer step."""


@dataclass(frozen=True)
class TrainResult:
    """Where the run lies, the last completed step, and its record (None if there was nothing left to do)."""

    folder: Path
    step: int
    record: dict[str, Any] | None


def train(settings: Settings, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Train what `settings` describe, from the beginning or from the run's newest good checkpoint.

    `callbacks` run after the configured ones. Raises HarnessError for bad input and NonFiniteError before a bad step.
    """
    if settings.train.dry_run:
        print_dry_run(settings)
        return TrainResult(settings.run.path, 0, None)
    with (
        ParallelLayout(settings.parallel) as layout,
        open_run(settings, layout) as run,
    ):
        _compare_settings(settings, layout)
        configure_logging(run.log_file, silent_as=str(layout.identity) if layout.rank > 0 else None)
        trainer = Trainer(settings, layout, run, callbacks)
        layout.on_end(lambda reason: _note_end(run, trainer.step, reason))
        try:
            return trainer.fit()
        except (KeyboardInterrupt, Exception) as error:
            layout.await_verdict(error)
            layout.on_end(lambda reason: None)  # this rank's own reason is the one on record
            interrupted = isinstance(error, KeyboardInterrupt)
            reason = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
            run.log_event("stopped", step=trainer.step, reason=reason)
            raise
        finally:
            trainer.close()


class Trainer:
    """One run: model, engine, data, callbacks, and the loop over them."""

    def __init__(
        self, settings: Settings, layout: ParallelLayout, run: RunFolder, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.layout, self.run = layout, run
        self.step, self.tokens_seen = 0, 0
        self.store = CheckpointStore(run.checkpoints, layout.rank, layout.world_size, agree=layout.all_agree)
        self.micro_batch = settings.train.micro_batch_on(layout.data_size)
        settings.check_sequences(layout.section)
        settings.model.check_divides(layout.tensor_size)  # all of this before the first text is read
        start = layout.first_decides(lambda: _starting_step(settings, run, self.store))
        self.prepared = _prepare(settings, layout)
        self.settings = settings = settings.resolved(self.prepared.tokenizer.vocab_size)
        self.total_steps = settings.train.steps
        self.stream = TokenStream(self.prepared, settings.data, seed=settings.train.seed)

        self.model = build_decoder(
            settings.model,
            seed=settings.train.seed,
            device=layout.device,
            loss=settings.loss,
            recompute=settings.train.recompute,
            compile_blocks=settings.train.compile,
            tensor=layout.tensor_parallel(),
            divide=build_divider(layout, settings.train.precision),
        )
        self.engine = build_engine(
            self.model,
            lambda masters: build_adamw(settings.optimizer, masters),
            settings.train.precision,
            self.model.placements(),
            layout,
        )
        if start is None and settings.train.precision == "bf16" and layout.section.zero_stage > 0:
            initialise_masters(self.engine.fragments(), settings.model, settings.train.seed)
        validation = Validation(settings.validation, settings.data, self.prepared, layout)
        self.callbacks: list[Callback] = [
            validation,
            Summary(settings.summary, validation),
            *callbacks,
            Saving(settings.checkpoint),  # last, so that a checkpoint has what the others did in this step
        ]
        self._flops_per_token = flops_per_token(settings.model, settings.data.sequence_length)
        dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
        peak = layout.first_decides(lambda: vars(peak_flops(layout.device, dtype)))
        self._peak = Peak(**peak)

        if start is not None:
            self._load(start)
        self._open_run(start)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        """Run the remaining steps."""
        record: dict[str, Any] | None = None
        self._call("before_training")
        with Progress(self.total_steps, self.step, self.settings.run.log_every_steps) as progress:
            while self.step < self.total_steps:
                record = self.advance()
                progress.update(record)
        self.run.log_event("finished", step=self.step)
        self._call("after_training")
        return TrainResult(self.run.path, self.step, record)

    def advance(self) -> dict[str, Any]:
        """One step and everything that belongs to it; its record, as it stands in metrics.jsonl."""
        record = self._train_step()
        self.step = record["step"]
        self._call("after_step", record)
        self.run.log_metrics(record["step"], record)
        self._call("after_record", record)
        return record

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step; its record."""
        started = time.perf_counter()
        step, train = self.step + 1, self.settings.train
        first_sample = self.stream.consumed_samples
        batches = self.stream.read(
            train.global_batch_size, self.micro_batch, self.layout.data_rank, self.layout.data_size
        )
        waited = time.perf_counter() - started
        # Of the whole step and all ranks, before the first micro-batch: what every gradient is divided by.
        tokens = int(self.layout.sum_over_data(torch.tensor(sum(batch.valid_tokens() for batch in batches))))
        if tokens == 0:
            raise HarnessError(f"step {step}: no token of the batch has a target; check data.mask_after_end_of_text")

        self.layout.seed_everything(train.seed, "step", step)
        loss_sum = torch.zeros((), device=self.layout.device)
        for number, batch in enumerate(batches, 1):
            loss_sum += self._backward(batch, tokens, last=number == len(batches))
        self.layout.sum_over_data(loss_sum)

        rate = learning_rate(self.settings.schedule, self.settings.optimizer.learning_rate, step, self.total_steps)
        # The one wait for the device in a step: whether to take the step is decided here, before anything changes.
        loss, norm = torch.stack([loss_sum / tokens, self.engine.grad_norm()]).tolist()
        self._check_finite(step, first_sample, loss, norm)
        if self.settings.optimizer.clip_norm is not None:
            self.engine.clip(self.settings.optimizer.clip_norm)
        self.engine.step(rate)

        seconds = time.perf_counter() - started
        positions = train.global_batch_size * self.settings.data.sequence_length
        self.tokens_seen += positions
        flops = self._flops_per_token * positions / seconds
        return {
            "step": step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_seen": self.tokens_seen,
            "target_tokens": tokens,
            "tokens_per_second": positions / seconds,
            "model_flops_per_second": flops,
            "utilisation": flops / (self._peak.flops_per_second * self.layout.world_size),
            "memory_bytes": memory_bytes(self.layout.device),
            "data_wait_seconds": waited,
            "step_seconds": seconds,
        }

    def _backward(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; the sum of its losses."""
        batch = batch.to(self.layout.device)
        loss = self.engine.module(batch.tokens, batch.targets, batch.positions, batch.document_ids).loss
        self.engine.backward(loss, tokens, last=last)
        return loss.detach()

    def _check_finite(self, step: int, first_sample: int, loss: float, norm: float) -> None:
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"step {step}: the {what} is {value}; stopped before the optimizer step, so weights are those of "
                    f"step {step - 1}. Lower optimizer.learning_rate, or look at samples {first_sample} to "
                    f"{self.stream.consumed_samples - 1} of the stream"
                )

    # ---- saving and starting ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """Commit a checkpoint of the last completed step, then drop those that are no longer to be kept."""
        state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "stream": self.stream.state_dict(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
            "tokenizer": self.prepared.tokenizer.fingerprint,
            "settings": plain(self.settings),
        }
        self.run.sync()  # a checkpoint must not outlive the records that lead up to it
        self.store.save(self.step, self.engine.fragments(owned=True), state)
        self.run.log_event("saved", step=self.step)
        keep = self.settings.checkpoint.keep_last
        if keep is not None:
            for step in self.store.steps()[:-keep] if self.layout.rank == 0 else ():
                self.store.delete(step)

    def close(self) -> None:
        """Stop background work."""
        self.stream.close()

    def _load(self, step: int) -> None:
        state = self.store.read_state(step)
        changes = _changes(state["settings"], plain(self.settings))
        may_change = MAY_CHANGE | ({"model.max_positions"} if self.settings.model.positions == "rope" else set())
        lines = {key: f"{key}: was {before}, now {now}" for key, (before, now) in changes.items()}
        refused = [line for key, line in lines.items() if key.startswith("model.") and key not in may_change]
        if state["tokenizer"] != self.prepared.tokenizer.fingerprint:
            refused.append("data.tokenizer: another tokenizer")
        if state["step"] > self.total_steps:
            refused.append(f"train.steps: {self.total_steps} is less than the {state['step']} steps that are done")
        if refused:
            raise HarnessError(
                f"{self.store.folder}: step {step} cannot be resumed: {'; '.join(refused)}. Set these back, or choose "
                f"another run.name"
            )
        self.store.load(step, into=self.engine.fragments(), verify=False)  # found good by _starting_step
        self.engine.refresh_weights()
        self.stream.load_state_dict(state["stream"])
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))
        for line in lines.values():
            logger.info("resumed with a change: %s", line)

    def _open_run(self, start: int | None) -> None:
        """Write what the run is into its folder and say it."""
        settings, counts = self.settings, count_parameters(self.settings.model)
        details = {
            "layout": repr(self.layout),
            "parameters": vars(counts),
            "model_flops_per_token": self._flops_per_token,
            "peak_flops_per_second": self._peak.flops_per_second,
            "peak_source": self._peak.source,
            "utilisation_formula": "model_flops_per_token * tokens_per_second / (peak_flops_per_second * ranks), where "
            "model_flops_per_token = 6 * product weights + 12 * layers * heads * head width * sequence length",
        }
        # A run that was ended before its first checkpoint begins again: what it recorded is set aside, not lost.
        begun_before = self.run.existing() is not None
        self.run.begin(dump_yaml(settings), resume_at=self.step if begun_before else None, details=details)
        self.prepared.tokenizer.save(self.run.path / "tokenizer")
        self.run.log_event("started" if start is None else "resumed", step=self.step)
        logger.info(
            "%s: %.2f M parameters (%.2f M in the blocks), %d steps of %d tokens, %s on %s",
            self.run.path,
            counts.total / 1e6,
            counts.blocks / 1e6,
            self.total_steps,
            settings.train.global_batch_size * settings.data.sequence_length,
            settings.train.precision,
            self.layout.device,
        )
        if start is not None:
            logger.info("resumed from step %d", start)
        if self.step == self.total_steps:
            logger.info("all %d steps are done; raise train.steps to go on", self.total_steps)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)


def open_run(settings: Settings, layout: ParallelLayout) -> RunFolder:
    """The run's folder, which rank 0 writes; the others write their log. Rank 0 makes it before anyone looks."""

    def make(rank: int) -> RunFolder:
        return RunFolder(settings.run.path, tensorboard=settings.run.tensorboard, rank=rank)

    run: RunFolder | None = None

    def first() -> None:
        nonlocal run
        run = make(0)

    layout.first_decides(first)
    return run if run is not None else make(layout.rank)


def _note_end(run: RunFolder, step: int, reason: str) -> None:
    """Put down why this process is ended because of another rank: in the events, and in this rank's log."""
    run.log_event("stopped", step=step, reason=reason)
    logger.info("ended after step %d: %s", step, reason, extra=FILE_ONLY)


def _compare_settings(settings: Settings, layout: ParallelLayout) -> None:
    """Raises HarnessError where a rank was started with other settings than rank 0: its collectives would not meet."""
    mine = plain(settings)
    differences = _changes(layout.first_decides(lambda: mine), mine)
    if differences:
        said = "; ".join(f"{key}: there {first}, here {here}" for key, (first, here) in differences.items())
        raise HarnessError(f"other settings than rank 0's ({said}); start every machine with the same configuration")


def _prepare(settings: Settings, layout: ParallelLayout) -> Prepared:
    """The tokenized corpora: rank 0 makes what is missing while the others wait."""
    prepared: Prepared | None = None

    def first() -> None:
        nonlocal prepared
        prepared = prepare_for_training(settings.data)

    layout.first_decides(first)
    return prepared if prepared is not None else open_prepared(settings.data)


def _starting_step(settings: Settings, run: RunFolder, store: CheckpointStore) -> int | None:
    """The step to resume from, or None to begin; refuses what `train.resume` refuses, before anything is touched."""
    resume = settings.train.resume
    if run.checkpoints.exists() and not run.checkpoints.is_dir():
        raise HarnessError(f"{run.checkpoints}: is a file, and checkpoints go into a folder of that name; move it away")
    if resume == "never":
        if run.existing() is not None or store.steps():
            raise HarnessError(
                f"{run.path}: holds a run already; choose another run.name, delete it, or set train.resume=auto"
            )
        return None
    newest = store.latest_good(verify=True)
    if newest is None and resume == "must":
        raise HarnessError(f"{store.folder}: no good checkpoint to resume from, and train.resume is must")
    return newest


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, each with both."""
    values: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, dict) and isinstance(after, dict):
            values |= _changes(before, after, name + ".")
        elif before != after:
            values[name] = before, after
    return values
