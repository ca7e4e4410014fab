"""The picture of `copus simulate`: what each policy runs, and how long it takes."""

from pathlib import Path

import numpy as np

from launch.palette import LAYOUTS
from launch.plot import GRID, INK, MUTED, save
from planner.plan import Plan
from planner.simulator.compare import Row, Setting
from planner.simulator.trajectory import grid


def draw(output: Path, setting: Setting, plan: Plan, rows: list[Row]) -> None:
    """Batches over progress above, times to target below. Raises JobError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    batch = setting.menu.global_batch
    above.plot(grid(), setting.critical_batch, color=MUTED, linestyle=":", label="φ, the critical batch")
    steps = [(s.first, s.index) for s in plan.schedule]
    for place, (name, path) in enumerate([("oracle", steps), *((row.policy, list(row.path)) for row in rows)]):
        ends = [first for first, _ in path[1:]] + [1.0]
        x = np.array([edge for (first, _), end in zip(path, ends, strict=True) for edge in (first, end)])
        y = np.array([size for _, index in path for size in (batch[index],) * 2])
        colour = INK if name == "oracle" else LAYOUTS[(place - 1) % len(LAYOUTS)]
        above.plot(x, y * 1.02**place, color=colour, linewidth=1.6, label=name)  # side by side where they are equal
    above.set_yscale("log", base=2)
    above.set_xlabel("progress")
    above.set_ylabel("global batch, sequences (first seed)")
    above.legend(fontsize=8, ncols=2)
    above.grid(color=GRID)
    names = ["best fixed", "oracle", *(row.policy for row in rows)]
    seconds = np.array([plan.fixed_seconds, plan.seconds, *(row.seconds for row in rows)])
    errors = np.array([0.0, 0.0, *((row.high - row.low) / 2 for row in rows)])
    colours = [MUTED, INK, *(LAYOUTS[i % len(LAYOUTS)] for i in range(len(rows)))]
    below.barh(names, seconds / plan.fixed_seconds, xerr=errors / plan.fixed_seconds, color=colours)
    below.axvline(1.0, color=MUTED, linestyle=":")
    below.invert_yaxis()
    below.set_xlabel("time to target ÷ that of the best fixed configuration")
    save(figure, output, "--plot")
