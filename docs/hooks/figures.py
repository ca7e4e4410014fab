"""The figures that these pages and README quote from kept results: `make figures` writes them from the newest ones.

A claim is a sentence with figures in braces. Its pages say it with the figures of the newest result of its benchmark in
benchmarks/results/, and a test fails while they do not.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = r"[−-]?[\d.,]+(?:e-?\d+)?"


@dataclass(frozen=True)
class Claim:
    """What pages say of a result."""

    benchmark: str
    """`python -m benchmarks.NAME`; its results are DATE-DEVICE-NAME.json, with hyphens."""
    sentence: str
    """As it stands in the pages, with {name} for a figure."""
    pages: tuple[str, ...]
    figures: Callable[[dict[str, Any]], dict[str, str]]
    """Result → the figures by their names."""

    def said(self) -> str:
        """The sentence with the figures of the newest result."""
        return self.sentence.format(**self.figures(newest(self.benchmark)))

    def pattern(self) -> re.Pattern[str]:
        """The sentence with any figures, broken into lines anywhere."""
        parts = re.split(r"\{\w+\}", self.sentence)
        return re.compile(FIGURE.join(r"\s+".join(map(re.escape, part.split(" "))) for part in parts))


def newest_path(benchmark: str) -> Path:
    """The result of the latest date; of one day the one with the highest number (NAME.json, NAME-2.json, …)."""
    pattern = re.compile(rf"(\d{{4}}-\d\d-\d\d)-cpu-{benchmark.replace('_', '-')}(?:-(\d+))?\.json")
    kept = [(found, path) for path in RESULTS.glob("*.json") if (found := pattern.fullmatch(path.name))]
    return max(kept, key=lambda result: (result[0][1], int(result[0][2] or 1)))[1]


def newest(benchmark: str) -> dict[str, Any]:
    """The result of the latest date."""
    result: dict[str, Any] = json.loads(newest_path(benchmark).read_text(encoding="utf-8"))
    return result


def write() -> None:
    """Write the figures of all claims into their pages."""
    for claim in CLAIMS:
        for page in claim.pages:
            text = (ROOT / page).read_text(encoding="utf-8")
            old = claim.pattern().findall(text)
            if len(old) != 1:
                raise SystemExit(f"{page} has {claim.sentence!r} {len(old)} times")
            if " ".join(old[0].split()) != claim.said():
                (ROOT / page).write_text(text.replace(old[0], claim.said()), encoding="utf-8")


def measure(benchmark: str, data: str | None) -> None:
    """Run a benchmark, keep its result in the place of the newest one, and name it in docs/benchmarks.md."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--json", *ARGUMENTS.get(benchmark, [])]
    if benchmark in WITH_DATA:
        if data is None:
            raise SystemExit(f"benchmarks.{benchmark} needs tables of published measurements: DATA=DIR")
        command += ["--data", data]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    former = newest_path(benchmark)
    new = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-cpu-{benchmark.replace('_', '-')}.json"
    former.unlink()
    new.write_text(done.stdout, encoding="utf-8")
    page = ROOT / "docs" / "benchmarks.md"
    rows = page.read_text(encoding="utf-8").splitlines(keepends=True)
    renamed = [
        row.replace(former.name, new.name).replace(former.name[:10], new.name[:10])
        if f"`{former.name}`" in row
        else row
        for row in rows
    ]
    page.write_text("".join(renamed), encoding="utf-8")


