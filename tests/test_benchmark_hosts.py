"""What the benchmark of links makes of measured steps and moves."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from benchmarks.hosts import main, medians, show, steps_of
from benchmarks.time_to_target import JOB
from copus.events import Reconfigure
from copus.job import load_job
from planner.job_estimate import JobEstimate, estimate_job
from profiles.configuration import Configuration
from profiles.layout import Layout


@pytest.fixture(scope="module")
def estimate() -> JobEstimate:
    job = load_job(JOB)
    training = job.training
    return estimate_job(job.planner, job.model, job.cluster, training.precision, training.configuration)


def configuration(layout: Layout, micro_batch: int = 1, global_batch: int = 4) -> Configuration:
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)


def moved(before: Layout, after: Layout, seconds: float) -> Reconfigure:
    common: dict[str, Any] = {"step": 1, "samples_consumed": 4, "rung": "layout", "bytes_moved": 7, "decision": 1}
    return Reconfigure(before=configuration(before), after=configuration(after), seconds=seconds, **common)


def test_a_layout_s_step_is_that_of_its_fastest_micro_batch(estimate: JobEstimate) -> None:
    seconds = {
        configuration(Layout(dp=2), 1, 8): 0.4,
        configuration(Layout(dp=2), 2, 8): 0.3,
        configuration(Layout(dp=2), 4, 8): None,
        configuration(Layout(pp=2), 1, 8): 0.5,
    }
    one = estimate.start
    candidates = [
        replace(one, configuration=candidate, step_seconds=step, refusal="", source="measured")
        for candidate, step in seconds.items()
    ]
    steps = steps_of(replace(estimate, candidates=candidates))
    assert [(row["layout"], row["micro_batch"], row["step_seconds"]) for row in steps] == [
        ("TP1·PP1·DP2", 2, 0.3),
        ("TP1·PP2·DP1", 1, 0.5),
    ]


def test_moves_of_a_pair_are_told_by_their_median() -> None:
    dp, tp = Layout(dp=2), Layout(tp=2)
    moves = [*(moved(dp, tp, seconds) for seconds in (1.0, 9.0, 2.0)), moved(tp, dp, 5.0)]
    assert [(row["seconds"], row["bytes_moved"]) for row in medians(moves)] == [(2.0, 7), (5.0, 7)]


def test_the_fastest_layout_of_a_link_is_marked_where_all_were_measured() -> None:
    def link(gbit_per_second: float, **step_seconds: float) -> dict[str, Any]:
        steps = [
            {"global_batch": 8, "layout": layout, "micro_batch": 1, "step_seconds": seconds}
            for layout, seconds in step_seconds.items()
        ]
        common = {"hardware": "h", "software": "s", "tcp_gbit_per_second": gbit_per_second, "best": [], "moves": []}
        return {"gbit_per_second": gbit_per_second, "steps": steps, **common}

    text = StringIO()
    show(
        {"parameters": 1e6, "links": [link(10, DP2=0.1, PP2=0.2), link(0.1, DP2=1.0, PP2=0.3), link(1, DP2=0.7)]},
        Console(file=text),
    )
    assert [mark in text.getvalue() for mark in ("0.100 m1*", "0.300 m1*")] == [True, True]
    assert [mark in text.getvalue() for mark in ("0.200 m1*", "1.000 m1*", "0.700 m1*")] == [False] * 3


@pytest.mark.parametrize("bandwidths", ["0", "10,-1", "inf"])
def test_bandwidths_that_make_no_sense_are_refused(bandwidths: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--gbit", bandwidths])
    assert caught.value.code == 2
    assert "bandwidths are above 0" in capsys.readouterr().err
