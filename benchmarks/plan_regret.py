"""What is lost by running the layout that the models choose, where others published the fastest one that they found?

    python -m benchmarks.plan_regret --data DIR [--json]

For mixtures of experts that everybody trains, on each accelerator, number of them and precision that rows of DIR are
from: the published layout with the most tokens a second, and the one that the cost model expects to be the fastest
among the published ones; the regret is what the second takes longer, as measured. Then the fastest of all layouts that
the planner may choose and that fit by the memory model, whose time nobody measured: how many of them the model
believes to be faster than the published fastest, and how much the best of them gains by its own word. No constant has
seen the row's source or those that repeat its runs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Sweep, read_all
from benchmarks.published_sources import family_of
from benchmarks.throughput import same, without_each_family
from planner.memory_check import LIKELY
from profiles.accelerator import memory_bytes
from profiles.configurations import Configurations
from profiles.cost.effects import Effects
from profiles.enumerate import enumerate_configurations
from profiles.memory import MEGATRON, Implementation, MemoryModel
from profiles.model_shape import ModelShape

MODELS = {"deepseek-v3": (7168, 256), "qwen3-30b-a3b": (2048, 128)}
"""Presets, and the width and the number of experts by which their rows are known."""


def is_model(model: ModelShape, name: str) -> bool:
    """Whether rows are of that preset; a module that predicts a second token counts as a layer of it."""
    return (model.hidden, model.experts) == MODELS[name]


def judged(sweep: Sweep, effects: Effects | None) -> dict[str, Any]:
    """A sweep's fastest layout beside those that the model would choose."""
    t = sweep.timings.take(sweep.scored)
    c, cost = t.configurations, sweep.cost_model(effects)
    rates, which = c.global_batch / t.step_seconds, same(c)
    # Releases differ by up to twice for one configuration: the best of them is what a layout can do.
    rates = np.array([rates[which == one].max() for one in which])
    seconds = cost.predict(t.model, t.cluster, c, t.precision, coverage=None).seconds
    expected = c.global_batch / seconds
    best, chosen = int(np.argmax(rates)), int(np.argmax(expected))
    how = sweep.implementations[int(np.flatnonzero(sweep.scored)[best])]
    space = _space(sweep, int(c.global_batch[best]), how)
    here = c.take(np.array([best]))
    peak, fits = MemoryModel(how).predict(t.model, here, t.precision).peak_bytes[0], _chances(sweep, here, how)[0]
    times = cost.predict(t.model, t.cluster, space, t.precision, coverage=None).seconds
    first = int(np.argmin(times)) if len(space) else -1
    return {
        "source_id": sweep.source_id,
        "accelerator": t.cluster.accelerator,
        "accelerators": t.cluster.accelerators,
        "precision": t.precision,
        "published_configurations": len(np.unique(which)),
        "fastest": c[best].label,
        "fastest_seconds": float(c.global_batch[best] / rates[best]),
        "fastest_predicted_seconds": float(seconds[best]),
        "fastest_chance_to_fit": float(fits),
        "fastest_peak_bytes": float(peak),
        "fastest_chance_without_recipe": float(_chances(sweep, here, MEGATRON)[0]),
        "chosen": c[chosen].label,
        "regret_pct": float(100 * (rates[best] / rates[chosen] - 1)),
        "space": len(space),
        "planned": space[first].label if len(space) else None,
        "planned_seconds": float(times[first]) if len(space) else None,
        "believed_faster": int((times < seconds[best]).sum()),
    }


def _space(sweep: Sweep, global_batch: int, how: Implementation) -> Configurations:
    """All that fit with a recipe, and with the distributed optimizer, as a Megatron job may run."""
    t = sweep.timings
    found = enumerate_configurations(t.model, t.cluster, (global_batch,), max_micro_batch=8, zero=(1,))
    return found.take(_chances(sweep, found, how) >= LIKELY)


def _chances(sweep: Sweep, c: Configurations, how: Implementation) -> NDArray[np.float64]:
    """That each fits."""
    room = memory_bytes(sweep.timings.cluster)
    assert room is not None, "published rows are from accelerators with a data sheet"
    return MemoryModel(how).predict(sweep.timings.model, c, sweep.timings.precision).chance_to_fit(room)


def run(folder: Path) -> dict[str, Any]:
    """Every sweep of each model."""
    sweeps = read_all(folder).sweeps
    others = without_each_family(sweeps)
    lines = {
        name: [
            judged(sweep, others[family_of(sweep.source_id)])
            for sweep in sweeps
            if sweep.kind == "experts" and sweep.scored.any() and is_model(sweep.timings.model, name)
        ]
        for name in MODELS
    }
    choices = {name: [line for line in of if line["published_configurations"] > 1] for name, of in lines.items()}
    means = {name: float(np.mean([line["regret_pct"] for line in of])) for name, of in choices.items() if of}
    return {"benchmark": "plan_regret", "mean_regret_pct": means, "models": lines}


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each model."""
    for name, lines in result["models"].items():
        table = Table(
            *("accelerators", "source", "published", "fastest", "s", "predicted", "fits", "chosen of these", "regret"),
            *("planned", "predicted s", "believed faster"),
            title=name,
        )
        for line in lines:
            table.add_row(
                f"{line['accelerators']} {line['accelerator']} {line['precision']}",
                line["source_id"],
                str(line["published_configurations"]),
                line["fastest"],
                f"{line['fastest_seconds']:.2f}",
                f"{line['fastest_predicted_seconds']:.2f}",
                f"{line['fastest_chance_to_fit']:.0%}",
                line["chosen"],
                f"{line['regret_pct']:.1f} %",
                line["planned"] or "nothing fits",
                "" if line["planned_seconds"] is None else f"{line['planned_seconds']:.2f}",
                f"{line['believed_faster']} of {line['space']}",
            )
        console.print(table)
        if name in result["mean_regret_pct"]:
            console.print(f"{name}: mean regret {result['mean_regret_pct'][name]:.1f} % where there is a choice")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("plan_regret", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv and the like")
    options = parser.parse_args(arguments)
    tell(run(options.data), show, options, console_of(options, width=220))
    return 0


if __name__ == "__main__":
    sys.exit(main())
