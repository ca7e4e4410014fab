"""Do small batches train as well as large ones, and as easily? The three findings of 2507.07101, on a small Llama.

    python -m benchmarks.small_batch [--batches 1,4,16,64,256] [--seeds 3] [--other-seeds N] [--tokens N] [--job FILE]
        [--out DIR] [--plot FILE] [--judge] [--quick] [--json]

Every cell trains the model of benchmarks/small_batch.yaml (or of --job: benchmarks/small_batch_long.yaml has the
proportions of the paper's own runs) on the same number of tokens, from the same weights for a
seed, with one batch, optimizer, β2 rule and peak learning rate, and evaluates it on held-out sequences. `fixed` keeps
β2 as it is at the batch of 8, `half-life` keeps its half-life in tokens. The schedule is a warm-up and a linear decay
to 0, in tokens. Updates are those that jobs make (`copus.backends.optimizers`). Cells that DIR has are not run again.

The verdicts can fail. Each has a figure, the 80 % interval of it over the seeds that all of its cells have, and holds
(true), fails (false), or, if the interval has both or cells are missing, stays open (null). A best learning rate at the
end of its grid makes a verdict open too. `--other-seeds` is for what only the table and the picture show.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student

from benchmarks.command import console_of, copus_output, parser_of, tell
from copus.job import JobConfig, load_job
from copus.optimizers import Optimizer

JOB = Path(__file__).with_name("small_batch.yaml")
OUT = Path("build/small-batch")
BATCHES = "1,4,16,64,256"
CLOSE = 0.05
"""Nats within which a loss counts as as good as the best."""
COARSE = 4.0
"""Ratio of neighbouring learning rates in the first grid; beside the best one it is the square root of that."""
POINTS = 5
"""Learning rates of the first grid."""
MOST_POINTS = 12
LEAST_URGENT = 3
"""Of `_urgency`: what no verdict needs."""
SEQUENCES_TOGETHER = 64
"""Sequences in a step of all runs that train together: fewer are bound by calls, more leave the caches."""

OPTIMIZERS: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
"""Turns the section of a job file into an optimizer."""


class Arm(NamedTuple):
    """An optimizer with a rule, and the middle of its grid of learning rates."""

    optimizer: dict[str, Any]
    rule: str
    middle: float
    """At a batch of 8."""
    exponent: float
    """The middle grows with the batch to this power."""


ARMS = (
    Arm({"kind": "adamw", "weight_decay": 0.0}, "half-life", 8e-3, 0.5),
    Arm({"kind": "adamw", "weight_decay": 0.0, "beta2_follows_batch": False}, "fixed", 8e-3, 0.5),
    Arm({"kind": "adafactor"}, "half-life", 8e-3, 0.5),
    Arm({"kind": "sgd"}, "none", 0.5, 0.5),
)


class Cell(NamedTuple):
    """One training run, and what came of it."""

    batch: int
    """Sequences."""
    optimizer: str
    rule: str
    """fixed, half-life; none without an average of squares."""
    lr: float
    """Peak."""
    seed: int
    tokens: int
    loss: float
    """Of held-out sequences at the end, nats per token; infinite if training diverged."""


Losses = dict[float, float]
"""Learning rate → loss."""


class Grid:
    """All cells of the benchmark: those that are on disk, and those that are still to be trained."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        self.job = job
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "cells.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self.cells = [Cell(**(values | {"loss": float(values["loss"])})) for values in map(json.loads, lines)]

    def losses(self, arm: Arm, batch: int, seed: int) -> Losses:
        """Of the cells so far with this arm, batch and seed."""
        wanted = (batch, arm.optimizer["kind"], arm.rule, seed, self.job.training.tokens)
        return {
            cell.lr: cell.loss
            for cell in self.cells
            if (cell.batch, cell.optimizer, cell.rule, cell.seed, cell.tokens) == wanted
        }

    def fill(self, arm: Arm, batch: int, seeds: Sequence[int], report: Callable[[str], None]) -> None:
        """Train what the grids of an arm and a batch lack, as many runs together as pays."""
        together = max(1, SEQUENCES_TOGETHER // batch)
        while missing := [
            (lr, seed) for seed in seeds for lr in wanted_rates(arm, batch, self.losses(arm, batch, seed))
        ]:
            for first in range(0, len(missing), together):
                runs = missing[first : first + together]
                report(f"{arm.optimizer['kind']} {arm.rule}, batch {batch}, {len(runs)} of {len(missing)} runs")
                for (lr, seed), loss in zip(runs, self._train(arm, batch, runs), strict=True):
                    name = arm.optimizer["kind"]
                    self._add(Cell(batch, name, arm.rule, lr, seed, self.job.training.tokens, loss))

    def is_filled(self, arm: Arm, batch: int, seeds: Sequence[int]) -> bool:
        """Whether the grid of an arm and a batch lacks nothing."""
        return not any(wanted_rates(arm, batch, self.losses(arm, batch, seed)) for seed in seeds)

    def filled_seeds(self, cells: Sequence[tuple[Arm, int]], seeds: Sequence[int]) -> list[int]:
        """Seeds for which the grids of all these arms and batches lack nothing."""
        return [seed for seed in seeds if all(self.is_filled(arm, batch, [seed]) for arm, batch in cells)]

    def _add(self, cell: Cell) -> None:
        self.cells.append(cell)
        with open(self._path, "a") as file:  # one write of one line
            file.write(json.dumps(cell._asdict() | {"loss": str(cell.loss)}) + "\n")

    def _train(self, arm: Arm, batch: int, runs: Sequence[tuple[float, int]]) -> list[float]:
        import torch  # seconds

        from benchmarks.small_batch_training import train

        torch.set_flush_denormal(True)  # squares of weights without gradients decay to such numbers, which are slow
        return train(self.job, OPTIMIZERS.validate_python(arm.optimizer), batch, runs)


def wanted_rates(arm: Arm, batch: int, losses: Losses) -> list[float]:
    """Learning rates that a grid with these losses lacks: first a coarse grid; then, while the best is at an end, one
    beyond it; then those halfway between the best and its neighbours."""
    middle = arm.middle * (batch / 8) ** arm.exponent
    coarse = [_three_digits(middle * COARSE ** (point - POINTS // 2)) for point in range(POINTS)]
    if missing := [lr for lr in coarse if lr not in losses]:
        return missing
    if len(losses) >= MOST_POINTS:
        return []
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda lr: losses[lr]))
    if best == 0:
        return [_three_digits(rates[0] / COARSE)]
    if best == len(rates) - 1:
        return [_three_digits(rates[-1] * COARSE)]
    pairs = zip(rates[best - 1 : best + 1], rates[best : best + 2], strict=True)
    return [_three_digits(math.sqrt(a * b)) for a, b in pairs if b / a > 1.1 * math.sqrt(COARSE)]


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def best_loss(losses: Losses) -> float:
    """At the best learning rate."""
    return min(losses.values())


def is_inside(losses: Losses) -> bool:
    """Whether the best learning rate is at no end of the grid."""
    return min(losses) < min(losses, key=lambda lr: losses[lr]) < max(losses)


def width(losses: Losses) -> float:
    """Octaves of learning rates whose loss is within `CLOSE` of the best, between neighbours of the grid on a line of
    the loss over the learning rate's logarithm. Where the grid ends sooner it is what the grid has."""
    rates = sorted(losses)
    limit = best_loss(losses) + CLOSE
    place = rates.index(min(losses, key=lambda lr: losses[lr]))
    ends = []
    for direction in (-1, 1):
        index = place
        while 0 <= index + direction < len(rates) and losses[rates[index + direction]] <= limit:
            index += direction
        end = math.log2(rates[index])
        beyond = index + direction
        if 0 <= beyond < len(rates) and math.isfinite(losses[rates[beyond]]):
            share = (limit - losses[rates[index]]) / (losses[rates[beyond]] - losses[rates[index]])
            end += share * (math.log2(rates[beyond]) - end)
        ends.append(end)
    return ends[1] - ends[0]


def verdict(statement: str, figures: Sequence[float], most: float, *, decided: bool) -> dict[str, Any]:
    """Whether a figure is at most `most`: by the 80 % interval of its mean over seeds (Student's). Without figures it
    is open."""
    mean = float(np.mean(figures)) if figures else None
    low = high = mean
    if mean is not None and len(figures) > 1:
        half = float(student.ppf(0.9, len(figures) - 1)) * float(np.std(figures, ddof=1)) / math.sqrt(len(figures))
        low, high = mean - half, mean + half
    holds = None
    if low is not None and high is not None and len(figures) > 1 and decided:
        holds = True if high <= most else False if low > most else None
    return {
        **{"statement": statement, "figure": mean, "interval": [low, high]},
        **{"seeds": len(figures), "at_most": most, "holds": holds},
    }


def verdicts(grid: Grid, batches: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The findings of the paper, for what was trained; open where something is missing."""
    small, large = min(batches), max(batches)
    half_life, fixed, adafactor, sgd = ARMS

    def compare(statement: str, most: float, cells: list[tuple[Arm, int]], figure: Callable[..., float]) -> None:
        """Add a verdict on a figure of the losses of these cells, for each seed."""
        filled = grid.filled_seeds(cells, seeds)
        by_seed = [[grid.losses(arm, batch, seed) for arm, batch in cells] for seed in filled]
        decided = all(is_inside(losses) for of_seed in by_seed for losses in of_seed)
        found.append(verdict(statement, [figure(*of_seed) for of_seed in by_seed], most, decided=decided))

    def behind(losses: Losses, *others: Losses) -> float:
        return best_loss(losses) - min(map(best_loss, (losses, *others)))

    found: list[dict[str, Any]] = []
    compare(
        f"AdamW with the half-life kept trains as well at batch {small} as at the best batch: nats behind it",
        CLOSE,
        [(half_life, small), *((half_life, batch) for batch in batches if batch != small)],
        behind,
    )
    compare(
        f"batch {small} is no more sensitive to the learning rate than batch {large}: octaves by which its range is "
        "narrower",
        0.0,
        [(half_life, small), (half_life, large)],
        lambda a, b: width(b) - width(a),
    )
    for arm, name in ((sgd, "SGD without momentum"), (adafactor, "Adafactor")):
        compare(
            f"{name} at batch {small} trains as well as AdamW there: nats behind it",
            CLOSE,
            [(arm, small), (half_life, small)],
            lambda a, b: best_loss(a) - best_loss(b),
        )
    compare(
        f"at batch {small} a kept half-life is no worse than a fixed β2: nats behind it",
        0.0,
        [(half_life, small), (fixed, small)],
        lambda a, b: best_loss(a) - best_loss(b),
    )
    return found


def fill_all(
    grid: Grid, job_file: Path, batches: Sequence[int], seeds: int, other_seeds: int, console: Console
) -> None:
    """Train what is missing, what the verdicts need first; what none of them needs for `other_seeds` seeds."""
    copus_output("data", str(job_file))
    todo = sorted(
        ((arm, batch) for arm in ARMS for batch in batches), key=lambda cell: _urgency(cell[0], cell[1], batches)
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for arm, batch in todo:
            count = other_seeds if _urgency(arm, batch, batches) == LEAST_URGENT else seeds
            grid.fill(arm, batch, range(count), lambda said: progress.update(task, description=said))
            progress.advance(task)


def result_of(grid: Grid, batches: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """What was trained, and what it says."""
    tokens = grid.job.training.tokens
    trained = [cell for cell in grid.cells if cell.tokens == tokens and cell.batch in batches and cell.seed in seeds]
    return {
        "tokens": tokens,
        "cells": [cell._asdict() | {"loss": cell.loss if math.isfinite(cell.loss) else None} for cell in trained],
        "rows": list(rows(grid, batches, seeds)),
        "verdicts": verdicts(grid, batches, seeds),
    }


def _urgency(arm: Arm, batch: int, batches: Sequence[int]) -> int:
    """The verdicts compare AdamW at both ends, everything at the smallest batch, then AdamW at all of them; what is
    trained first has the least."""
    if arm is ARMS[0]:
        return 0 if batch in (min(batches), max(batches)) else 2
    return 1 if batch == min(batches) else LEAST_URGENT


def rows(grid: Grid, batches: Sequence[int], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Means over the seeds that are trained, by arm and batch."""
    for arm in ARMS:
        for batch in batches:
            found = [grid.losses(arm, batch, seed) for seed in grid.filled_seeds([(arm, batch)], seeds)]
            if not found:
                continue
            rates = [min(losses, key=lambda lr: losses[lr]) for losses in found]
            yield {
                "optimizer": arm.optimizer["kind"],
                "rule": arm.rule,
                "batch": batch,
                "lr": float(np.exp(np.mean(np.log(rates)))),
                "loss": float(np.mean([best_loss(losses) for losses in found])),
                "octaves": float(np.mean([width(losses) for losses in found])),
                "inside": all(is_inside(losses) for losses in found),
                "seeds": len(found),
            }


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table(
        *("optimizer", "β2", "batch", "seeds", "best learning rate", "loss", f"octaves within {CLOSE}"),
        title="Small batches",
    )
    for row in result["rows"]:
        mark = "" if row["inside"] else " (end of the grid)"
        cells = (f"{row['lr']:.2g}{mark}", f"{row['loss']:.3f}", f"{row['octaves']:.1f}")
        table.add_row(row["optimizer"], row["rule"], str(row["batch"]), str(row["seeds"]), *cells)
    console.print(table)
    for found in result["verdicts"]:
        said = {True: "holds", False: "FAILS", None: "open"}[found["holds"]]
        low, high = found["interval"]
        seen = "not trained" if low is None else f"{found['figure']:.3f} ({low:.3f} to {high:.3f})"
        figure = f"{seen}, {found['seeds']} seeds, at most {found['at_most']:g}"
        console.print(f"{said}: {found['statement']}: {figure}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss over the learning rate, a line for each batch, a panel for each optimizer and rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys((cell["optimizer"], cell["rule"]) for cell in result["cells"]))
    figure, panels = pyplot.subplots(1, len(arms), figsize=(3.6 * len(arms), 3.4), sharey=True, squeeze=False)
    for panel, (optimizer, rule) in zip(panels[0], arms, strict=True):
        for batch in sorted({cell["batch"] for cell in result["cells"]}):
            losses: dict[float, list[float]] = {}
            for cell in result["cells"]:
                if (cell["optimizer"], cell["rule"], cell["batch"]) == (optimizer, rule, batch) and cell["loss"]:
                    losses.setdefault(cell["lr"], []).append(cell["loss"])
            rates = sorted(losses)
            panel.plot(rates, [np.mean(losses[lr]) for lr in rates], marker="o", label=f"batch {batch}")
        panel.set(xscale="log", xlabel="peak learning rate", title=f"{optimizer}, β2 {rule}")
    best = min(cell["loss"] for cell in result["cells"] if cell["loss"])
    panels[0][0].set(ylabel="held-out loss, nats per token", ylim=(best - 0.1, best + 1.5))
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, bbox_inches="tight")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("small_batch", __doc__)
    parser.add_argument("--batches", default=BATCHES, help="sequences, separated by commas, up to 256")
    parser.add_argument("--seeds", type=int, default=3, help="of what the verdicts compare")
    parser.add_argument("--other-seeds", type=int, help="of the rest; as many, unless given")
    parser.add_argument("--tokens", type=int, help="length of every run")
    parser.add_argument("--job", type=Path, default=JOB, help="what to train; every job needs an --out of its own")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of finished cells")
    parser.add_argument("--judge", action="store_true", help="train nothing: judge what --out has")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--quick", action="store_true", help="batches 4 and 16, one seed, an eighth of the tokens")
    options: argparse.Namespace = parser.parse_args(arguments)
    console = console_of(options)
    batches = [4, 16] if options.quick else sorted({int(batch) for batch in options.batches.split(",")})
    tokens = options.tokens or load_job(options.job).training.tokens // (8 if options.quick else 1)
    job = load_job(options.job, [f"training.tokens={tokens}", f"training.warmup_tokens={tokens // 20}"])
    grid, seeds = Grid(job, options.out), 1 if options.quick else options.seeds
    if not options.judge:
        other_seeds = seeds if options.other_seeds is None else min(seeds, options.other_seeds)
        fill_all(grid, options.job, batches, seeds, other_seeds, console)
    result = result_of(grid, batches, range(seeds))
    if options.plot:
        plot(result, options.plot)
    tell(result, show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
