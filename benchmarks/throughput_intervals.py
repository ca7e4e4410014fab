"""How wide are intervals before any row? Where the fields `blind_spread…` of `Smoothness` come from.

    python -m benchmarks.throughput_intervals --data DIR [--json]

What priors and misses add up to is scaled so that the reliable rows of the published sweeps lie inside as often as they
should, in the mean over sources: once for dense models on one node, once for those on several, and once for mixtures of
experts. Each source is predicted from what all others say of the constants (`benchmarks.throughput_priors`), and then
judged by the scale that the others ask for; rows are counted, too, by how much of their step the host's launches take.
A source's rows err alike, so that intervals hold nearly all rows of one source and few of another: `expected` is where
a source's share would lie, in 80 % of cases, if all beliefs were right. What can be held to 80 % is the mean over
sources, which are the population that a user's cluster comes from: `pooled`, with a 90 % interval.
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
from scipy.special import stdtrit

from benchmarks.command import console_of, parser_of, tell
from benchmarks.published import Sweep, read_all
from benchmarks.published_sources import family_of
from benchmarks.throughput import COVERAGE, without_each_family
from profiles.cost.effects import Effects
from profiles.cost.errors import Errors
from profiles.cost.residual import Smoothness, covariance

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


DRAWS = 400
"""Of what a source's rows could have been, for the coverage that is to be expected of it."""
AROUND = 0.05
"""Around `COVERAGE`: what a source with many independent rows would lie in."""
RESAMPLED = 10_000
"""Populations that are drawn for the interval of a mean over sources."""
CONFIDENCE = 0.9
"""Of that interval."""


class Rows(NamedTuple):
    """Of one source, and of one of `GROUPS`."""

    misses: Floats
    """|logarithm of measured ÷ predicted|, over half of the interval that nothing scales."""
    launches: Floats
    """Share of the step that the host's launches take, as predicted."""
    expected: Floats = np.zeros(0)
    """Sorted shares of these rows that the intervals could hold if beliefs were right: `DRAWS` of them."""


def group_of(sweep: Sweep) -> str:
    """The field of `Smoothness` that is about it."""
    if sweep.timings.model.experts:
        return GROUPS["experts"]
    return GROUPS["one node" if sweep.timings.cluster.nodes == 1 else "several nodes"]


def rows_of(sweeps: Sequence[Sweep], how: Smoothness, group: str, others: Mapping[str, Effects]) -> dict[str, Rows]:
    """The reliable rows by source; `others` is what all but each family of sources say of the constants."""
    how = how._replace(**dict.fromkeys(GROUPS.values(), 1.0))
    by_source: defaultdict[str, list[tuple[Floats, Floats, Errors]]] = defaultdict(list)
    for sweep in sweeps:
        t = sweep.timings.take(sweep.scored)
        if group_of(sweep) != group or not len(t.step_seconds):
            continue
        cost = sweep.cost_model(others.get(family_of(sweep.source_id)), how)
        predicted = cost.predict(t.model, t.cluster, t.configurations, t.precision, coverage=COVERAGE)
        misses = np.abs(np.log(t.step_seconds / predicted.seconds)) / np.log(predicted.high / predicted.seconds)
        errors = cost.errors(t.model, t.cluster, t.configurations, t.precision)
        by_source[sweep.source_id].append((misses, predicted.breakdown["launch"] / predicted.seconds, errors))
    found = {}
    for source, parts in by_source.items():
        misses, launches = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        found[source] = Rows(misses, launches, expected_coverages([errors for _, _, errors in parts]))
    return found


def expected_coverages(sweeps: Sequence[Errors], draws: int = DRAWS) -> Floats:
    """What share of one source's rows 80 % intervals hold if its errors are as believed: sorted draws. Constants are
    the source's own, and so alike in all of its rows, and the misses of neighbours are alike; it has one Student
    scale."""
    how, freedom = sweeps[0].how, sweeps[0].freedom
    moves, places = (np.concatenate([getattr(each, name) for each in sweeps]) for name in ("jacobian", "places"))
    rng = np.random.default_rng(0)
    whole = moves @ moves.T + covariance(places, places, how) + how.noise_sd**2 * np.eye(len(places))
    lower = np.linalg.cholesky(whole)
    normal = np.abs(lower @ rng.standard_normal((len(places), draws))) / np.sqrt(np.diag(whole))[:, None]
    student = normal * np.sqrt(freedom / rng.chisquare(freedom, draws))
    return np.sort((student <= stdtrit(freedom, 0.5 + COVERAGE / 2)).mean(axis=0))


