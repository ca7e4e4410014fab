"""What is shown of a running run, and how its events are followed."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_events import (
    DATA,
    NOISE,
    TENSOR,
    TOTAL_SAMPLES,
    decision,
    noise,
    reconfigure,
    start,
    step,
    trial,
    write_run,
)
from rich.console import Console

from copus.event_lines import without_replays
from copus.event_log import EventLog
from copus.events import Branch, Evaluate, Event, Failure, Profile, Warned, read_events
from launch.follow import Follower
from launch.progress import Progress
from launch.status import RunStatus
from profiles.formatting import count, noise_interval


def evaluate(samples: int, loss: float | None) -> Evaluate:
    return Evaluate(step=0, samples_consumed=samples, loss=loss, sequences=4, seconds=0.1)


def status_of(*events: Event) -> RunStatus:
    status = RunStatus()
    status.update(events)
    return status


HISTORY = (
    start(),
    evaluate(0, 6.0),
    step(40, 0.2),
    noise(40),
    decision(0, 40, TENSOR, DATA),
    reconfigure(0, 40, TENSOR, DATA),
    step(48, 0.1, 8),
    step(56, 0.3, 8),
    noise(56, high=None),
    evaluate(56, 5.5),
)


def test_status_is_the_newest_of_everything() -> None:
    status = status_of(*HISTORY)
    assert status.configuration == DATA
    assert status.fraction == 56 / TOTAL_SAMPLES
    assert status.samples_per_second == pytest.approx(16 / 0.4)  # steps since the move alone
    assert status.remaining_seconds == pytest.approx((TOTAL_SAMPLES - 56) / 40)
    assert status.last_change == "moved TP2·PP1·DP1 B4 m1 → TP1·PP1·DP2 B8 m2 in 2.5 s (decision 0)"
    assert (status.first_evaluation, status.evaluation) == (HISTORY[1], HISTORY[-1])


TRIAL_MOVE = reconfigure(0, 40, TENSOR, DATA).model_copy(update={"trial": True})
MOVE_BACK = reconfigure(0, 40, DATA, TENSOR).model_copy(update={"trial": True})


def test_a_trial_is_no_move_unless_the_job_stays() -> None:
    trying = status_of(start(), TRIAL_MOVE)
    assert (trying.configuration, trying.trying, trying.moves) == (DATA, TRIAL_MOVE, [])
    returned = status_of(start(), TRIAL_MOVE, MOVE_BACK, trial(0, 40, "returned"))
    assert (returned.configuration, returned.trying, returned.moves) == (TENSOR, None, [])
    assert len(returned.trials) == 1
    stayed = status_of(start(), TRIAL_MOVE, trial(0, 40, "stayed"))
    assert (stayed.configuration, stayed.moves) == (DATA, [TRIAL_MOVE])
    assert status_of(start(), TRIAL_MOVE, start()).trying is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_trial_is_called_one_and_told_once_it_has_ended(terminal: bool) -> None:
    during = shown_by(RunStatus(), [start(), step(4), TRIAL_MOVE, step(12, 0.1, 8)], terminal)
    assert re.search(r"layout +TP1·PP1·DP2 \(trial\)", during)
    assert "moved" not in during
    after = shown_by(RunStatus(), [start(), TRIAL_MOVE, MOVE_BACK, trial(0, 40, "returned")], terminal)
    assert (
        "tried TP1·PP1·DP2 B8 m2 for 6 steps in 3 s (decision 0): step ×1.32 (1.20 to 1.45), "
        "returned to TP2·PP1·DP1 B4 m1" in after
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_high_throughput_is_no_power_of_ten(terminal: bool) -> None:
    assert re.search(r"samples/s +8190", shown_by(RunStatus(), [start(), step(8, 1 / 1024, 8)], terminal))


@pytest.mark.parametrize("terminal", [True, False])
def test_utilization_is_shown_where_the_peak_is_rated(terminal: bool) -> None:
    rated = [start().model_copy(update={"peak_samples_per_second": 100.0}), *HISTORY[1:]]
    assert status_of(*rated).mfu == pytest.approx(0.4)
    assert re.search(r"MFU +40 %", shown_by(RunStatus(), rated, terminal))
    assert status_of(*HISTORY).mfu is None
    assert "MFU" not in shown_by(RunStatus(), list(HISTORY), terminal)


def test_the_first_failure_of_the_last_attempt_counts() -> None:
    failures = [Failure(step=0, samples_consumed=0, rank=rank, message=str(rank)) for rank in (1, 0, 3, 2)]
    status = status_of(start(), step(8), failures[0], failures[1], start(8), failures[2], failures[3])
    assert status.failure == failures[2]
    assert status.samples_consumed == 8  # a failing rank does not know them


def shown_by(status: RunStatus, events: list[Event], terminal: bool, run: Path = Path("runs/one")) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    with Progress(console, run.absolute(), status) as progress:
        status.update(events)
        progress.show(events)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_what_a_person_looks_for(tmp_path: Path, terminal: bool) -> None:
    run = write_run(tmp_path / "one", *HISTORY)
    text = shown_by(RunStatus(), list(read_events(run)), terminal, run)
    expected = [
        "14.0%",
        "1.79 k of 12.8 k",
        "3.000",
        "5.500",
        "12 (9–∞)",
        "TP1·PP1·DP2",
        "40",
        "moved TP2·PP1·DP1 B4 m1",
        "noise scale 12 (9–20): throughput ×2.00, efficiency ×1.00 → ×2.00 now",
    ]
    assert [part for part in expected if part not in text] == []
    assert ("\x1b" in text) == terminal


def test_progress_shows_the_measuring() -> None:
    profile: dict[str, Any] = {"step": 0, "samples_consumed": 0, "configuration": DATA, "total": 24}
    events: list[Event] = [
        Profile(**profile, done=7, step_seconds=0.182),
        Profile(**profile, done=8, step_seconds=None, failure="out of memory"),
    ]
    lines = shown_by(RunStatus(), events, terminal=False).splitlines()
    assert lines == ["measuring 7/24 TP1·PP1·DP2 B8 m2: 0.18 s", "measuring 8/24 TP1·PP1·DP2 B8 m2: out of memory"]
    assert "measuring 8/24" in shown_by(RunStatus(), events, terminal=True)


def test_progress_shows_branches_and_warnings() -> None:
    values: dict[str, Any] = {"step": 9, "samples_consumed": 80, "configuration": DATA, "seed": 7, "noise": NOISE}
    branch = Branch(**values, done=2, total=6, sequences=64, lr=1e-3, first_loss=4.5, last_loss=None)
    warning = Warned(step=9, samples_consumed=80, message="c seems [too] small")
    assert shown_by(RunStatus(), [branch, warning], terminal=False).splitlines() == [
        "branch 2/6 batch 8, order 7: loss 4.5000 → not finite",
        "warning: c seems [too] small",
    ]
    live = shown_by(RunStatus(), [branch, warning], terminal=True)
    assert "branch 2/6" in live
    assert "warning: c seems [too] small" in live


def test_a_loss_that_is_not_finite_can_be_shown() -> None:
    text = shown_by(RunStatus(), [start(), step(4, loss=None), evaluate(4, None)], terminal=False)
    assert text.count("not finite") == 3


@given(cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_a_follower_sees_every_event_once_however_the_writes_are_torn(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("follow")
    written = write_run(folder / "written", *HISTORY)
    whole = (written / "events.jsonl").read_bytes()
    follower, seen, before = Follower(folder), [], 0
    assert follower.read() == []  # nothing is there yet
    for cut in [*sorted(min(cut, len(whole)) for cut in cuts), len(whole)]:
        with open(folder / "events.jsonl", "ab") as log:
            log.write(whole[before:cut])
        before = cut
        seen += follower.read()
    assert seen == list(read_events(written))
    assert [event.type for event in seen] == [event.type for event in HISTORY]


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, start())
    with open(run / "events.jsonl", "ab") as log:
        log.write(b'{"type":"step","st')
    write_run(tmp_path, start(4, resumed_from="x"))  # opens the log again
    assert [event.samples_consumed for event in Follower(run).read()] == [0, 4]


def test_a_value_that_is_not_finite_does_not_hide_its_event(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(step(4).model_copy(update={"loss": float("nan")}))
    log.close()
    (seen,) = Follower(tmp_path).read()
    assert seen == step(4, loss=None).model_copy(update={"time": seen.time})


def test_what_a_resume_did_again_is_left_out() -> None:
    events = [start(), step(4), step(8), step(12), start(8, resumed_from="x"), step(12, 0.7), step(16)]
    history = without_replays(events)
    assert history == [events[0], events[1], events[2], *events[4:]]


def test_words_for_numbers() -> None:
    assert [count(number) for number in (0, 950, 12_340, 1_200_000, 3.2e9)] == ["0", "950", "12.3 k", "1.2 M", "3.2 G"]
    assert [count(number) for number in (999, 999_936, 999_999_488, 15e12)] == ["999", "1 M", "1 G", "15 T"]
    assert noise_interval(None, None, None) == "unknown yet"
    assert noise_interval(14.23, 10.1, 19.84) == "14.2 (10.1–19.8)"
    assert noise_interval(1239.0, 1012.0, None) == "1240 (1010–∞)"