def _one(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _power(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _reshard(result: dict[str, Any]) -> dict[str, str]:
    return {
        "bytes": f"{result['max_moved_over_floor']:.3f}",
        "median": _one(result["speedup_median"]),
        "least": _one(result["speedup_min"]),
    }


def _noise_known(result: dict[str, Any]) -> dict[str, str]:
    return {
        "steps": f"{result['steps_until_known_max']:.0f}",
        "held": _one(result["coverage_pct"]),
        "later": _one(result["coverage_later_pct"]),
    }


def _frameworks(result: dict[str, Any]) -> dict[str, str]:
    cells = result["cells"]
    assert all(cell["bit_equal"] for cell in cells), "the pages say that checkpoints are equal to the bit"
    return {
        "layouts": str(len(cells)),
        "loss": _power(max(cell["max_loss_diff"] for cell in cells)),
        "norm": _power(max(cell["grad_sq_diff"] for cell in cells)),
        "part": _power(max(cell["part_norm_diff"] for cell in cells)),
    }


def _faults(result: dict[str, Any]) -> dict[str, str]:
    assert all(fault["ok"] for fault in result["faults"]), "the pages say that all were survived"
    assert result["samples_lost"] == result["samples_repeated"] == 0, "the pages say that no sample was"
    return {"faults": str(len(result["faults"]))}


def _policies(result: dict[str, Any]) -> dict[str, str]:
    policies = result["summary"]["all_tables"]["policies"]
    case = "cost 0, c ×1"
    return {
        "tables": str(result["summary"]["all_tables"]["tables"]),
        "ours": _one(policies["goodput"][case]),
        "copus": _one(policies["copus"][case]),
        "oracle": _one(policies["oracle"][case]),
    }


def _calibrate(result: dict[str, Any]) -> dict[str, str]:
    return {
        "c": _one(result["critical_batch_factor"]),
        "low": _one(result["factor_low"]),
        "high": _one(result["factor_high"]),
        "phi": f"{result['critical_batch']:.0f}",
    }


def _demos(result: dict[str, Any]) -> dict[str, str]:
    audits = [run["audit"] for run in result["runs"]]
    first = [audit["gain_over_first_pct"]["value"] for audit in audits]
    best = [-audit["gain_over_best_fixed_pct"]["value"] for audit in audits]
    return {
        "least": _one(1 + min(first) / 100),
        "most": _one(1 + max(first) / 100),
        "better": f"{max(min(best), 0):.0f}",
        "worse": f"{max(best):.0f}",
    }


def _single_profiler(result: dict[str, Any]) -> dict[str, str]:
    ways = result["ways"]
    return {"configurations": str(result["configurations"]), "nothing": f"{ways['nothing']['mape_pct']:.0f}"} | {
        f"{name}_{figure}": form(ways[way][f"{figure}_pct"])
        for name, way in (("shards", "shards"), ("both", "shards and 4 steps"), ("steps", "4 steps"))
        for figure, form in (("mape", _one), ("coverage", lambda value: f"{value:.0f}"))
    }


def _checkpoint(result: dict[str, Any]) -> dict[str, str]:
    plain, distributed = result["cells"]
    megabytes = {
        f"{which}_{name}": f"{cell[f'{name}_extra_bytes'] / 1e6:.0f}"
        for which, cell in (("plain", plain), ("distributed", distributed))
        for name in ("save", "load")
    }
    seconds = {
        f"{which}_{name}_seconds": _one(cell[f"{name}_seconds"])
        for which, cell in (("plain", plain), ("distributed", distributed))
        for name in ("save", "load")
    }
    return megabytes | seconds


def _live_profiler(result: dict[str, Any]) -> dict[str, str]:
    assert result["same_ranking"], "the page says that the ranking is the same"
    return {"speedup": _one(result["speedup"])}


def _noise(result: dict[str, Any]) -> dict[str, str]:
    return {"spread": f"{result['layouts']['max_relative_spread']:.0e}".replace("e-0", "e-")}


ARGUMENTS = {"policies": ["--quick"]}
WITH_DATA = ("policies", "memory", "throughput")
"""Those that compare with published measurements."""
BY_HAND = ("calibrate",)
"""A command for a run, and no benchmark."""
BENCHMARKS = "docs/benchmarks.md"
CLAIMS = (
    Claim(
        "demos",
        "made {least} to {most} times the progress of the configuration in the job file, and {better} to {worse} % "
        "less than the best fixed configuration",
        ("README.md",),
        _demos,
    ),
    Claim(
        "reshard",
        "{median} times as fast as checkpoint and restart (median of 60; at least {least})",
        ("README.md",),
        _reshard,
    ),
    Claim(
        "reshard",
        "bytes ÷ least possible {bytes}; restart ÷ move {median} in the median, {least} at least | as above",
        (BENCHMARKS,),
        _reshard,
    ),
    Claim(
        "noise_known",
        "known after {steps} measured steps in 99 % of runs; 90 % intervals hold the truth in {held} %",
        ("README.md",),
        _noise_known,
    ),
    Claim(
        "frameworks",
        "{layouts} layouts from one checkpoint, 20 steps: losses within {loss}, checkpoints equal to the bit",
        ("README.md",),
        _frameworks,
    ),
    Claim(
        "frameworks",
        "losses within {loss} of one rank, \\|g\\|² within {norm}, norms of the parts within {part}, checkpoints equal",
        (BENCHMARKS,),
        _frameworks,
    ),
    Claim("faults", "{faults} at random moments: none lost or repeated a sample", ("README.md",), _faults),
    Claim("faults", "all {faults} survived, none lost or repeated a sample", (BENCHMARKS,), _faults),
    Claim(
        "policies",
        "simulated on {tables} measured tables: {ours} % over the best fixed configuration, if c is right "
        "(optimum {oracle} %)",
        ("README.md",),
        _policies,
    ),
    Claim("policies", "| {ours} % (COPUS's rule {copus} %, the optimum {oracle} %)", (BENCHMARKS,), _policies),
    Claim(
        "single_profiler",
        "| {shards_mape} % mean error (",
        (BENCHMARKS,),
        _single_profiler,
    ),
    Claim(
        "single_profiler",
        "{shards_coverage} % in their 80 % intervals; with 4 steps known too {both_mape} % and {both_coverage} %, "
        "with these alone {steps_mape} % and {steps_coverage} %, with nothing {nothing} %",
        (BENCHMARKS,),
        _single_profiler,
    ),
    Claim(
        "checkpoint",
        "{plain_save} and {plain_load} MB; with the distributed optimizer {distributed_save} and {distributed_load} MB",
        (BENCHMARKS,),
        _checkpoint,
    ),
    Claim(
        "checkpoint",
        "{plain_save_seconds} and {plain_load_seconds} s; with the distributed optimizer {distributed_save_seconds} "
        "and {distributed_load_seconds} s",
        (BENCHMARKS,),
        _checkpoint,
    ),
    Claim("live_profiler", "{speedup} times less wall time (", (BENCHMARKS,), _live_profiler),
    Claim("noise", "largest relative spread of a squared norm {spread} |", (BENCHMARKS,), _noise),
    Claim("calibrate", "{c} ({low} to {high}): critical batch {phi}", (BENCHMARKS,), _calibrate),
)


if __name__ == "__main__":
    names, data = sys.argv[1:], None
    if "--data" in names:
        data = names.pop(names.index("--data") + 1)
        names.remove("--data")
    for name in sorted({claim.benchmark for claim in CLAIMS} - set(BY_HAND)) if names == ["all"] else names:
        measure(name, data)
    write()
