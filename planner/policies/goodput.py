"""Our rule: move when that finishes the job sooner, at the pessimistic end of what is known."""

import math

import numpy as np
from scipy.special import ndtr

from planner.goodput import progress_per_sample
from planner.menu import Floats
from planner.outlook import QUANTILE_50, error_beside_current, look_ahead
from planner.plan import seconds_to_go
from planner.remaining import stage_seconds
from planner.situation import Choice, Situation
from planner.trials import EXPECTED_STEPS, SETTLING_STEPS, expected_seconds
from profiles.formatting import duration, duration_interval, percent
from profiles.throughput import DECILE

PESSIMISM = QUANTILE_50
"""Standard errors of log φ and of the throughput that a gain has to survive: the ends of the 50 % intervals."""
SWAY = 0.1
"""Standard errors that the expected gain has to exceed even where a move costs nothing, so that noise does not make the
batch go to and fro."""
BISECTIONS = 30
"""Halvings of the interval that a reservation value is looked for in: to a billionth of it."""
SMALLEST_SAVING = 1e-6
"""A saving below this share of the time left is none."""


class Goodput:
    """Plans the rest of the job at every decision, and takes the first step of the plan where it is sure to pay.

    The plan is the dynamic programme of `planner.plan` over the φ to be expected (`planner.forecast`), with the
    measured costs of moves: V(j) is the time to the end that begins in j and goes on as is best. A move from i to j
    saves

        saved(j) = V(i) − cost(i → j) − V(j)

    where V(i) may still move later. It is made when `saved` is positive

    - at both ends of the interval of φ, and at the slow end of that of the candidates' throughputs: then it is sure; or
    - as expected, even if the way back had to be paid too: then little is lost where the expectation was wrong.

    Of several the one with the largest expected saving. So a batch, which costs nothing, follows φ at once, a layout
    waits until the rest of the job pays for it, and an estimate that swings within its interval moves nothing dear.

    Where nothing is sure, a candidate whose time is a guess may be worth a trial (`planner.trials`): with X the saving
    if one stays there, its time log-normal around its expectation, a trial brings E[max(X, 0)] and costs both moves and
    the steps that are slower meanwhile (value of information, Howard 1966). Of several the one with the highest
    reservation value goes first, within the budget: that counts what the others may still bring.
    """

    name = "goodput"
    weighs_error = True
    needs_noise = True
    picks_start = True

    def choose(self, situation: Situation) -> Choice:
        """The first step of the best plan, or no move."""
        now, menu = situation, situation.menu
        # Sure is what no further estimate would undo. The error of c stays whatever the noise scale does, so waiting
        # would not make anything surer: it widens the savings that are shown, and bars no move.
        stages = stage_seconds(now, (-PESSIMISM, 0.0, PESSIMISM), with_common_error=False)
        *_, value = seconds_to_go(stages, menu, now.move_seconds)
        costs = menu.move_seconds(now.current, now.move_seconds)
        if not now.started:  # nothing is known but the prior: weigh its ends against each other
            whole = value + costs
            regret = whole / whole.min(axis=2, keepdims=True)
            return Choice((regret * np.array([0.25, 0.5, 0.25])[:, None, None]).sum(axis=0).argmin(axis=1))
        saved = _saved(now, value, costs)
        expected, tried = saved[1], np.full(costs.shape, -np.inf)
        if now.throughput_error.any():
            slow = np.exp(PESSIMISM * error_beside_current(now))
            *_, slower = seconds_to_go(stages * slow, menu, now.move_seconds)
            saved = _saved(now, slower, costs)
            tried = self._worth_of_trials(now, stages[:, 1], costs)
        least = saved.min(axis=0)
        sure = np.maximum(least, expected - costs - SWAY * (expected - least))
        threshold = SMALLEST_SAVING * np.take_along_axis(value[1], now.current[:, None], axis=1)
        certain = np.where(sure > threshold, expected, -np.inf)
        exploring = np.asarray(~np.isfinite(certain).any(axis=1))
        worth = np.where(exploring[:, None], np.where(tried > threshold, tried, -np.inf), certain)
        index = _largest(worth, menu.global_batch)
        moves = np.take_along_axis(worth, index[:, None], 1)[:, 0] > -np.inf
        return Choice(np.where(moves, index, now.current), sure, exploring & moves)

    def _worth_of_trials(self, now: Situation, stages: Floats, costs: Floats) -> Floats:
        """The reservation value of a trial of each candidate: seconds, shape (R, C), positive where the trial brings
        more than it costs; −∞ for what has run, for what the budget does not allow, and for what is so slow that even
        its own uncertainty could not make good for it.

        `stages` are those for the expected φ, shape (K, R, C). What is compared with is the best batch of the layout
        that runs, which costs nothing; a candidate is kept for as long as it would beat that if it were one standard
        error faster than predicted. The trial itself is taken to be one standard error slower.
        """
        error = error_beside_current(now)
        here = np.where(now.same_layout(), stages, np.inf).min(axis=2, keepdims=True)
        kept = np.logical_and.accumulate(stages * np.exp(-error) < here, axis=0)
        kept[0] = True
        step = now.menu.global_batch / now.samples_per_second
        running_step = np.take_along_axis(step, now.current[:, None], axis=1)
        slower = np.maximum(1 - here[0] / (stages[0] * np.exp(error)), 0.0)  # share of its steps that is lost
        lost = 2 * costs + (SETTLING_STEPS + EXPECTED_STEPS) * step * np.exp(error) * slower
        value = reservation_value((here * kept).sum(axis=0) - costs, (stages * kept).sum(axis=0), error, lost)
        hopeful = np.log(here[0] / stages[0]) + DECILE * error > 0
        affordable = expected_seconds(step, running_step, costs) <= now.trial_allowance[:, None]
        may = now.unseen & (now.throughput_error > 0) & hopeful & affordable
        return np.where(may, value, -np.inf)

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What the first run does and what for, as a clause."""
        index, here = int(choice.index[0]), int(situation.current[0])
        assert choice.saved_seconds is not None or not situation.started
        if choice.saved_seconds is None:
            return "the job starts with the first configuration of its plan"
        if index == here:
            return "nothing is sure to finish the job sooner than going on"
        label = situation.menu.configurations[index].label
        gain = situation.gain(index)
        if choice.exploring is not None and choice.exploring[0]:
            return f"{label} is worth a trial: {self._unsure(situation, index)}"
        cost = situation.menu.move_seconds(situation.current, situation.move_seconds)[0, index]
        ahead = look_ahead(situation)
        ends = (ahead.saved_expected, ahead.saved_low, ahead.saved_high)
        saved = duration_interval(*(float(end[index]) for end in ends))
        paid = f" net of the {duration(cost)} move" if cost else ""
        surely = float(choice.saved_seconds[0, index])
        waiting = f"; waiting for the next decision would lose {duration(surely)}" if surely >= 0.1 else ""
        above = f"goodput of {label} is {percent(abs(gain))} {'above' if gain >= 0 else 'below'} the current"
        # The best of a stretch may be worse than the current one by the end: the job will have moved on before.
        use = f"saves {saved} at equal loss" if ahead.saved_expected[index] > 0 else "is better for now"
        said = f"{above}, which {use}{paid}{waiting}"
        batch, speed = situation.menu.global_batch, situation.samples_per_second[0]
        if batch[index] == batch[here]:
            return said
        phi = situation.forecast.at(situation.samples_consumed)
        worth = progress_per_sample(batch, phi, situation.objective)
        sooner = float(situation.samples_left[0]) * (1 / speed[here] - 1 / speed[index]) - float(cost)
        tokens = f"{duration(abs(sooner))} {'sooner' if sooner >= 0 else 'later'}"
        learned = float(worth[index] / worth[here]) - 1
        progress = f"{percent(abs(learned))} {'more' if learned >= 0 else 'less'} progress"
        return f"{said}; at equal tokens {tokens} with {progress}"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Why this candidate was not chosen."""
        gain = situation.gain(index)
        if choice.saved_seconds is None or gain <= 0:
            return "no gain"
        if choice.saved_seconds[0, index] > 0:
            return f"gain {percent(gain)}, saves less than the chosen one"
        cost = situation.menu.move_seconds(situation.current, situation.move_seconds)[0, index]
        if cost > 0 and choice.saved_seconds[0, index] + cost > 0:
            return f"gain {percent(gain)} is below its cost of {duration(float(cost))}"
        return self._unsure(situation, index)

    def _unsure(self, situation: Situation, index: int) -> str:
        """`gain 41 % (−3 to 90 %): relative step time uncertain by ±30 %`: the 80 % interval, and what widens it most.

        The middle is at the φ that all figures of the decision are at; the forecast says how far off it may be.
        """
        here = int(situation.current[0])
        ends = [situation.forecast.at(situation.samples_consumed, sigmas) for sigmas in (-DECILE, 0.0, DECILE)]
        phi = [situation.critical_batch * end / ends[1] for end in ends]
        ratios = [float(np.log(rates[0, index] / rates[0, here])) for rates in map(situation.goodput, phi)]
        speed = DECILE * float(situation.throughput_error[0, index])
        noise = max(abs(ratios[0] - ratios[1]), abs(ratios[2] - ratios[1]))
        half = math.hypot(speed, noise)
        low, gain, high = (percent(math.expm1(ratios[1] + by * half)) for by in (-1, 0, 1))
        if speed >= noise:
            never = ", it has never run" if situation.unseen[0, index] else ""
            what = f"relative step time uncertain by ±{percent(math.expm1(speed))}{never}"
        else:
            error = percent(math.expm1(abs(math.log(phi[2][0] / phi[1][0]))))
            what = f"critical batch uncertain by ±{error}"
        return f"gain {gain} ({low} to {high}): {what}"


