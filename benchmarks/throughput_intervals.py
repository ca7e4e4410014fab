"""How wide are intervals before any row? Where the fields `blind_spread…` of `Smoothness` come from.

    python -m benchmarks.throughput_intervals --data DIR [--json]

What priors and misses add up to is scaled so that the reliable rows of the published sweeps lie inside as often as they
should, in the mean over sources: once for dense models on one node, once for those on several, and once for mixtures of
experts. Each source is predicted from what all others say of the constants (`benchmarks.throughput_priors`), and then
judged by the scale that the others ask for; rows are counted, too, by how much of their step the host's launches take.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Sweep, read_all
from benchmarks.published_sources import family_of
from benchmarks.throughput import COVERAGE, without_each_family
from profiles.cost import CostModel
from profiles.cost.effects import Effects
from profiles.cost.residual import Smoothness

SCALES = np.arange(0.2, 3.0, 0.01)
"""What is tried."""
LAUNCHES = 0.2
"""Share of a step from which on the host's launches are much of it."""
GROUPS = {
    "one node": "blind_spread",
    "several nodes": "blind_spread_of_nodes",
    "experts": "blind_spread_of_experts",
}
"""Dense models on one node and on several, and mixtures of experts: fields of `Smoothness`."""
NO_EFFECTS: Mapping[str, Effects] = MappingProxyType({})

Floats = NDArray[np.float64]


class Rows(NamedTuple):
    """Of one source, and of one of `GROUPS`."""

    misses: Floats
    """|logarithm of measured ÷ predicted|, over half of the interval that nothing scales."""
    launches: Floats
    """Share of the step that the host's launches take, as predicted."""


def group_of(sweep: Sweep) -> str:
    """The field of `Smoothness` that is about it."""
    if sweep.timings.model.experts:
        return GROUPS["experts"]
    return GROUPS["one node" if sweep.timings.cluster.nodes == 1 else "several nodes"]


def rows_of(sweeps: Sequence[Sweep], how: Smoothness, group: str, others: Mapping[str, Effects]) -> dict[str, Rows]:
    """The reliable rows by source; `others` is what all but each family of sources say of the constants."""
    how = how._replace(**dict.fromkeys(GROUPS.values(), 1.0))
    by_source: defaultdict[str, list[Rows]] = defaultdict(list)
    for sweep in sweeps:
        t = sweep.timings.take(sweep.scored)
        if group_of(sweep) != group or not len(t.step_seconds):
            continue
        cost = CostModel(how, stack=sweep.stack, effects=others.get(family_of(sweep.source_id)))
        predicted = cost.predict(t.model, t.cluster, t.configurations, t.precision, coverage=COVERAGE)
        misses = np.abs(np.log(t.step_seconds / predicted.seconds)) / np.log(predicted.high / predicted.seconds)
        by_source[sweep.source_id].append(Rows(misses, predicted.breakdown["launch"] / predicted.seconds))
    return {source: Rows(*map(np.concatenate, zip(*rows, strict=True))) for source, rows in by_source.items()}


def covered(rows: Rows, scale: float) -> float:
    """Share of them that lies inside."""
    return float((rows.misses <= scale).mean())


def scale_of(sources: Sequence[Rows]) -> float:
    """With which so much of them lies inside as should, every source counting the same."""
    share = [np.mean([covered(rows, scale) for rows in sources]) for scale in SCALES]
    return float(SCALES[np.argmin(np.abs(np.array(share) - COVERAGE))])


def blind_spreads(
    sweeps: Sequence[Sweep], how: Smoothness, others: Mapping[str, Effects] = NO_EFFECTS
) -> dict[str, float]:
    """The fields of `Smoothness`, for these sweeps; one that they say nothing of stays."""
    rows_of_field = {field: list(rows_of(sweeps, how, field, others).values()) for field in GROUPS.values()}
    return {name: scale_of(rows) for name, rows in rows_of_field.items() if rows}


def run(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """For each of `GROUPS`."""
    how, others = Smoothness(), without_each_family(list(sweeps))
    result: dict[str, Any] = {"benchmark": "throughput_intervals", "nominal_coverage_pct": 100 * COVERAGE}
    for name, field in GROUPS.items():
        in_use, sources = float(getattr(how, field)), rows_of(sweeps, how, field, others)
        if not sources:
            continue
        everything = Rows(*map(np.concatenate, zip(*sources.values(), strict=True)))
        lines = []
        for source, rows in sources.items():
            rest = [other_rows for other, other_rows in sources.items() if family_of(other) != family_of(source)]
            scale = scale_of(rest) if rest else in_use
            lines.append(
                {
                    "source_id": source,
                    "rows": len(rows.misses),
                    "coverage_pct": 100 * covered(rows, in_use),
                    "scale_of_the_others": scale,
                    "left_out_coverage_pct": 100 * covered(rows, scale),
                }
            )
        few = everything.launches < LAUNCHES
        result[name] = {
            "scale": scale_of(list(sources.values())),
            "scale_in_use": in_use,
            "sources": lines,
            "coverage_pct": float(np.mean([line["coverage_pct"] for line in lines])),
            "left_out_coverage_pct": float(np.mean([line["left_out_coverage_pct"] for line in lines])),
            "rows": [
                {
                    "launches": words,
                    "rows": int(some.sum()),
                    "coverage_pct": float(100 * (everything.misses[some] <= in_use).mean()) if some.any() else None,
                }
                for words, some in ((f"below {LAUNCHES:.0%} of the step", few), (f"{LAUNCHES:.0%} and more", ~few))
            ],
        }
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    for name in GROUPS:
        entry = result.get(name)
        if entry is None:
            continue
        table = Table("source", "rows", "inside %", "scale of the others", "inside % with that", title=name)
        for line in entry["sources"]:
            table.add_row(
                line["source_id"],
                str(line["rows"]),
                f"{line['coverage_pct']:.0f}",
                f"{line['scale_of_the_others']:.2f}",
                f"{line['left_out_coverage_pct']:.0f}",
            )
        console.print(table)
        console.print(
            f"{name}: scale {entry['scale']:.2f} (in use {entry['scale_in_use']:.2f}); inside, every source alike, "
            f"{entry['coverage_pct']:.1f} %, with the scale of the others {entry['left_out_coverage_pct']:.1f} %; "
            + "; ".join(
                f"{row['rows']} rows with launches {row['launches']}: {row['coverage_pct']:.0f} %"
                for row in entry["rows"]
                if row["rows"]
            )
        )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("throughput_intervals", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with throughput.csv")
    options = parser.parse_args(arguments)
    tell(run(read_all(options.data).sweeps), show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
