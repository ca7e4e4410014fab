"""What runs next: rank 0 asks the planner, all ranks move together, and go back where a move was a mistake."""

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from copus.backends.base import Backend, Moved
from copus.backends.step_contract import Batches, StepRequest, StepResult
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import MidCollectiveError, RankError, broadcast_from_rank0, is_out_of_memory
from copus.events import DecisionMade, Event, Reconfigure, Trial
from copus.job import JobConfig
from planner.menu import rung_of
from planner.planner import Planner
from planner.sampling import executed_configuration
from planner.trials import SETTLING_STEPS
from planner.trials import Trial as RunningTrial
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.measurement import OUT_OF_MEMORY, Measurement
from profiles.noise_scale import NoiseScale, StepNorms
from profiles.table import ThroughputTable

REVOCABLE_STEPS = 3
"""Steps after a move in which a lack of memory is the move's fault. Buffers and caches have their full size by then."""
DECIDING_SHARE = 0.01
"""Share of the time that may go into decisions: training waits for them."""


class _Order(NamedTuple):
    """What every rank has to know of a decision; the rest of it stays on rank 0."""

    number: int
    target: Configuration | None
    """The configuration to move to; None to stay."""
    trial: bool
    """Whether it is only tried."""
    critical_batch: float | None
    """φ, sequences; None while it is unknown."""

    @classmethod
    def of(cls, decision: Decision) -> "_Order":
        target = decision.chosen if decision.switch else None
        return cls(decision.number, target, decision.trial, decision.critical_batch)


