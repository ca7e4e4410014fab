"""The training loop: steps, noise, decisions and what follows from them, in samples and tokens from end to end."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.step_contract import Batches, StepRequest, StepResult
from copus.checkpoints.saver import Saver
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import broadcast_from_rank0
from copus.divergence import Divergence
from copus.events import Evaluate, Event, Failure, Noise, Step, Warned
from copus.job import JobConfig
from copus.moves import Moves
from copus.noise.norm_window import NormWindow
from copus.noise.run_noise import RunNoise
from copus.noise.step_estimate import estimate_step
from copus.schedule import rules_at
from planner.decision_times import decision_is_due
from planner.planner import Planner
from planner.sampling import configuration_of_step, first_known_step, half_life, source_of_step
from profiles.configuration import Configuration

EndReason = Literal["finished", "interrupted", "max_minutes", "target_loss", "diverged"]


class Trainer:
    """One rank of a training run. All ranks do the same; rank 0 decides, and reports."""

    def __init__(
        self,
        job: JobConfig,
        run: Path,
        backend: Backend,
        train: Batches,
        valid: Batches,
        planner: Planner | None,
        state: TrainerState,
        report: Callable[[Event], None],
        stop_requested: Callable[[], bool],
        keep_nothing: bool = False,
    ) -> None:
        """`planner` is there on rank 0, or nowhere: then nothing is decided. `report` takes events on rank 0, and does
        nothing elsewhere. Collective.

        `keep_nothing` makes a run that ends without a checkpoint: a branch whose losses are all that is wanted.
        """
        self._job = job
        self._run = run
        self._backend = backend
        self._train = train
        self._valid = valid
        self._report = report
        self._stop_requested = stop_requested
        self._keep_nothing = keep_nothing
        self._leads = dist.get_rank() == 0
        self.state = state
        self._noise = RunNoise(half_life(job.planner, job.total_samples, job.model.seq_len))
        self._noise.restore(state.noise)
        self._norms = NormWindow()
        self._norms.restore(state.norms)
        self._evaluated_at: int | None = None
        self._asked_to_save = False
        """Whether rank 0's clock asked for a checkpoint in the last step."""
        self._last_loss_is_finite = True
        """Whether the last validation loss is finite."""
        self._divergence = Divergence(job.training.max_skipped_steps, state, report)
        self._moves = Moves(job, backend, planner, state, report, self._survived)
        self._saver = Saver(job.training, run, backend, state, report, self._survived)

    def train(self) -> EndReason:
        """Run to the end of the job, or until somebody asks to stop. Leaves a checkpoint, unless the run has diverged.

        Raises JobError if the disk has no room for that checkpoint.
        """
        started = time.monotonic()
        job, state = self._job, self.state
        if job.training.max_minutes is not None:
            self._moves.deadline = started + job.training.max_minutes * 60
        self._tell_of_another_lr()
        if state.step == 0:
            self._evaluate()
        self._moves.begin(self._noise.estimate())
        reason: EndReason = "finished"
        save_due = False
        while (configuration := self._next_configuration()) is not None:
            before = state.samples_consumed
            overtime = self._is_overtime(started)
            stopped = self._step(configuration, stop=self._stop_requested() or overtime)
            if self._divergence.is_certain:
                reason = "diverged"
                break
            reached = self._passed(before, job.evaluate_every_tokens) and self._evaluate()
            # What falls due is done before anything is saved or stopped: a resumed run cannot catch up on it.
            if self._decision_is_due(before):
                self._moves.decide(self._noise.estimate(), self._norms.take())
            if stopped:
                reason = broadcast_from_rank0("max_minutes" if overtime else "interrupted")
                break
            if reached:
                reason = "target_loss"
                break
            save_due = save_due or self._asked_to_save or self._passed(before, job.training.checkpoint_every_tokens)
            if save_due and not state.skipped_in_a_row:
                self._save()
                save_due = False
        if reason != "interrupted" and self._evaluated_at != state.samples_consumed:
            self._evaluate()
            if self._last_loss_is_finite and not self._divergence.is_likely:
                state.proven_samples = state.samples_consumed
            else:
                reason = "diverged"
        if self._keep_nothing:
            return reason
        if reason == "diverged":
            self._end_diverged()
        else:
            self._save(last=True)
        return reason

    def abandon(self) -> None:
        """After an error in `train` that this process outlives. Not collective."""
        self._saver.abandon()

    def _end_diverged(self) -> None:
        """Keep the checkpoints from before, and tell the user what to do."""
        self._divergence.explain(self._saver.set_diverged_aside())

    def _decision_is_due(self, samples_before: int) -> bool:
        """Whether the planner is to be asked after the last step: at its intervals, and once as soon as the noise scale
        may be known."""
        settings, state = self._job.planner, self.state
        samples = state.samples_consumed
        known_now = samples > samples_before and state.step == first_known_step(settings)
        batch = self._backend.configuration.global_batch
        return known_now or decision_is_due(samples_before, samples, batch, settings.every_samples)

    def _is_overtime(self, started: float) -> bool:
        """Whether the time of the job file is up. Rank 0's clock decides: the others never ask to stop for it."""
        limit = self._job.training.max_minutes
        return self._leads and limit is not None and time.monotonic() - started > limit * 60

    def _next_configuration(self) -> Configuration | None:
        """What the next step runs in: the current configuration, with a second micro-batch where it is measured only
        so, or at the end a smaller batch for what is left.

        None when nothing is left, or fewer sequences than there are replicas (times stages, where they interleave).
        """
        current = self._backend.configuration
        left = self._job.total_samples - self.state.samples_consumed
        planner, backend = self._job.planner, self._backend.description
        measured = configuration_of_step(planner, backend, current, self.state.step)
        if left >= measured.global_batch and not self._moves.is_trying:  # a trial times steps of the batch itself
            return measured
        if left >= current.global_batch:
            return current
        micro_batch = current.micro_batch
        while micro_batch:
            smallest = current.layout.dp * micro_batch * (current.layout.pp if current.layout.vp > 1 else 1)
            if left >= smallest:
                return Configuration(
                    layout=current.layout, micro_batch=micro_batch, global_batch=left // smallest * smallest
                )
            micro_batch //= 2
        return None

    def _step(self, configuration: Configuration, stop: bool) -> bool:
        """One optimizer step, and what is made of it. True if any rank asked to stop.

        Or, instead, a move back to the configuration before: then nothing was trained on.
        """
        request = self._request(configuration, stop)
        full = self._backend.configuration
        self._backend.move(configuration)  # of the same layout
        started = time.perf_counter()
        result = self._moves.try_step(self._train, request, full)
        if result is None:
            return False
        seconds = time.perf_counter() - started
        self._backend.move(full)  # what a run that is made longer goes on with
        self._count(configuration, request, result)
        self._report_step(configuration, request, result, seconds)
        self._measure_noise(configuration, request, result)
        self._divergence.note_step(result.skipped, request)
        self._moves.note_step(configuration, request.noise_source, result.loss, seconds)
        self._asked_to_save = result.save
        if not result.writing:
            self._saver.finish()
        self._saver.prune()
        return result.stop

    def _request(self, configuration: Configuration, stop: bool) -> StepRequest:
        """The next step, in a configuration."""
        state = self.state
        return StepRequest(
            first_sample=state.samples_consumed,
            rules=rules_at(self._job, state, configuration.global_batch),
            noise_source=source_of_step(self._job.planner, self._backend.description, configuration, state.step),
            stop=stop,
            writing=self._saver.is_writing,
            save=self._leads and self._saver.is_overdue,
            on_trial=self._moves.on_trial,
        )

    def _count(self, configuration: Configuration, request: StepRequest, result: StepResult) -> None:
        """Count a step."""
        if not result.skipped:
            rules = request.rules
            self.state.beta2_product = rules.beta2_product_before(self.state.optimizer_steps) * rules.betas[1]
        self.state.samples_consumed += configuration.global_batch
        self.state.step += 1
        self.state.optimizer_steps = self._backend.optimizer_steps

    def _report_step(
        self, configuration: Configuration, request: StepRequest, result: StepResult, seconds: float
    ) -> None:
        self._report(
            Step(
                **self.state.here,
                loss=result.loss,
                grad_norm=None if result.skipped else result.grad_sq**0.5,
                lr=request.rules.lr,
                beta2=request.rules.betas[1] if self._job.training.optimizer.has_second_moment else None,
                seconds=seconds,
                global_batch=configuration.global_batch,
                skipped=result.skipped,
                expert_imbalance=result.expert_load.imbalance if result.expert_load else None,
                dropped_share=result.expert_load.dropped if result.expert_load else None,
            )
        )

    def _measure_noise(self, configuration: Configuration, request: StepRequest, result: StepResult) -> None:
        """Take the step's share of the noise estimate, and report that where it changed."""
        skipped = self._noise.skipped
        informative = self._noise.update(result, self.state.samples_consumed, configuration.global_batch)
        if result.parts is not None and not result.skipped:
            full = result.parts  # whose |g|² is in the coordinates of |g_j|²; the step's own may be in others
            step = estimate_step(full.grad_sq, full.squared_norms, full.part_size)
            self._norms.add(full.grad_sq, step.noise_trace)
        if not informative and self._noise.skipped == skipped:
            return
        noise = self._noise.estimate()
        parts = result.parts or result.norm_layer_parts
        assert parts is not None, "the step said something about the noise"
        self._report(
            Noise(
                **self.state.here,
                value=noise.value,
                low=noise.low,
                high=noise.high,
                noise=noise,
                parts=len(parts.squared_norms) if informative else 0,
                part_size=parts.part_size,
                source=request.noise_source or "",
                skipped=self._noise.skipped,
                calibration=self._noise.calibration,
            )
        )

    def _evaluate(self) -> bool:
        """The validation loss, which every rank knows. True if it is what the job was to reach."""
        started = time.perf_counter()
        sequences = self._job.evaluate_sequences
        loss = self._backend.held_out_loss(self._valid, sequences)
        self._evaluated_at = self.state.samples_consumed
        self._moves.note_evaluation(loss)
        self._last_loss_is_finite = math.isfinite(loss)
        self._report(Evaluate(**self.state.here, loss=loss, sequences=sequences, seconds=time.perf_counter() - started))
        target = self._job.training.target_loss
        return target is not None and loss <= target

    def _save(self, last: bool = False) -> None:
        """Save, or begin to."""
        self.state.noise = self._noise.state()
        self.state.norms = self._norms.state()
        self.state.next_lr = self._next_lr()
        self._moves.keep_state()
        if last:
            self._saver.write_last()
        else:
            self._saver.begin()

    def _next_lr(self) -> float:
        """Learning rate of the next step, if it runs in the current configuration."""
        return rules_at(self._job, self.state, self._backend.configuration.global_batch).lr

    def _tell_of_another_lr(self) -> None:
        """Warn if the learning rate of a resumed run goes on at another value than it had: after a change of its
        schedule, of which the length of the run is a part, or of the batch."""
        before, now = self.state.next_lr, self._next_lr()
        if before is not None and not math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-30):
            message = (
                f"the learning rate goes on at {now:.3g}; the run had come to {before:.3g}. Its schedule "
                f"(training.tokens({self._job.training.tokens}), lr, min_lr, warmup_tokens, decay, decay_tokens, "
                "decay_shape) or its batch is another than before"
            )
            self._report(Warned(**self.state.here, message=message))

    def _survived(self, message: str) -> None:
        """Tell of a failure that the job outlives, on rank 0."""
        if self._leads:
            print(f"copus: {message}", file=sys.stderr, flush=True)
        self._report(Failure(**self.state.here, rank=dist.get_rank(), message=message, fatal=False))

    def _passed(self, samples_before: int, every_tokens: int | None) -> bool:
        """Whether the last step crossed a multiple of `every_tokens`."""
        if every_tokens is None:
            return False
        seq_len = self._job.model.seq_len
        return samples_before * seq_len // every_tokens < self.state.samples_consumed * seq_len // every_tokens