def _saved(now: Situation, value: Floats, costs: Floats) -> Floats:
    """What moving to each candidate saves, the move paid, where `value` are the seconds to go: shape (…, R, C)."""
    here = np.broadcast_to(now.current[:, None], (*value.shape[:-1], 1))
    return np.take_along_axis(value, here, axis=-1) - costs - value


def _largest(worth: Floats, batch: Floats) -> np.ndarray:
    """Place of the largest value in each row; of equals the smaller batch (2507.07101)."""
    best = worth.max(axis=1, keepdims=True)
    return np.where(worth >= best, batch, np.inf).argmin(axis=1)


def worth_trying(seconds: Floats, median: Floats, error: Floats) -> Floats:
    """E[max(`seconds` − T, 0)], where log T is normal around the logarithm of `median` with this standard error.

    However little is known, a time is never negative: the most that a trial can show to be saved is `seconds`. The
    expectation is that of a put option (Black and Scholes 1973).
    """
    strike = np.maximum(seconds, 1e-300)
    spread = np.maximum(error, 1e-9)
    d = np.clip(np.log(strike / median) / spread, -1e6, 1e6)
    return strike * ndtr(d) - median * np.exp(np.minimum(spread**2 / 2, 300.0)) * ndtr(d - spread)


def reservation_value(seconds: Floats, median: Floats, error: Floats, cost: Floats) -> Floats:
    """The saving z that a trial is worth giving up for: E[max(`seconds` − T − z, 0)] = `cost`, with T as above.

    If one may try several candidates, one after the other, and end in the best, it is optimal to go by descending z
    for as long as z exceeds what is already had (Weitzman 1979, Pandora's rule). So a trial that may bring much goes
    before one that surely brings little. −∞ where the trial brings less than it costs.
    """
    low, high = np.zeros_like(cost), np.maximum(seconds, 0.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = worth_trying(seconds - middle, median, error) >= cost
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return np.where(worth_trying(seconds, median, error) > cost, low, -np.inf)
