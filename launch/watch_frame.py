"""One frame of `copus watch`: a `Watched` as something that rich can print."""

import time
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from launch.run_directory import shown
from launch.runs import STYLES
from launch.tables import facts_grid, progress_bar
from launch.watched import Watched
from launch.wording import describe_branch, describe_loss, describe_measurement
from profiles.decision import CandidateScore
from profiles.formatting import count, duration, noise_interval, percent, three_digits

BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 12
"""Characters of the longest bar of a goodput."""


def frame(watched: Watched, width: int) -> RenderableType:
    """State and progress, curve of the loss, figures, goodput against the alternatives, last events."""
    status = watched.status
    parts: list[RenderableType] = [_heading(watched)]
    if status.profile:
        parts.append(progress_bar(status.profile.done / status.profile.total, describe_measurement(status.profile)))
    elif status.branch:
        parts.append(progress_bar(status.branch.done / status.branch.total, describe_branch(status.branch)))
    elif status.start:
        tokens, total = (count(samples * status.start.seq_len) for samples in _samples(watched))
        parts += [progress_bar(status.fraction, f"{percent(status.fraction)}  {tokens} of {total} tokens"), Text()]
        parts.append(_loss(watched, min(width, 100)))
        parts.append(_figures(watched))
    if alternatives := watched.alternatives():
        parts += [_rule("goodput, as the last decision saw it"), _goodput(watched, alternatives)]
    if watched.told:
        parts.append(_rule("last events"))
        parts += [Text(line, overflow="ellipsis", no_wrap=True) for line in watched.told]
    return Group(*parts)


def headline(watched: Watched) -> str:
    """Run and state in a line."""
    status, state = watched.status, watched.state
    words = [f"{shown(watched.run)}: {state.name}" + (f" ({state.why})" if state.why else "")]
    if status.start:
        words.append(f"{count(status.samples_consumed * status.start.seq_len)} tokens ({percent(status.fraction)})")
    if status.step:
        words.append(f"loss {describe_loss(status.step.loss)}")
    return ", ".join(words)


def sparkline(values: list[float], width: int) -> str:
    """The values as bars of eighths, the means of equal shares of them, at most `width`."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [place * len(values) // width for place in range(width + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(cuts)]
    least, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - least) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def _heading(watched: Watched) -> Text:
    status, state = watched.status, watched.state
    heading = Text.assemble((shown(watched.run), "bold"), "   ", (state.name, STYLES.get(state.name, "") + " bold"))
    if state.why:
        heading.append(f": {state.why}", "dim")
    if status.start and status.time is not None:
        until = time.time() if state.alive else status.time
        heading.append(f"   {duration(max(0.0, until - status.start.time))} elapsed")
        if state.alive and status.remaining_seconds is not None:
            heading.append(f"   {duration(status.remaining_seconds)} left")
    return heading


def _samples(watched: Watched) -> tuple[int, int]:
    assert watched.status.start is not None
    return watched.status.samples_consumed, watched.status.start.total_samples


def _loss(watched: Watched, width: int) -> Table:
    status = watched.status
    words = describe_loss(status.step.loss) if status.step else "…"
    if status.evaluation:
        words += f"   validation {describe_loss(status.evaluation.loss)}"
        if status.first_evaluation and status.first_evaluation is not status.evaluation:
            words += f" (at first {describe_loss(status.first_evaluation.loss)})"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("loss", style="dim"), Text(sparkline(watched.losses, max(10, width - 60))), Text(words))
    return grid


def _figures(watched: Watched) -> Table:
    status, configuration = watched.status, watched.status.configuration
    noise = status.noise
    seen = "…" if status.samples_per_second is None else three_digits(status.samples_per_second)
    if watched.predicted is not None:
        seen += f" ({three_digits(watched.predicted)} predicted)"
    if status.mfu is not None:
        seen += f", MFU {percent(status.mfu)}"
    facts = [
        ("noise", noise_interval(noise.value, noise.low, noise.high) if noise else "unknown yet"),
        ("batch", str(configuration.global_batch) if configuration else "…"),
        ("layout", configuration.layout.label + " (trial)" * (status.trying is not None) if configuration else "…"),
        ("samples/s", seen),
        ("micro-batch", str(configuration.micro_batch) if configuration else "…"),
        ("moves", _moves(watched)),
    ]
    if status.skipped_steps:
        facts.append(("skipped", f"{status.skipped_steps} of {status.steps} steps, not finite"))
    return facts_grid(facts)


def _moves(watched: Watched) -> str:
    moves, trials = watched.status.moves, watched.status.trials
    words = f"{len(moves)} in {duration(sum(move.seconds for move in moves))}" if moves else "none"
    if trials:
        words += f", {len(trials)} trial{'s' * (len(trials) != 1)} in {duration(sum(t.seconds for t in trials))}"
    return words


def _goodput(watched: Watched, alternatives: list[CandidateScore]) -> Table:
    """Each in one line that eighty columns hold: its goodput as a bar and over that of what ran, and the verdict."""
    most = max((score.goodput or 0.0 for score in alternatives), default=0.0)
    labels = max((len(score.configuration.label) for score in alternatives), default=0)
    grid = Table.grid(padding=(0, 2))
    for width in (labels, BAR_WIDTH, len("×1.00")):
        grid.add_column(no_wrap=True, min_width=width)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for score in alternatives:
        running = score.configuration == watched.status.configuration
        share = (score.goodput or 0.0) / most if most > 0 else 0.0
        over = "" if score.gain is None else f"×{1 + score.gain:.2f}"
        # What was running when the planner decided may have moved since: say what runs now, not what it said then.
        words = "running" if running else "moved away from" if score.verdict in ("CHOSEN", "current") else score.verdict
        cells = [score.configuration.label, "█" * round(share * BAR_WIDTH), over, words]
        grid.add_row(*map(Text, cells), style="bold" if running else "")
    return grid


def _rule(title: str) -> Rule:
    return Rule(title, align="left", style="dim")
