"""Whether a run has diverged: steps in a row whose gradients are not finite."""

from collections.abc import Callable

from copus.backends.step_contract import StepRequest
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Event, Warned

FEW = 3
"""Skipped steps in a row before the first warning. A single one happens, in bf16 most of all."""


class Divergence:
    """Counts the steps in a row that the optimizer skipped, and warns of them.

    What it counts is in the trainer's state, so that a resumed run goes on counting.
    """

    def __init__(self, max_skipped_steps: int, state: TrainerState, report: Callable[[Event], None]) -> None:
        self._limit = max_skipped_steps
        self._state = state
        self._report = report
        self._warned = False
        self._lr = 0.0

    def note_step(self, skipped: bool, request: StepRequest) -> None:
        """Take note of a step, after the trainer's state has counted it."""
        state, self._lr = self._state, request.rules.lr
        if not skipped:
            if self._warned:
                self._warn(f"gradients are finite again, after {state.skipped_in_a_row} skipped steps")
            state.skipped_in_a_row, state.proven_samples, self._warned = 0, request.first_sample, False
            return
        state.skipped_in_a_row += 1
        if self.is_likely and not self._warned:
            self._warned = True
            self._warn(
                f"{state.skipped_in_a_row} steps in a row were skipped: their gradients are not finite. The run ends "
                f"after training.max_skipped_steps({self._limit}) of them"
            )

    @property
    def is_likely(self) -> bool:
        """Whether so many steps were skipped in a row that the run must not end as a success."""
        return self._state.skipped_in_a_row >= min(FEW, self._limit)

    @property
    def is_certain(self) -> bool:
        """Whether so many were skipped that the run must not go on."""
        return self._state.skipped_in_a_row >= self._limit

    def explain(self, resumes_from: str | None) -> None:
        """Warn that the run ends, why, and what to do."""
        count = self._state.skipped_in_a_row
        what = "the validation loss at the end is not finite"
        if self.is_likely:
            what = f"the gradients of {count} steps in a row were not finite"
        then = "submit the job again: there is no checkpoint from before"
        if resumes_from is not None:
            then = f"resume: the run goes on from {resumes_from}"
        self._warn(
            f"the run has diverged: {what}. Lower the learning rate ({self._lr:g} in the last step), then {then}"
        )

    def _warn(self, message: str) -> None:
        self._report(Warned(**self._state.here, message=message))
