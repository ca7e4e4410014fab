"""What a run says of itself when it is over: the record that `copus audit` prints."""

from pydantic import NonNegativeFloat, NonNegativeInt

from profiles.configuration import Configuration
from profiles.record import Record


class Estimate(Record):
    """A figure and its 90 % interval."""

    value: float
    """The median."""
    low: float
    """Lower end, the 5th percentile."""
    high: float
    """Upper end, the 95th percentile."""


class PredictionCheck(Record):
    """Predicted step times beside those that the run then had. One prediction for each move or trial; what was seen is
    taken beside the steps just before, as the prediction was, so that a drift of the machine is no miss."""

    count: NonNegativeInt
    """Predictions that could be checked: at least three settled steps ran in the configuration."""
    mape_pct: float | None
    """Mean of |seen ÷ predicted − 1|, in percent; None without any."""
    coverage_pct: float | None
    """Share of the predictions whose 80 % interval has the time that was seen, in percent; None without any."""


class Audit(Record):
    """Was adapting worth it, by the run's own data? The gains are relative times to the same progress.

    A gain of 10 % over a configuration means that it would have taken 10 % longer to the progress that the run made.
    """

    training_seconds: NonNegativeFloat
    """From the start of training to its end: steps, moves, trials, evaluations, checkpoints."""
    compared_seconds: NonNegativeFloat
    """The share of it that the gains compare: steps, moves, decisions."""
    trial_seconds: NonNegativeFloat
    """Time in trials: their steps, which do train, and the moves there and back."""
    trial_move_seconds: NonNegativeFloat
    """The share of `trial_seconds` in which training stood still."""
    move_seconds: NonNegativeFloat
    """Time that moves took, those of trials left out."""
    measuring_seconds: NonNegativeFloat
    """Time that this run spent measuring throughput before it trained. It is in none of the gains."""
    restart_seconds: NonNegativeFloat
    """From the last sign of life to the workers' return after a failure, and the steps that were done again."""
    moves: NonNegativeInt
    """Lasting changes of configuration: moves, and trials after which the job stayed."""
    trials: NonNegativeInt
    """Trials that ended."""
    first: Configuration | None = None
    """The configuration that training began in."""
    best_fixed: Configuration | None = None
    """The fixed configuration that hindsight would choose; None while too little is known."""
    best_fixed_ran: bool = False
    """Whether the run itself timed it; if not, its time is the planner's prediction."""
    gain_over_first_pct: Estimate | None = None
    """How much longer the first configuration would have taken, in percent; None while the noise is unknown."""
    gain_over_best_fixed_pct: Estimate | None = None
    """How much longer the best fixed configuration would have taken; negative if it would have been faster."""
    regret_to_best_schedule_pct: Estimate | None = None
    """How much longer the run took than the best schedule of hindsight, its moves included."""
    predictions: PredictionCheck
    """Whether predicted step times came true."""