class Moves:
    """The decisions and moves of a run, on one of its ranks. All ranks call the same, at the same steps."""

    def __init__(
        self,
        job: JobConfig,
        backend: Backend,
        planner: Planner | None,
        state: TrainerState,
        report: Callable[[Event], None],
        survived: Callable[[str], None],
    ) -> None:
        """`planner` is there on rank 0; where it is not, nothing is ever decided. `state` is the trainer's own, up to
        date whenever something is called here. `survived` is told of moves that are taken back. Collective."""
        self._job = job
        self._backend = backend
        self._planner = planner
        self._state = state
        self._report = report
        self._survived = survived
        self._decides: bool = broadcast_from_rank0(planner is not None)
        """Whether rank 0 has a planner, on every rank."""
        self._steps_since_change = 0
        self._before: Configuration | None = None
        """What ran before the last move, while there is a way back."""
        self._decision = 0
        """Number of the decision that asked for that move."""
        self._trying = False
        """Whether a trial is under way, on every rank."""
        self._trial: RunningTrial | None = None
        """The trial, on rank 0."""
        self._moved_at_step: int = state.planner.get("moved_at_step", 0)
        """Step of the last move. From the checkpoint, so that a resumed run decides when the other would have."""
        self.deadline = math.inf
        """When training stops at the latest, on rank 0's monotonic clock."""
        self._decided_at, self._deciding_seconds = time.perf_counter(), 0.0
        """When rank 0 last decided, and how long that took."""

    @property
    def on_trial(self) -> bool:
        """Whether the job moved so recently that a lack of memory is the move's fault."""
        return self._before is not None and self._steps_since_change < REVOCABLE_STEPS

    @property
    def is_trying(self) -> bool:
        """Whether a trial is under way, whose steps are timed."""
        return self._trying

    def try_step(self, batches: Batches, request: StepRequest, current: Configuration) -> StepResult | None:
        """One optimizer step; `current` is the configuration of which it is one, with its whole batch. None where,
        instead, the job moved back from a configuration that is on trial and turns out to need more memory than there
        is: then nothing was trained on."""
        try:
            return self._backend.train_step(batches, request)
        except RankError as error:
            lack = error
        except Exception as error:
            if is_out_of_memory(error):  # no way back: the restart must not resume into it
                self._record_infeasible(current)
            raise
        self._move_back(lack, current)  # outside of the except block: nothing refers to the step's memory any more
        return None

    def note_step(self, configuration: Configuration, source: str | None, loss: float, seconds: float) -> None:
        """Take note of a step that was made, and let it end a trial. The planner learns the step's loss and, unless it
        is one of the smaller ones at the end of a run, how long it took. Collective during a trial."""
        self._steps_since_change += 1
        ordinary = configuration == self._backend.configuration
        if self._planner is not None:
            settled = ordinary and self._steps_since_change > SETTLING_STEPS
            executed = executed_configuration(self._backend.description, configuration, source)
            self._planner.observe_step(executed, seconds, settled)
            self._planner.observe_loss(self._state.samples_consumed, configuration.global_batch, loss)
        if self._trying and ordinary:
            self._go_on_trying(seconds)

    def note_evaluation(self, loss: float) -> None:
        """Take note of the held-out loss: it tells when a job with a target ends."""
        if self._planner is not None:
            self._planner.horizon.observe(self._state.samples_consumed, loss)

    def decide(self, noise: NoiseScale, norms: StepNorms | None) -> None:
        """Let rank 0 decide, tell everybody, and move if the decision says so. Nothing is decided during a trial, nor
        until a step of a new configuration was timed."""
        untimed = self._state.step <= self._moved_at_step + SETTLING_STEPS
        if self._decides and not self._trying and not untimed:
            self._decide(noise, norms)

    def _decide(self, noise: NoiseScale, norms: StepNorms | None) -> None:
        decision = self._ask_planner(noise, norms)
        order: _Order | None = broadcast_from_rank0(decision and _Order.of(decision))
        if order is None:
            return
        self._state.decisions = order.number + 1
        if self._state.step:  # before the first step it is a guess from laws, no reason to cap the learning rate
            self._state.critical_batch = order.critical_batch
        if order.target is None:
            return
        if decision is not None and decision.trial:
            assert self._planner is not None
            self._trial = self._planner.begin_trial(decision)
        seconds = self._move(order.target, order.number, order.trial)
        if seconds is None:
            self._trial = None
            return
        self._trying = order.trial
        if self._trial is not None:
            self._trial.observe_move(seconds)

    def begin(self, noise: NoiseScale) -> None:
        """Before the first step: move to where the policy begins; or, of a resumed run, out of a trial that the
        checkpoint fell into. Collective."""
        if self._decides and self._state.step == 0 and self._job.planner.start == "plan":
            self._decide(noise, None)
        self._leave_unfinished_trial()

    def _leave_unfinished_trial(self) -> None:
        """Go back to the configuration that ran before a trial which the checkpoint fell into. Collective."""
        running = None if self._planner is None else self._planner.before_trial
        running = broadcast_from_rank0(running)
        here = self._backend.configuration
        if running is not None and running != here and running.layout.accelerators == here.layout.accelerators:
            self._move(running, max(self._state.decisions - 1, 0), trial=True)

    def keep_state(self) -> None:
        """Put what the planner knows into the trainer's state, for a checkpoint."""
        if self._planner is not None:
            self._state.planner = self._planner.state() | {"moved_at_step": self._moved_at_step}

    def _go_on_trying(self, seconds: float) -> None:
        """After a step of a trial: stay in the candidate, go back to the configuration before, or go on as it is."""
        trial = self._trial
        verdict, running, number = broadcast_from_rank0(
            trial and (trial.observe_step(seconds), trial.running, trial.decision)
        )
        if verdict == "continue":
            return
        moved = self._move(running, number, trial=True) if verdict == "return" else None
        if moved is None:  # the trial ended where it is; if the way back was barred, in the candidate
            self._end_trial()
        elif trial is not None:
            trial.observe_move(moved, returned=True)

    def _end_trial(self) -> None:
        """The trial is over: rank 0 reports what it has shown, and the planner learns it."""
        trial, self._trial, self._trying = self._trial, None, False
        if trial is None or self._planner is None:
            return
        stayed = self._backend.configuration == trial.candidate
        self._planner.end_trial(trial)
        value, low, high = trial.ratio.ends if trial.ratio else (None, None, None)
        self._report(
            Trial(
                **self._state.here,
                candidate=trial.candidate,
                running=trial.running,
                steps=trial.steps,
                seconds=trial.seconds,
                move_seconds=trial.move_seconds,
                ratio=value,
                ratio_low=low,
                ratio_high=high,
                outcome="stayed" if stayed else "returned",
                decision=trial.decision,
            )
        )

    def _ask_planner(self, noise: NoiseScale, norms: StepNorms | None) -> Decision | None:
        """The decision, on rank 0; None if the last one took so long that another would waste time."""
        if self._planner is None:
            return None
        started = time.perf_counter()
        if self._deciding_seconds > DECIDING_SHARE * (started - self._decided_at):
            return None
        seconds_left = max(0.0, self.deadline - time.monotonic())
        current, consumed = self._backend.configuration, self._state.samples_consumed
        decision = self._planner.decide(noise, current, consumed, norms, seconds_left)
        self._decided_at, self._deciding_seconds = started, time.perf_counter() - started
        self._report(DecisionMade(**self._state.here, decision=decision, seconds=self._deciding_seconds))
        return decision

    def _move(self, after: Configuration, decision: int, trial: bool) -> float | None:
        """Move, and return the seconds that it took; None if the move was taken back."""
        before = self._backend.configuration
        started = time.perf_counter()
        try:
            moved = self._backend.move(after)
        except RankError as error:
            self._survived(f"the move to {after.label} was taken back, training goes on with {before.label}: {error}")
            self._give_up(after, error)
            return None
        except MidCollectiveError as error:
            if is_out_of_memory(error):  # the job restarts, and must not move there again
                self._record_infeasible(after)
            raise
        dist.barrier()
        seconds = time.perf_counter() - started
        self._steps_since_change, self._before, self._decision = 0, before, decision
        self._moved_at_step = self._state.step
        if self._planner is not None:
            self._planner.observe_move(before, after, seconds)
        self._report_move(before, moved, seconds, trial)
        return seconds

    def _move_back(self, lack: RankError, tried: Configuration) -> None:
        """The configuration that was moved to needs more memory than there is: on with the one before."""
        assert self._before is not None, "on trial"
        before, started = self._before, time.perf_counter()
        moved = self._backend.recover(before)
        self._survived(f"{tried.label} ran out of memory, the job moved back to {before.label}: {lack}")
        if self._planner is not None:
            self._planner.throughput.refuse(tried, OUT_OF_MEMORY)
            self._record_infeasible(tried)
        self._moved_at_step = self._state.step
        self._steps_since_change, self._before = 0, None  # it ran before: what it lacks now is not for want of trying
        seconds = time.perf_counter() - started
        if self._trial is not None:
            self._trial.observe_move(seconds, returned=True)
        trial = self._trying
        self._report_move(tried, moved, seconds, trial)
        if trial:
            self._end_trial()

    def _report_move(self, before: Configuration, moved: Moved, seconds: float, trial: bool) -> None:
        after = self._backend.configuration
        self._report(
            Reconfigure(
                **self._state.here,
                before=before,
                after=after,
                rung=rung_of(before, after),
                seconds=seconds,
                bytes_moved=moved.bytes_moved,
                decision=self._decision,
                peak_bytes=moved.peak_bytes,
                phases=moved.phases,
                trial=trial,
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
