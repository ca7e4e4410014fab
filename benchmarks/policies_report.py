"""What benchmarks.policies says about its cells."""

from collections.abc import Iterable
from typing import Any

import numpy as np

Cells = list[dict[str, Any]]
BEYOND = ("calibration_learned", "blind", "drifting")
"""Groups of cells beyond a still world with a c that is taken for exact."""
FULL_BATCHES = 7
"""Tables with fewer global batches cannot follow φ far: figures are given for those with so many, and for all."""


def _where(cells: Iterable[dict[str, Any]], **wanted: Any) -> Cells:
    return [cell for cell in cells if all(cell[name] == value for name, value in wanted.items())]


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[k] for k in ("table", "noise_from", "move_cost_steps", "calibration"))


def summary(cells: Cells) -> dict[str, Any]:
    """The figures that the targets are about, for all tables and for those with 7 global batches."""
    still = _where(cells, world="still", calibration_learned=False)
    full = [cell for cell in still if cell["batches"] >= FULL_BATCHES]
    beyond = {
        "calibration_learned": _means(_where(cells, calibration_learned=True, world="still")),
        "blind": _means(_where(cells, world="blind")),
        "drifting": _means(_where(cells, world="drifting")),
    }
    return beyond | {"all_tables": _figures(still)} | ({"seven_batches": _figures(full)} if full else {})


def _means(cells: Cells) -> dict[str, dict[str, float]]:
    """Mean gain over the best fixed configuration by policy, cost of moves and error of c, in percent."""
    return {
        name: {
            f"cost {steps}, c ×{c:g}": float(np.mean([cell["gain_over_best_fixed_pct"] for cell in chosen]))
            for steps in (0, 30, 300)
            for c in (1.0, 0.5, 2.0)
            if (chosen := _where(cells, policy=name, move_cost_steps=steps, calibration=c))
        }
        for name in dict.fromkeys(cell["policy"] for cell in cells)
    }


def _figures(cells: Cells) -> dict[str, Any]:
    ours = _where(cells, policy="goodput")
    report: dict[str, Any] = {"tables": len({cell["table"] for cell in cells}), "policies": _means(cells)}
    if not ours:
        return report
    right = _where(ours, calibration=1.0)
    ratios = np.array([cell["ratio_to_oracle"] for cell in right])
    worst = min(ours, key=lambda cell: cell["gain_over_best_fixed_pct"])
    free = _where(ours, move_cost_steps=0)
    off = [cell["gain_over_best_fixed_pct"] for cell in free if cell["calibration"] != 1.0]
    report["goodput"] = {
        "to_oracle_median_pct": 100 * float(np.median(ratios) - 1),
        "to_oracle_worst_pct": 100 * float(ratios.max() - 1),
        "worst_gain_over_best_fixed_pct": worst["gain_over_best_fixed_pct"],
        "worst_cell": _place(worst),
        "worst_gain_c_right_pct": min(cell["gain_over_best_fixed_pct"] for cell in right),
        "cells_slower_than_fixed_by_half_pct": sum(cell["gain_over_best_fixed_pct"] < -0.5 for cell in ours),
        "mean_gain_free_c_right_pct": float(
            np.mean([cell["gain_over_best_fixed_pct"] for cell in _where(free, calibration=1.0)])
        ),
        "mean_gain_free_c_off_pct": float(np.mean(off)),
        "cells": len(ours),
    }
    copus = {_place(cell): cell for cell in _where(cells, policy="copus")}
    if copus:
        ahead = [c["gain_over_best_fixed_pct"] - copus[_place(c)]["gain_over_best_fixed_pct"] for c in ours]
        lost = [
            c
            for c in ours
            if c["gain_over_best_fixed_pct"] < copus[_place(c)]["gain_over_best_fixed_pct"]
            and c["high"] < copus[_place(c)]["low"]
        ]
        report["goodput"] |= {
            "mean_ahead_of_copus_pct": float(np.mean(ahead)),
            "least_ahead_of_copus_pct": float(np.min(ahead)),
            "cells_behind_copus": int((np.array(ahead) < -1e-9).sum()),
            "cells_behind_copus_beyond_intervals": len(lost),
            "least_ahead_c_right_pct": float(
                np.min([a for a, c in zip(ahead, ours, strict=True) if c["calibration"] == 1])
            ),
        }
    return report


def print_cells(cells: Cells) -> None:
    """Every cell, a line each: gain over the best fixed configuration in %, with the 90 % interval over seeds."""
    names = list(dict.fromkeys(cell["policy"] for cell in cells))
    print(
        "gain over the best fixed configuration with hindsight, % (± half of the 90 % interval of the mean over seeds)"
    )
    print(f"{'table':28} {'φ':>9} {'cost':>4} {'c':>4}  " + "  ".join(f"{name[:14]:>14}" for name in names))
    for place in dict.fromkeys(map(_place, cells)):
        row = {cell["policy"]: cell for cell in cells if _place(cell) == place}
        first = next(iter(row.values()))
        values = "  ".join(
            f"{row[name]['gain_over_best_fixed_pct']:8.2f} ±{(row[name]['high'] - row[name]['low']) / 2:4.2f}"
            for name in names
        )
        spread = f"{first['noise_from']}→{first['noise_to']}"
        print(f"{place[0].removeprefix('vtrain-single-'):28} {spread:>9} {place[2]:4} ×{place[3]:<3g}  {values}")


def print_summary(result: dict[str, Any]) -> None:
    """Means over the tables, and what the targets are about."""
    for group in BEYOND:
        for name, row in result["summary"][group].items():
            print(f"{group:20} {name:20} " + ", ".join(f"{place}: {gain:.2f}" for place, gain in row.items()))
    for group, figures in result["summary"].items():
        if group in BEYOND:
            continue
        print(f"\n{group}: {figures['tables']} tables; mean gain over the best fixed configuration, %")
        columns = list(next(iter(figures["policies"].values())))
        print(f"{'policy':20}" + "".join(f"{column:>16}" for column in columns))
        for name, row in figures["policies"].items():
            print(f"{name:20}" + "".join(f"{row[column]:16.2f}" for column in columns))
        for name, value in figures.get("goodput", {}).items():
            print(f"  {name:44} {value if not isinstance(value, float) else round(value, 3)}")
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    print(f"\n{settings}; {result['simulated_runs']} runs, {result['runs_per_minute']:.0f} a minute of one core")
