"""The loop, and how a run is put together. Reads from top to bottom in the order things happen."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import stop
from harness.callbacks import KINDS, Callback, Fault, FaultError, FaultJudge, Interrupted, RollBack, Saving, Validation
from harness.checkpoint import CheckpointStore
from harness.config import HarnessError, dump_yaml, plain
from harness.data import Batch, TokenStream
from harness.evaluate import Summary
from harness.forecast import Forecasting
from harness.model import build_decoder, count_parameters, flops_per_token, initialise_masters
from harness.normfree import NormRemoval
from harness.optim import build_adamw, learning_rate
from harness.parallel import ParallelLayout, Peak, Verdict, build_divider, build_engine, memory_bytes, peak_flops
from harness.plan import print_dry_run
from harness.runs import FILE_ONLY, Progress, RunFolder, configure_logging
from harness.settings import Settings
from harness.start import (
    check_resume,
    compare_settings,
    load_weights,
    newest_verified,
    open_run,
    prepare,
    starting_step,
)

logger = logging.getLogger("harness.train")


@dataclass(frozen=True)
class TrainResult:
    """Where the run lies, the last completed step, and its record (None if there was nothing left to do)."""

    folder: Path
    step: int
    record: dict[str, Any] | None
    stopped_by: str | None = None
    """The signal that asked the run to stop: it is saved, and the same call goes on. None: all steps are done."""


def train(settings: Settings, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Train what `settings` describe, from the beginning or from the run's newest good checkpoint.

    `callbacks` run after the configured ones. Raises HarnessError for bad input, FaultError before a bad step, and
    StopRequested where a signal (harness.stop) comes before the first step; one that comes later is in the result.
    """
    if settings.train.dry_run:
        print_dry_run(settings)
        return TrainResult(settings.run.path, 0, None)
    with ExitStack() as stack:
        with stop.raising():
            layout = stack.enter_context(ParallelLayout(settings.parallel))
            run = stack.enter_context(open_run(settings, layout))
            compare_settings(settings, layout)
            configure_logging(run.log_file, silent_as=str(layout.identity) if layout.rank > 0 else None)
            layout.watchdog.stacks_file = run.path / "ranks" / f"rank-{layout.rank:05d}.stacks"
            trainer = Trainer(settings, layout, run, callbacks)
        layout.on_end(lambda verdict: _note_end(run, trainer.step, verdict))
        try:
            return trainer.fit()
        except (KeyboardInterrupt, Exception) as error:
            layout.await_verdict(error)
            layout.on_end(lambda verdict: None)  # this rank's own reason is the one on record
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
        self.stopped_by: str | None = None
        self._score: float | None = None  # the validation loss of the last completed step, where there is one
        self._unfinished: dict[str, Any] | None = None  # the record of a step that callbacks have not finished
        self._first_samples: dict[int, int] = {}  # of the last steps: where each began in the stream
        self._channel = layout.channel()
        add_up = layout.channel().add_up  # of its own, for the thread that saves
        self.store = CheckpointStore(run.checkpoints, layout.rank, layout.world_size, add_up=add_up)
        self.micro_batch = settings.train.micro_batch_on(layout.data_size)
        settings.check_sequences(layout.section)
        settings.loss.check_device(layout.device)
        settings.model.check_divides(layout.tensor_size)
        settings.check_norm_removal()  # all of this before the first text is read
        start = starting_step(settings, run, self.store, layout, self._channel)
        self.prepared = prepare(settings, layout)
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
            switchable_norms=settings.norm_removal.enabled,
        )
        self.model.end_of_text = self.prepared.tokenizer.eod
        self.engine = build_engine(
            self.model,
            lambda masters: build_adamw(settings.optimizer, masters),
            settings.train.precision,
            self.model.placements(),
            layout,
        )
        self.judge = FaultJudge(settings.faults)
        self.saving = Saving(settings.checkpoint, self.store, layout, run)
        validation = Validation(settings.validation, settings.data, self.prepared, layout)
        self.callbacks: list[Callback] = [
            *self._norm_removal(),  # first: it may take the step back
            validation,
            *self._forecasting(),
            Summary(settings.summary, validation),
            *callbacks,
            self.saving,  # last, so that a checkpoint has what the others did in this step
        ]
        self._flops_per_token = flops_per_token(settings.model, settings.data.sequence_length)
        dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
        peak = layout.first_decides(lambda: vars(peak_flops(layout.device, dtype)))
        self._peak = Peak(**peak)
        self._begin(start)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        """Run the remaining steps, or as many as a signal leaves."""
        record: dict[str, Any] | None = None
        self._call("before_training")
        if self.settings.faults.hung_after_seconds is not None:
            self.layout.watchdog.arm(self.settings.faults.hung_after_seconds)
        with Progress(self.total_steps, self.step, self.settings.run.log_every_steps) as progress:
            if self._unfinished is not None:
                record = self._finish_step(self._unfinished)
            while self.stopped_by is None and self.step < self.total_steps:
                record = self.advance()
                progress.update(record)
        if self.stopped_by is not None:
            self._stop()
        else:
            self.saving.finish(self.step, self.save)
            self.run.log_event("finished", step=self.step)
        self.layout.watchdog.disarm()
        if self.stopped_by is None:
            try:
                self._call("after_training")
            except Interrupted:
                logger.info("stopped by %s before the summary; the same command gives it", self.stopped_by)
        return TrainResult(self.run.path, self.step, record, self.stopped_by)

    def advance(self) -> dict[str, Any]:
        """One step and everything that belongs to it; its record, as it stands in metrics.jsonl.

        A step that is rolled back is followed by those that come in its place, up to the first good one.
        """
        record = None
        while record is None:
            self._call("before_step")
            record = self._train_step()
            if record is not None:
                self.step = record["step"]
                self.layout.watchdog.alive(f"step {self.step}")
                record = self._finish_step(record)
        return record

    def _finish_step(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The callbacks' part of a step whose weights are updated, and its line in metrics.jsonl. None where one of
        them took the run back."""
        self._unfinished = dict(record)
        try:
            self._call("after_step", record)
        except Interrupted:
            self._score = None
            return self._unfinished
        except RollBack as back:
            self._unfinished = None
            self._go_back(back, self.step)
            return None
        self._unfinished = None
        score = record.get("validation_loss", math.nan)
        self._score = score if math.isfinite(score) else None
        self.run.log_metrics(record["step"], record)
        self._call("after_record", record)
        return record

    def _train_step(self) -> dict[str, Any] | None:
        """One optimizer step; its record. None where the run was rolled back in its place."""
        started = time.perf_counter()
        step, train = self.step + 1, self.settings.train
        self._remember_sample(step)
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
        fault = self._agree(step, loss, norm)
        if fault is None:
            if self.settings.optimizer.clip_norm is not None:
                self.engine.clip(self.settings.optimizer.clip_norm)
            self.engine.step(rate)
            self.judge.accept(loss, norm)
        elif not self._handle(fault, step):
            return None

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
            **({} if fault is None else {"skipped": 1}),
        }

    def _backward(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; the sum of its losses."""
        batch = batch.to(self.layout.device)
        self._call("before_forward", batch)
        loss = self.engine.module(batch.tokens, batch.targets, batch.positions, batch.document_ids).loss
        terms = [callback.after_forward(self, batch) for callback in self.callbacks]
        objective = sum((term * tokens for term in terms if term is not None), start=loss)
        self.engine.backward(objective, tokens, last=last)
        return loss.detach()

    # ---- what all ranks decide together ----------------------------------------------------------------------------

    def _agree(self, step: int, loss: float, norm: float) -> Fault | None:
        """What is wrong with this step, on any rank; takes note of signals and of failed saves on any rank as well."""
        fault = self.judge.judge(loss, norm)
        number = 0 if fault is None else 1 + KINDS.index(fault.kind)
        worst, asked, save_failed = self.layout.all_max(
            [number, stop.requested() is not None, self.saving.has_failed()]
        )
        if asked:
            self.stopped_by = stop.requested() or "a signal to another rank"
        if save_failed:
            self.saving.settle(step)
        self.saving.take_note(step)
        if worst == number:
            return fault
        return Fault(KINDS[worst - 1], f"{KINDS[worst - 1]}, seen by another rank")

    def check_in(self, what: str) -> None:
        """See TrainerView."""
        self.layout.watchdog.alive(what)
        if self.layout.all_max([stop.requested() is not None])[0]:
            self.stopped_by = stop.requested() or "a signal to another rank"
            raise Interrupted(what)

    def _handle(self, fault: Fault, step: int) -> bool:
        """Skip this step (True), or roll back (False), or raise FaultError: as the policy says."""
        for callback in self.callbacks:
            way = callback.claim(fault, step)
            if way is not None:
                self.engine.skip()
                self._go_back(way, step)
                return False
        policy, samples = self.judge.decide(fault), (self._first_samples[step], self.stream.consumed_samples)
        details = {"kind": fault.kind, "reason": fault.reason, "samples": list(samples)}
        self.engine.skip()
        if policy == "skip":
            self.run.log_event("skipped", step=step, **details)
            logger.warning("step %d is skipped: %s", step, fault.reason)
            return True
        if policy == "rollback":
            back = self.settings.faults.rollback_steps
            self.saving.settle(step)
            target = newest_verified(self.store, self.layout, self._channel, before=step - back + 1)
            if target is not None:
                self._roll_back(target, step, details)
                return False
            fault = Fault(fault.kind, f"{fault.reason}, and there is no checkpoint {back} steps back to roll back to")
        if self.judge.decisions >= self.settings.faults.most:
            fault = Fault(fault.kind, f"{fault.reason}, after {self.judge.decisions} skips and rollbacks (faults.most)")
        raise FaultError(
            f"step {step}: {fault.reason}; stopped before the optimizer step, so weights are those of step "
            f"{step - 1}. Lower optimizer.learning_rate, or look at samples {samples[0]} to {samples[1] - 1} of the "
            f"stream"
        )

    def _go_back(self, back: RollBack, step: int) -> None:
        """To before what a callback caused; the samples since then are not read again."""
        self.saving.settle(step)
        target = newest_verified(self.store, self.layout, self._channel, before=back.to_step + 1)
        if target is None:
            raise HarnessError(
                f"step {step}: {back.reason}, and there is no good checkpoint of step {back.to_step} to go back to"
            )
        since = self.store.read_state(target)["stream"]["consumed_samples"]
        self._roll_back(target, step, {"kind": back.kind, "reason": back.reason}, since)

    def _roll_back(self, target: int, step: int, details: dict[str, Any], since: int | None = None) -> None:
        """Go back to step `target`, and from there on without the samples from `since` on, or those of the last steps
        up to `step`."""
        if since is None:
            since = self._first_samples[max(step - self.settings.faults.rollback_steps + 1, min(self._first_samples))]
        window = since, self.stream.consumed_samples
        skipped = [*self.stream.state_dict()["skipped"], window]
        self._restore(self.store.read_state(target), keep_decisions=True)
        self._call("after_roll_back")
        for start, end in skipped:
            self.stream.skip(start, end)
        # First the checkpoints, then the records: a resume must never begin at a step that is not recorded.
        self.saving.delete_after(target)
        self.run.resume_at(target)
        self.run.log_event("rolled_back", step=step, to_step=target, skipped_samples=list(window), **details)
        logger.warning("step %d: %s; rolled back to step %d", step, details["reason"], target)
        self.save()  # again, with what was decided, so that a resume does not have to decide it once more

    def _stop(self) -> None:
        """Commit what is done and say so."""
        if self.step > 0:
            if self.saving.last_step != self.step:
                self.save()
            self.saving.finish(self.step, self.save)
        self.run.log_event("stopped", step=self.step, reason=f"asked to by {self.stopped_by}")
        logger.info("stopped by %s after step %d, which is saved; the same command goes on", self.stopped_by, self.step)

    # ---- saving and starting ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin a checkpoint of the last completed step, once the one before is written; once it is committed, those
        that are no longer to be kept are deleted."""
        state = {
            "step": self.step,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "layout": self.layout.axes,
            "validation_loss": self._score,
            "tokens_seen": self.tokens_seen,
            "stream": self.stream.state_dict(),
            "first_samples": [list(pair) for pair in self._first_samples.items()],
            "faults": self.judge.state_dict(),
            # As text: a loss may be no number, which JSON does not know.
            "unfinished": None if self._unfinished is None else json.dumps(self._unfinished),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
            "tokenizer": self.prepared.tokenizer.fingerprint,
            "selections": self.prepared.selections,
            "settings": plain(self.settings),
        }
        self.run.sync()  # a checkpoint must not outlive the records that lead up to it
        self.saving.begin(self.step, self.engine.fragments(owned=True), state)

    @property
    def saved_step(self) -> int | None:
        """See TrainerView."""
        return self.saving.last_step

    def protect(self, step: int | None) -> None:
        """See TrainerView."""
        self.saving.protect(step)

    def close(self) -> None:
        """Wait for what is being written, and stop background work."""
        self.saving.close()
        self.stream.close()

    def _begin(self, start: int | None) -> None:
        """The state to begin with: the run's own checkpoint, another run's weights, or new ones."""
        settings, tokenizer = self.settings, self.prepared.tokenizer.fingerprint
        origin: dict[str, Any] = {}
        if start is not None:
            state = self.store.read_state(start)
            for line in check_resume(state, settings, tokenizer, f"{self.store.folder}: step {start}"):
                logger.info("resumed with a change: %s", line)
            self._restore(state)
            self.saving.last_step = start
            if state.get("unfinished") is not None:
                self._unfinished = json.loads(state["unfinished"])
        elif settings.train.init_from is not None:
            origin = load_weights(self.engine, settings, self.prepared.tokenizer, self.layout, self._channel)
        elif settings.train.precision == "bf16" and self.layout.section.zero_stage > 0:
            initialise_masters(self.engine.fragments(), settings.model, settings.train.seed)
        self._open_run(start, origin)

    def _restore(self, state: dict[str, Any], *, keep_decisions: bool = False) -> None:
        """Everything as it was when `state` was saved; its files were verified already."""
        self.store.load(state["step"], into=self.engine.fragments(), verify=False)
        self.engine.refresh_weights()
        self.stream.load_state_dict(state["stream"])
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self._score = state.get("validation_loss")
        self._first_samples = dict(state.get("first_samples", []))
        self.judge.load_state_dict(state.get("faults", {}), keep_decisions=keep_decisions)
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))

    def _norm_removal(self) -> list[Callback]:
        settings = self.settings
        if not settings.norm_removal.enabled:
            return []
        return [
            NormRemoval(
                settings.norm_removal,
                self.model,
                self.layout,
                steps=self.total_steps,
                rows=settings.train.global_batch_size,
                sequence_length=settings.data.sequence_length,
            )
        ]

    def _forecasting(self) -> list[Callback]:
        settings = self.settings
        if settings.forecast.prior is None:
            return []
        return [
            Forecasting(
                settings.forecast,
                settings.schedule,
                peak=settings.optimizer.learning_rate,
                steps=self.total_steps,
                tokens_per_step=settings.train.global_batch_size * settings.data.sequence_length,
                parameters=count_parameters(settings.model).blocks,
                rank=self.layout.rank,
            )
        ]

    def _remember_sample(self, step: int) -> None:
        self._first_samples[step] = self.stream.consumed_samples
        self._first_samples.pop(step - self.settings.faults.rollback_steps, None)

    def _open_run(self, start: int | None, origin: dict[str, Any]) -> None:
        """Write what the run is into its folder and say it."""
        settings, counts = self.settings, count_parameters(self.settings.model)
        details = {
            "layout": repr(self.layout),
            "parameters": vars(counts),
            "selections": self.prepared.selections,
            "model_flops_per_token": self._flops_per_token,
            "peak_flops_per_second": self._peak.flops_per_second,
            "peak_source": self._peak.source,
            "utilisation_formula": "model_flops_per_token * tokens_per_second / (peak_flops_per_second * ranks), where "
            "model_flops_per_token = 6 * product weights + 12 * layers * heads * head width * sequence length",
        }
        # A run that was ended before its first checkpoint begins again: what it recorded is set aside, not lost.
        begun_before = self.run.existing() is not None
        recorded = self.step if self._unfinished is None else self.step - 1
        self.run.begin(dump_yaml(settings), resume_at=recorded if begun_before else None, details=details | origin)
        self.prepared.tokenizer.save(self.run.path / "tokenizer")
        self.run.log_event("started" if start is None else "resumed", step=self.step, **origin)
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


def _note_end(run: RunFolder, step: int, verdict: Verdict) -> None:
    """Put down why this process is ended by another thread than the loop's: in the events, and in this rank's log."""
    run.log_event("stopped", step=step, reason=verdict.text)
    logger.info("ended after step %d: %s", step, verdict.text, extra=FILE_ONLY)
