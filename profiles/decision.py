"""What the planner chose, and why: the record that `copus explain` prints."""

from typing import Literal

from pydantic import NonNegativeInt

from profiles.configuration import Configuration
from profiles.noise_scale import Forecast, NoiseScale
from profiles.record import Record


class CandidateScore(Record):
    """One configuration as the planner saw it."""

    configuration: Configuration
    """The candidate."""
    step_seconds: float | None
    """Predicted duration of a step; None if nothing is known."""
    step_seconds_spread: float | None
    """Half-width of the prediction's interval."""
    source: str
    """Where the prediction comes from: measured, interpolated, extrapolated, predicted (cost model), seen (live
    steps), none."""
    samples_per_second: float | None
    """Predicted throughput, sequences a second."""
    efficiency: float | None
    """Statistical efficiency 1 / (1 + B/φ) between 0 and 1; None while the noise is unknown."""
    goodput: float | None
    """The score: useful sequences a second."""
    gain: float | None
    """Goodput relative to the current configuration, minus 1."""
    verdict: str
    """The reason in words: `CHOSEN`, `current`, `gain 1.2 % is below 10 %`, `not measured`, …"""
    peak_bytes: int | None = None
    """Largest memory in use on any rank; None if it is not known."""
    move_seconds: float | None = None
    """What moving to it is expected to cost; None if no move was thought of."""
    saved_seconds: float | None = None
    """What moving to it surely saves until the end of the job, at equal loss, the move paid: the policy moves if it is
    positive. None from policies that do not work it out."""
    saved_low_seconds: float | None = None
    """What moving to it and staying there saves over staying, the move paid, at the lower end of its 50 % interval."""
    saved_expected_seconds: float | None = None
    """The same as expected."""
    saved_high_seconds: float | None = None
    """The same at the upper end."""
    saved_equal_tokens_seconds: float | None = None
    """What moving to it saves, and staying there, until as many tokens are trained on: another batch then leaves
    another loss, as `efficiency` says. None if no move was thought of."""


class Decision(Record):
    """One run of the planner."""

    number: NonNegativeInt
    """Counts the decisions of a run, from 0."""
    samples_consumed: NonNegativeInt
    """When it was taken."""
    policy: str
    """Which policy decided."""
    objective: Literal["plain", "lr-aware"]
    """Which form of Goodput was used: T·SE, or T·SE·√B (DESIGN: both are offered, every explanation says which)."""
    noise: NoiseScale
    """The noise that it was based on."""
    critical_batch_factor: float
    """c in φ = c · B_simple, as the job file says and the run has taught."""
    critical_batch_factor_low: float | None = None
    """Lower end of its 90 % interval."""
    critical_batch_factor_high: float | None = None
    """Upper end."""
    critical_batch: float | None
    """φ in sequences; None while the noise is unknown."""
    current: Configuration
    """What was running."""
    chosen: Configuration
    """What runs from now on; equal to `current` where nothing changes."""
    candidates: list[CandidateScore]
    """The contenders, best first; then the best of those that may not be chosen."""
    omitted: int = 0
    """Further candidates, which are not written down: a space may have thousands."""
    seconds_left: float | None = None
    """Expected time to the end of the job if it stays; None from policies that do not work it out."""
    critical_batch_low: float | None = None
    """Lower end of φ's 90 % interval, the errors of the noise scale and of c included; None from policies that do not
    work it out."""
    critical_batch_high: float | None = None
    """Upper end."""
    regret_bound: float | None = None
    """Share of the time left that is lost at most if φ lies within that interval, and nothing more is learned of it:
    beside the best batches for the φ that is true. None from policies that do not work it out."""
    predicted_gain: float | None
    """Goodput of `chosen` over `current`, minus 1."""
    reason: str
    """One sentence for people."""
    forecast: Forecast | None = None
    """The noise scale to be expected when twice the tokens will have been seen; None before the first known one."""
    advised: Configuration | None = None
    """What an advisory planner would have chosen; None if it may act, or would have stayed."""

    trial: bool = False
    """True if `chosen` is only tried: a few steps tell how fast it is, then the job stays or goes back."""

    @property
    def switch(self) -> bool:
        """Whether the job has to move."""
        return self.chosen != self.current
