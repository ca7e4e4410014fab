"""What runs next: rank 0 asks the planner, all ranks move together, and go back where a move was a mistake."""

import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from copus.backends.base import Backend, Batches, Moved, StepRequest, StepResult, TrainerState
from copus.collectives import RankError, broadcast_from_rank0, is_out_of_memory
from copus.events import DecisionMade, Event, Reconfigure, Warned
from copus.job import JobConfig
from planner.menu import rung_of
from planner.planner import Planner
from planner.sampling import executed_configuration
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.measurement import Measurement
from profiles.noise_scale import NoiseScale
from profiles.step_norms import StepNorms
from profiles.table import ThroughputTable
from profiles.throughput import OUT_OF_MEMORY

TRIAL_STEPS = 3
"""Steps after a move in which a lack of memory is the move's fault. Buffers and caches have their full size by then."""
SETTLING_STEPS = 2
"""Steps after a move whose time says nothing."""


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
        self._trial = False
        """Whether that move was a trial."""

    @property
    def on_trial(self) -> bool:
        """Whether the job moved so recently that a lack of memory is the move's fault."""
        return self._before is not None and self._steps_since_change < TRIAL_STEPS

    def try_step(self, batches: Batches, request: StepRequest) -> StepResult | None:
        """One optimizer step. None where, instead, the job moved back from a configuration that is on trial and turns
        out to need more memory than there is: then nothing was trained on."""
        try:
            return self._backend.train_step(batches, request)
        except RankError as error:
            lack = error
        except Exception as error:
            if request.on_trial and is_out_of_memory(error):  # too late to go back: a restart helps, elsewhere
                self._record_infeasible(self._backend.configuration)
            raise
        self._move_back(lack)  # outside of the except block: nothing refers to the step's memory any more
        return None

    def note_step(self, configuration: Configuration, source: str | None, loss: float, seconds: float) -> None:
        """Take note of a step that was made. The planner learns its loss and, unless it is one of the smaller ones at
        the end of a run, how long it took."""
        self._steps_since_change += 1
        if self._planner is None:
            return
        if self._steps_since_change > SETTLING_STEPS and configuration == self._backend.configuration:
            self._planner.throughput.observe(executed_configuration(configuration, source), seconds)
        if warning := self._planner.observe_loss(self._state.samples_consumed, configuration.global_batch, loss):
            self._report(Warned(**self._state.here, message=warning))

    def decide(self, noise: NoiseScale, norms: StepNorms | None) -> None:
        """Let rank 0 decide, tell everybody, and move where the decision says so."""
        if not self._decides:
            return
        decision: Decision = broadcast_from_rank0(self._ask_planner(noise, norms))
        self._state.decisions = decision.number + 1
        self._state.critical_batch = decision.critical_batch
        if decision.switch:
            self._move(decision.chosen, decision.number, decision.trial)

    def keep_state(self) -> None:
        """Put what the planner knows into the trainer's state, for a checkpoint."""
        if self._planner is not None:
            self._state.planner = self._planner.state()

    def _ask_planner(self, noise: NoiseScale, norms: StepNorms | None) -> Decision | None:
        """The decision, on rank 0."""
        if self._planner is None:
            return None
        started = time.perf_counter()
        decision = self._planner.decide(noise, self._backend.configuration, self._state.samples_consumed, norms)
        seconds = time.perf_counter() - started
        self._report(DecisionMade(**self._state.here, decision=decision, seconds=seconds))
        return decision

    def _move(self, after: Configuration, decision: int, trial: bool) -> None:
        before = self._backend.configuration
        started = time.perf_counter()
        try:
            moved = self._backend.move(after)
        except RankError as error:
            self._survived(f"the move to {after.label} was taken back, training goes on with {before.label}: {error}")
            self._give_up(after, error)
            return
        dist.barrier()
        seconds = time.perf_counter() - started
        self._steps_since_change, self._before, self._decision, self._trial = 0, before, decision, trial
        if self._planner is not None:
            self._planner.move_costs.observe(rung_of(before, after), seconds)
        self._report_move(before, moved, seconds)

    def _move_back(self, lack: RankError) -> None:
        """The configuration that was moved to needs more memory than there is: on with the one before."""
        assert self._before is not None, "on trial"
        tried, before, started = self._backend.configuration, self._before, time.perf_counter()
        moved = self._backend.recover(before)
        self._survived(f"{tried.label} ran out of memory, the job moved back to {before.label}: {lack}")
        if self._planner is not None:
            self._planner.throughput.refuse(tried, OUT_OF_MEMORY)
            self._record_infeasible(tried)
        self._steps_since_change, self._before = 0, None  # it ran before: what it lacks now is not for want of trying
        self._report_move(tried, moved, time.perf_counter() - started)

    def _report_move(self, before: Configuration, moved: Moved, seconds: float) -> None:
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
                trial=self._trial,
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