def pooled(shares: Sequence[float], families: Sequence[str]) -> dict[str, float]:
    """The mean of the sources' shares, and its interval by a cluster bootstrap: families of sources, which are of one
    team or repeat each other's runs, are drawn with replacement, each with all of its sources."""
    _, cluster = np.unique(families, return_inverse=True)
    sums, counts = np.bincount(cluster, np.asarray(shares)), np.bincount(cluster)
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLED, len(counts)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return {"mean": float(np.mean(shares)), "low": float(low), "high": float(high)}


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
                    "expected_pct": (100 * np.quantile(rows.expected, (0.1, 0.9))).tolist(),
                    "expected_near_nominal_pct": 100 * float((np.abs(rows.expected - COVERAGE) <= AROUND).mean()),
                }
            )
        few = everything.launches < LAUNCHES
        within = [low <= line["coverage_pct"] <= high for line in lines for low, high in [line["expected_pct"]]]
        result[name] = {
            "scale": scale_of(list(sources.values())),
            "scale_in_use": in_use,
            "sources": lines,
            "as_expected": sum(within),
            "near_nominal": sum(abs(line["coverage_pct"] - 100 * COVERAGE) <= 100 * AROUND for line in lines),
            "near_nominal_expected": sum(line["expected_near_nominal_pct"] for line in lines) / 100,
            "pooled": _pooled(lines),
            "rows": [
                {
                    "launches": words,
                    "rows": int(some.sum()),
                    "coverage_pct": float(100 * (everything.misses[some] <= in_use).mean()) if some.any() else None,
                }
                for words, some in ((f"below {LAUNCHES:.0%} of the step", few), (f"{LAUNCHES:.0%} and more", ~few))
            ],
        }
    everywhere = [line for name in GROUPS if name in result for line in result[name]["sources"]]
    result["pooled"] = {"sources": len(everywhere), **_pooled(everywhere)}
    return result


def _pooled(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    families = [family_of(line["source_id"]) for line in lines]
    keys = ("coverage_pct", "left_out_coverage_pct")
    return {"families": len(set(families))} | {key: pooled([line[key] for line in lines], families) for key in keys}


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    for name in GROUPS:
        entry = result.get(name)
        if entry is None:
            continue
        table = Table("source", "rows", "inside %", "expected", "scale of the others", "inside % with that", title=name)
        for line in entry["sources"]:
            table.add_row(
                line["source_id"],
                str(line["rows"]),
                f"{line['coverage_pct']:.0f}",
                "{:.0f} to {:.0f}".format(*line["expected_pct"]),
                f"{line['scale_of_the_others']:.2f}",
                f"{line['left_out_coverage_pct']:.0f}",
            )
        console.print(table)
        console.print(
            f"{name}: scale {entry['scale']:.2f} (in use {entry['scale_in_use']:.2f}); {_in_words(entry['pooled'])}; "
            f"{entry['as_expected']} of {len(entry['sources'])} sources within their expected 80 %, "
            f"{entry['near_nominal']} within {100 * (COVERAGE - AROUND):.0f} to {100 * (COVERAGE + AROUND):.0f} % "
            f"(expected {entry['near_nominal_expected']:.1f}); "
            + "; ".join(
                f"{row['rows']} rows with launches {row['launches']}: {row['coverage_pct']:.0f} %"
                for row in entry["rows"]
                if row["rows"]
            )
        )

    console.print(f"all {result['pooled']['sources']} sources: {_in_words(result['pooled'])}")


def _in_words(entry: dict[str, Any]) -> str:
    in_use, others = (
        f"{entry[key]['mean']:.1f} % ({entry[key]['low']:.0f} to {entry[key]['high']:.0f})"
        for key in ("coverage_pct", "left_out_coverage_pct")
    )
    return (
        f"inside, every source alike, with the {CONFIDENCE:.0%} interval of that over {entry['families']} families, "
        f"{in_use}, with the scale of the others {others}"
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
