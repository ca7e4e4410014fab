"""The training loop: steps, noise, decisions and what follows from them, in samples and tokens from end to end."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from copus.agreement import RankError, is_out_of_memory
from copus.backends.base import Backend, Batches, StepRequest, StepResult, TrainerState
from copus.events import DecisionMade, Evaluate, Event, Failure, Noise, Reconfigure, Step, Warned
from copus.job import JobConfig
from copus.noise.meter import NoiseMeter
from copus.noise.norm_window import NormWindow
from copus.noise.sources import run_as
from copus.noise.step_estimate import estimate_step
from copus.saver import Saver
from copus.schedule import rules_at
from planner.menu import rung_of
from planner.planner import Planner
from planner.sampling import source_of_step
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.measurement import Measurement
from profiles.table import ThroughputTable
from profiles.throughput import OUT_OF_MEMORY

TRIAL_STEPS = 3
"""Steps after a move in which a lack of memory is the move's fault. Buffers and caches have their full size by then."""

EndReason = Literal["finished", "interrupted", "max_minutes", "target_loss"]


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
        """`planner` is there on rank 0 only. `report` takes events on rank 0, and does nothing elsewhere.

        `keep_nothing` makes a run that ends without a checkpoint: a branch whose losses are all that is wanted.
        """
        self._job = job
        self._run = run
        self._backend = backend
        self._train = train
        self._valid = valid
        self._planner = planner
        self._report = report
        self._stop_requested = stop_requested
        self._keep_nothing = keep_nothing
        self.state = state
        self._noise = NoiseMeter(job.planner.noise_half_life_tokens)
        self._noise.restore(state.noise)
        self._norms = NormWindow()
        self._norms.restore(state.norms)
        self._steps_since_change = 0
        self._evaluated_at: int | None = None
        self._saver = Saver(job.training, run, backend, state, report, self._survived)
        self._before: Configuration | None = None
        """What ran before the last move, while there is a way back."""
        self._decision = 0
        """Number of the decision that asked for that move."""

    def train(self) -> EndReason:
        """Run to the end of the job, or until somebody asks to stop. Leaves a checkpoint either way."""
        started = time.monotonic()
        job, state = self._job, self.state
        if state.step == 0:
            self._evaluate()
        reason: EndReason = "finished"
        while (configuration := self._next_configuration()) is not None:
            before = state.samples_consumed
            overtime = self._is_overtime(started)
            stopped = self._step(configuration, stop=self._stop_requested() or overtime)
            reached = self._passed(before, job.training.evaluate_every_tokens) and self._evaluate()
            # What falls due is done before anything is saved or stopped: a resumed run cannot catch up on it.
            if self._passed(before, job.planner.every_samples * job.model.seq_len):
                self._decide()
            if stopped:
                reason = self._agree("max_minutes" if overtime else "interrupted")
                break
            if reached:
                reason = "target_loss"
                break
            if self._passed(before, job.training.checkpoint_every_tokens):
                self._save()
        if reason != "interrupted" and self._evaluated_at != state.samples_consumed:
            self._evaluate()
        if not self._keep_nothing:
            self._save(last=True)
        return reason

    def _is_overtime(self, started: float) -> bool:
        """Whether the time of the job file is up. Rank 0's clock decides: the others never ask to stop for it."""
        limit = self._job.training.max_minutes
        return dist.get_rank() == 0 and limit is not None and time.monotonic() - started > limit * 60

    def _next_configuration(self) -> Configuration | None:
        """What the next step runs in: the current configuration, or at the end a smaller batch for what is left.

        None when nothing is left, or fewer sequences than there are replicas (times stages, where they interleave).
        """
        current = self._backend.configuration
        left = self._job.total_samples - self.state.samples_consumed
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
        """One optimizer step, its events and its share of the noise estimate. True where any rank asked to stop.

        Or, instead, the move back from a configuration that has just been moved to and turns out to need more memory
        than there is: then nothing was trained on.
        """
        job, state, backend = self._job, self.state, self._backend
        full, batch = backend.configuration, configuration.global_batch
        backend.move(configuration)  # another one only at the end of the run, for what is left
        source = source_of_step(job.planner, configuration, state.step)
        rules = rules_at(job, state.samples_consumed, batch)
        started = time.perf_counter()
        lack = None
        try:
            result = backend.train_step(
                self._train,
                StepRequest(
                    first_sample=state.samples_consumed,
                    rules=rules,
                    noise_source=source,
                    stop=stop,
                    writing=self._saver.is_writing,
                    on_trial=self._on_trial(),
                ),
            )
        except RankError as error:
            lack = error
        except Exception as error:
            if self._on_trial() and is_out_of_memory(error):  # too late to go back: a restart helps, elsewhere
                self._record_infeasible(configuration)
            raise
        if lack is not None:  # outside of the except block: nothing refers to the step's memory any more
            self._move_back(configuration, lack)
            return False
        seconds = time.perf_counter() - started
        backend.move(full)  # what a run that is made longer goes on with
        state.samples_consumed += batch
        state.step += 1
        state.optimizer_steps = backend.optimizer_steps
        self._steps_since_change += 1
        self._report(
            Step(
                **self._now(),
                loss=result.loss,
                grad_norm=None if result.skipped else result.grad_sq**0.5,
                lr=rules.lr,
                beta2=rules.betas[1],
                seconds=seconds,
                global_batch=batch,
                skipped=result.skipped,
            )
        )
        self._measure_noise(result, batch, source)
        if self._planner is not None and self._steps_since_change > 2 and configuration == full:
            self._planner.throughput.observe(run_as(full, source), seconds)
        if self._planner is not None and (
            warning := self._planner.observe_loss(state.samples_consumed, batch, result.loss)
        ):
            self._report(Warned(**self._now(), message=warning))
        if not result.writing:
            self._saver.finish()
        return result.stop

    def _measure_noise(self, result: StepResult, batch: int, source: str | None) -> None:
        seq_len = self._job.model.seq_len
        skipped = self._noise.skipped
        informative = self._noise.update(result, self.state.samples_consumed * seq_len, batch * seq_len)
        if result.parts is not None and not result.skipped:
            step = estimate_step(result.grad_sq, result.parts.squared_norms, result.parts.part_size)
            self._norms.add(result.grad_sq, step.noise_trace)
        if not informative and self._noise.skipped == skipped:
            return
        noise = self._noise.estimate()
        parts = result.parts or result.norm_layer_parts
        assert parts is not None, "the step said something about the noise"
        self._report(
            Noise(
                **self._now(),
                value=noise.value,
                low=noise.low,
                high=noise.high,
                noise=noise,
                parts=len(parts.squared_norms) if informative else 0,
                part_size=parts.part_size,
                source=source or "",
                skipped=self._noise.skipped,
                calibration=self._noise.calibration,
            )
        )

    def _decide(self) -> None:
        """Let rank 0 decide, tell everybody, and move where the decision says so."""
        state = self.state
        box: list[Decision | None] = [None]
        norms = self._norms.take()
        if self._planner is not None:
            started = time.perf_counter()
            decision = self._planner.decide(
                self._noise.estimate(), self._backend.configuration, state.samples_consumed, norms
            )
            seconds = time.perf_counter() - started
            self._report(DecisionMade(**self._now(), decision=decision, seconds=seconds))
            box = [decision]
        dist.broadcast_object_list(box)
        shared = box[0]
        assert shared is not None, "rank 0 has the planner"
        state.decisions = shared.number + 1
        if shared.switch:
            self._move(shared.chosen, shared.number)

    def _move(self, after: Configuration, decision: int) -> None:
        before = self._backend.configuration
        started = time.perf_counter()
        try:
            moved = self._backend.move(after)
        except RankError as error:
            self._survived(f"the move to {after.label} was taken back, training goes on with {before.label}: {error}")
            self._give_up(after, error)
            return
        dist.barrier()
        self._steps_since_change, self._before, self._decision = 0, before, decision
        seconds, rung = time.perf_counter() - started, rung_of(before, after)
        if self._planner is not None:
            self._planner.move_costs.observe(rung, seconds)
        self._report(
            Reconfigure(
                **self._now(),
                before=before,
                after=after,
                rung=rung,
                seconds=seconds,
                bytes_moved=moved.bytes_moved,
                decision=decision,
                peak_bytes=moved.peak_bytes,
                phases=moved.phases,
            )
        )

    def _on_trial(self) -> bool:
        """Whether the job moved so recently that a lack of memory is the move's fault."""
        return self._before is not None and self._steps_since_change < TRIAL_STEPS

    def _move_back(self, tried: Configuration, lack: RankError) -> None:
        """The configuration that was moved to needs more memory than there is: on with the one before."""
        assert self._before is not None, "on trial"
        before, started = self._before, time.perf_counter()
        moved = self._backend.recover(before)
        self._survived(f"{tried.label} ran out of memory, the job moved back to {before.label}: {lack}")
        if self._planner is not None:
            self._planner.throughput.refuse(tried, OUT_OF_MEMORY)
            self._record_infeasible(tried)
        self._steps_since_change, self._before = 0, None  # it ran before: what it lacks now is not for want of trying
        self._report(
            Reconfigure(
                **self._now(),
                before=tried,
                after=before,
                rung=rung_of(tried, before),
                seconds=time.perf_counter() - started,
                bytes_moved=moved.bytes_moved,
                decision=self._decision,
                peak_bytes=moved.peak_bytes,
                phases=moved.phases,
            )
        )

    def _give_up(self, configuration: Configuration, error: RankError) -> None:
        """Never move there again in this job; where memory is what it lacks, in no other either."""
        if self._planner is None:
            return
        why = OUT_OF_MEMORY if error.out_of_memory else f"could not be built: {error}"
        self._planner.throughput.refuse(configuration.layout, why)  # what was built does not depend on the batch
        if error.out_of_memory:
            self._record_infeasible(configuration)

    def _record_infeasible(self, configuration: Configuration) -> None:
        """Write into the throughput table that a configuration runs out of memory."""
        row = Measurement(
            fingerprint=self._backend.fingerprint(),
            model=self._job.model,
            configuration=configuration,
            failure=OUT_OF_MEMORY,
            time=time.time(),
        )
        try:
            ThroughputTable(self._job.profile.table).add(row)
        except OSError as error:
            print(f"copus: the throughput table could not be told: {error}", file=sys.stderr, flush=True)

    def _evaluate(self) -> bool:
        """The validation loss, which every rank knows. True where it is what the job was to reach."""
        started = time.perf_counter()
        sequences = self._job.training.evaluate_sequences
        loss = self._backend.evaluate(self._valid, sequences)
        self._evaluated_at = self.state.samples_consumed
        self._report(Evaluate(**self._now(), loss=loss, sequences=sequences, seconds=time.perf_counter() - started))
        target = self._job.training.target_loss
        return target is not None and loss <= target

    def _save(self, last: bool = False) -> None:
        """Save, or begin to."""
        self.state.noise = self._noise.state()
        self.state.norms = self._norms.state()
        if self._planner is not None:
            self.state.planner = self._planner.state()
        if last:
            self._saver.write_last()
        else:
            self._saver.begin()

    def _survived(self, message: str) -> None:
        """Tell of a failure that the job outlives, on rank 0."""
        if dist.get_rank() == 0:
            print(f"copus: {message}", file=sys.stderr, flush=True)
        self._report(Failure(**self._now(), rank=dist.get_rank(), message=message, fatal=False))

    def _passed(self, samples_before: int, every_tokens: int | None) -> bool:
        """Whether the last step crossed a multiple of `every_tokens`."""
        if every_tokens is None:
            return False
        seq_len = self._job.model.seq_len
        return samples_before * seq_len // every_tokens < self.state.samples_consumed * seq_len // every_tokens

    def _agree(self, reason: EndReason) -> EndReason:
        """Rank 0's reason, on every rank."""
        box = [reason]
        dist.broadcast_object_list(box)
        return box[0]

    def _now(self) -> dict[str, int]:
        return {"step": self.state.step, "samples_consumed": self.state.samples_consumed}
