"""How large the report of a long run is, how long writing it takes, and how soon a browser shows it.

`python -m benchmarks.report_size [--json] [--steps N,N…]`. The runs are made up: a loss that falls, a noise scale that
grows, 30 moves, a decision for each of 300 intervals. Chromium opens the pages if it is installed.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from benchmarks.command import console_of, parser_of, tell
from copus.event_log import EventLog
from copus.events import DecisionMade, End, Evaluate, Noise, Reconfigure, Start, Step
from launch.report import page
from launch.tables import print_table
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.formatting import duration
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale

STEPS = (1_000, 10_000, 100_000)
MOVES, DECISIONS = 30, 300
SEQ_LEN = 1024
TRIES = 3
"""Times that a page is opened; the median counts."""


def write_long_run(run: Path, steps: int, moves: int = MOVES, decisions: int = DECISIONS) -> Path:
    """A run directory with so many steps, of 0.5 s each, and so many moves and decisions."""
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(f"name: {run.name}\nmodel: {{seq_len: {SEQ_LEN}}}\n")
    space = [
        Configuration(layout=layout, micro_batch=2, global_batch=batch)
        for layout in (Layout(dp=8), Layout(tp=2, dp=4), Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2))
        for batch in (32, 64, 128, 256)
    ]
    every, move_every = max(1, steps // max(decisions, moves)), max(1, steps // (moves + 1))
    log, running = EventLog(run), space[0]
    step = samples = moved = number = 0
    with patch("copus.event_log.clock.time", side_effect=lambda: 1e9 + 0.5 * step):
        log.write(_start(running, total_samples=128 * steps))
        for step in range(1, steps + 1):
            samples += running.global_batch
            here = {"step": step, "samples_consumed": samples}
            trained = _step(here, step / steps, running.global_batch)
            noise = _noise(here, step / steps)
            log.write(trained)
            log.write(noise)
            move = moved < moves and step % move_every == 0
            if step % every == 0 or move:
                chosen = space[(space.index(running) + 5) % len(space)] if move else running
                decision = _decision(number, samples, running, chosen, noise.noise, space)
                log.write(DecisionMade(**here, decision=decision, seconds=0.01))
                if move:
                    log.write(_move(here, running, chosen, number))
                    running, moved = chosen, moved + 1
                number += 1
            if step % max(1, steps // 20) == 0:
                log.write(Evaluate(**here, loss=trained.loss, sequences=64, seconds=1.0))
        log.write(End(**here, reason="finished", seconds=0.5 * steps))
        log.close()
    return run


def _start(configuration: Configuration, total_samples: int) -> Start:
    return Start(
        step=0,
        samples_consumed=0,
        configuration=configuration,
        total_samples=total_samples,
        seq_len=SEQ_LEN,
        peak_samples_per_second=1000.0,
        hardware="made up",
        software="made up",
    )


def _step(here: dict[str, int], share: float, global_batch: int) -> Step:
    """A step after that share of the run: loss, norm and time swing from one to the next."""
    wave = math.sin(here["step"] * 12.9898) * 0.08
    return Step(
        **here,
        loss=3.0 + 6.0 / (1 + share * 20) + wave,
        grad_norm=1 + abs(wave),
        lr=1e-3 * (1 - share),
        beta2=0.95,
        seconds=0.5 * (1 + wave),
        global_batch=global_batch,
    )


def _noise(here: dict[str, int], share: float) -> Noise:
    scale = 30 + 200 * share
    noise = NoiseScale(
        grad_sq=1.0, noise_trace=scale, value=scale, low=scale * 0.8, high=scale * 1.25, samples=here["step"]
    )
    return Noise(**here, value=noise.value, low=noise.low, high=noise.high, noise=noise, parts=4, part_size=2)


def _move(here: dict[str, int], before: Configuration, after: Configuration, decision: int) -> Reconfigure:
    return Reconfigure(
        **here,
        before=before,
        after=after,
        rung="batch" if after.layout == before.layout else "layout",
        seconds=0.8,
        bytes_moved=10**9,
        decision=decision,
        peak_bytes=2**34,
    )


def _decision(
    number: int,
    samples: int,
    current: Configuration,
    chosen: Configuration,
    noise: NoiseScale,
    space: list[Configuration],
) -> Decision:
    """All of the space, with times that follow from the batch."""
    scale = noise.value or 1.0
    scores = []
    for place, configuration in enumerate(space):
        rate = 200.0 + 10 * place
        efficiency = 1 / (1 + configuration.global_batch / (2 * scale))
        verdict = "CHOSEN" if configuration == chosen else "current" if configuration == current else "lower goodput: x"
        scores.append(
            CandidateScore(
                configuration=configuration,
                step_seconds=configuration.global_batch / rate,
                step_seconds_spread=0.1 * configuration.global_batch / rate,
                source="measured",
                samples_per_second=rate,
                efficiency=efficiency,
                goodput=rate * efficiency,
                gain=0.01 * place,
                verdict=verdict,
                peak_bytes=2**33,
                move_seconds=0.8,
            )
        )
    return Decision(
        number=number,
        samples_consumed=samples,
        policy="copus",
        objective="plain",
        noise=noise,
        critical_batch_factor=2.0,
        critical_batch=2 * scale,
        current=current,
        chosen=chosen,
        candidates=scores,
        predicted_gain=None,
        reason="made up",
    )


def measure(steps: int, folder: Path) -> dict[str, Any]:
    """Write the report of a run of so many steps, and open it."""
    run = write_long_run(folder / str(steps), steps)
    began = time.process_time()
    html = page([run])
    written = time.process_time() - began
    path = run / "report.html"
    path.write_text(html)
    result: dict[str, Any] = {"steps": steps, "log_bytes": (run / "events.jsonl").stat().st_size}
    result |= {"page_bytes": len(html.encode()), "write_cpu_seconds": round(written, 3)}
    return result | _opened(path)


def _opened(path: Path) -> dict[str, Any]:
    """Seconds until Chromium has loaded the page, which then shows its first figure, and until all figures are drawn;
    its height at 1,400 pixels, and addresses that it asked for."""
    from tests.browser import CHROMIUM, browser

    if CHROMIUM is None:
        return {"open_seconds": None, "drawn_seconds": None, "height_px": None, "outside_requests": None}
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile) / "profile") as tab:
        opened, drawn = [], []
        for _ in range(TRIES):
            began = time.perf_counter()
            tab.visit(path.as_uri(), width=1400)
            opened.append(time.perf_counter() - began)
            tab.wait_until_drawn()
            drawn.append(time.perf_counter() - began)
        outside = [address for address in tab.requests if address != path.as_uri()]
        height = tab.evaluate("document.documentElement.scrollHeight")
    return {
        "open_seconds": round(statistics.median(opened), 3),
        "drawn_seconds": round(statistics.median(drawn), 3),
        "height_px": height,
        "outside_requests": len(outside),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table for people."""
    rows = [
        {
            "steps": f"{row['steps']:,}",
            "log": f"{row['log_bytes'] / 1e6:.1f} MB",
            "page": f"{row['page_bytes'] / 1e6:.1f} MB",
            "written in (CPU)": duration(row["write_cpu_seconds"]),
            "opened in": "–" if row["open_seconds"] is None else duration(row["open_seconds"]),
            "drawn in": "–" if row["drawn_seconds"] is None else duration(row["drawn_seconds"]),
            "height": "–" if row["height_px"] is None else f"{row['height_px']} px",
            "requests": "–" if row["outside_requests"] is None else str(row["outside_requests"]),
        }
        for row in result["rows"]
    ]
    print_table(f"report of a run of {MOVES} moves and {DECISIONS} decisions", rows, console)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser: argparse.ArgumentParser = parser_of("report_size", __doc__)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="lengths of the runs, in steps")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(int(steps), Path(folder)) for steps in options.steps.split(",")]
    tell({"moves": MOVES, "decisions": DECISIONS, "rows": rows}, show, options, console_of(options))


if __name__ == "__main__":
    main()
