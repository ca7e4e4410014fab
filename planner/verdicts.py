"""What a decision says of its candidates: a verdict, and what moving to each would cost and save."""

from collections.abc import Collection, Sequence

import numpy as np

from planner.outlook import Outlook
from planner.policies.policy import Policy
from planner.situation import Choice, Situation
from profiles.configuration import Configuration
from profiles.decision import CandidateScore
from profiles.formatting import percent

MOST_ELIGIBLE, MOST_REFUSED = 12, 8
"""Candidates that a decision keeps of those that may be chosen, the best, and of those that may not."""


def with_verdicts(
    eligible: Sequence[CandidateScore],
    situation: Situation,
    choice: Choice,
    policy: Policy,
    outlook: Outlook | None,
    advisory: bool,
) -> list[CandidateScore]:
    """The candidates that could be chosen, which are those of the situation's menu in its order, each with its verdict
    and with the seconds that moving to it costs and saves. A chosen one that is only advice says so."""
    here = int(situation.current[0])
    current = eligible[here]
    costs = situation.menu.move_seconds(situation.current, situation.move_seconds)[0]
    saved = choice.saved_seconds
    with np.errstate(divide="ignore", invalid="ignore"):  # an unknown throughput is 0
        seconds = situation.samples_left[0] / situation.samples_per_second[0]
        equal_tokens = np.nan_to_num(seconds[here] - seconds, posinf=0.0, neginf=0.0)
    judged = []
    for index, score in enumerate(eligible):
        if index == here:
            verdict = "current"
        elif index == choice.index[0]:
            verdict = "WOULD BE CHOSEN" if advisory else "CHOSEN"
        elif (score.gain or 0.0) >= 0:
            verdict = policy.verdict(situation, choice, index)
        elif outlook is not None and outlook.saved_high[index] > 0:
            verdict = f"saving uncertain: goodput {percent(score.gain or 0.0)}"  # beside it stands its interval
        else:
            slower = (score.samples_per_second or 0.0) < (current.samples_per_second or 0.0)
            verdict = f"{'slower' if slower else 'lower goodput'}: {percent(score.gain or 0.0)}"
        figures = {
            "verdict": verdict,
            "move_seconds": float(costs[index]),
            "saved_seconds": None if saved is None else float(saved[0, index]),
            "saved_equal_tokens_seconds": float(equal_tokens[index] - costs[index]),
        }
        if outlook is not None:
            figures |= {
                "saved_low_seconds": float(outlook.saved_low[index]),
                "saved_expected_seconds": float(outlook.saved_expected[index]),
                "saved_high_seconds": float(outlook.saved_high[index]),
            }
        judged.append(score.model_copy(update=figures))
    return judged


def worth_keeping(
    eligible: Sequence[CandidateScore], refused: Sequence[CandidateScore], always: Collection[Configuration | None]
) -> list[CandidateScore]:
    """The best of the candidates that could be chosen, those in `always`, and the best of those that may not be chosen:
    a space may have thousands, and every decision is written to the event log."""
    best = [score for rank, score in enumerate(eligible) if rank < MOST_ELIGIBLE or score.configuration in always]
    return best + list(refused[:MOST_REFUSED])
