"""`copus explain`: which decision, what stands in the table, and predicted against seen."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launch_events import DATA, TENSOR, candidate, decision, reconfigure, start, step, write_run
from launch_jobs import copus_here

from copus.event_lines import read_decision
from copus.events import DecisionMade, DecisionTaken
from launch.explain import BEST, explanation_of
from profiles.configuration import Configuration
from profiles.decision import CandidateScore
from profiles.formatting import duration_interval
from profiles.layout import Layout
from profiles.noise_scale import Forecast


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Stays, moves to DATA, is interrupted, resumes, stays, and (decision 3) stays again."""
    steps = [step(10 + 8 * place, seconds, 8) for place, seconds in enumerate((0.9, 0.2, 0.3))]
    return write_run(
        tmp_path / "runs" / "one",
        start(),
        step(4, 0.5),
        decision(0, 4, TENSOR, TENSOR),
        step(8, 0.7),
        decision(1, 8, TENSOR, DATA),
        step(10, 5.0),  # before the move: not DATA's
        reconfigure(1, 10, TENSOR, DATA),
        *steps,
        start(34, DATA, resumed_from="checkpoints/x"),
        step(42, 0.4, 8),
        decision(2, 42, DATA, DATA),
        step(50, 0.6, 8),
        decision(3, 50, DATA, DATA),
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert copus_here("explain", *arguments) == 0
    return capsys.readouterr().out


def test_the_newest_decision_that_moved_the_job_is_explained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(printed(capsys, str(run), "--json"))
    assert values["decision"]["number"] == 1
    assert values["decision"]["switch"] is True
    assert values["decisions"] == {"first": 0, "last": 3}
    assert values["predicted_step_seconds"] == 0.1
    assert values["seen_steps"] == 5
    assert (
        values["seen_step_seconds"] == 0.4
    )  # the median of 0.9 0.2 0.3 0.4 0.6: the step before the move is not in it


def test_without_a_move_the_newest_decision_is_explained(tmp_path: Path) -> None:
    run = write_run(tmp_path, start(), *(decision(number, 4, TENSOR, TENSOR) for number in range(3)))
    explanation = explanation_of(run, None)
    assert explanation.decision.number == 2
    assert explanation.why == "the newest; none has moved the job"
    assert (explanation.seen_step_seconds, explanation.seen_steps) == (None, 0)


@pytest.mark.parametrize(("number", "steps"), [(0, 2), (2, 1), (3, 0)])
def test_steps_are_seen_until_the_next_move(run: Path, number: int, steps: int) -> None:
    assert explanation_of(run, number).seen_steps == steps


def test_the_table_says_what_was_known(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(run))
    for part in (
        "decision 1 of 0–3 (the newest that moved the job)",
        "B_simple = 12 (9–20) sequences after 40 steps",
        "φ = 24 sequences: 2 · B_simple",
        "plain: goodput = throughput × efficiency",
        "moves TP2·PP1·DP1 B4 m1 → TP1·PP1·DP2 B8 m2",
        "throughput ×2.00, efficiency ×1.00 → ×2.00 now",
        "because of [this]",
        "predicted 0.1 s, measured 0.4 s per step (median of 5), +300 %",
    ):
        assert part in text
    row = next(line for line in text.splitlines() if "CHOSEN" in line)
    # 8 sequences in 0.1 s beside 4 in 0.1 s, of equal efficiency; the time is known to ±10 %.
    assert row.split() == [
        "TP1·PP1·DP2",
        "B8",
        "m2",
        "0.1",
        "s",
        "10",
        "%",
        *("×2.00", "×1.00", "×2.00"),
        *"–––",
        "measured",
        "CHOSEN",
    ]
    assert "\x1b" not in text


def test_the_best_are_shown_and_always_the_chosen_and_the_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=2 * place) for place in range(50, 90)]
    run = write_run(tmp_path, start(), decision(0, 4, TENSOR, DATA, others))
    text = printed(capsys, str(run))
    assert text.count("unknown") == BEST - 2
    assert "CHOSEN" in text
    assert "current" in text
    assert "8 of 42 candidates; --all shows 34 more" in text
    assert printed(capsys, str(run), "--all").count("unknown") == 40
    assert len(json.loads(printed(capsys, str(run), "--json"))["decision"]["candidates"]) == 42


def weighed(verdict: str, batch: int, expected: float, **figures: Any) -> CandidateScore:
    """A candidate whose saving was worked out."""
    configuration = DATA.model_copy(update={"global_batch": batch})
    figures = {"move_seconds": 40.0, "saved_low_seconds": 360.0, "saved_high_seconds": 1260.0, **figures}
    return candidate(configuration, verdict).model_copy(update={"saved_expected_seconds": expected, **figures})


def weighed_run(folder: Path) -> Path:
    """Goodput and the expected saving rank the candidates in opposite orders."""
    made = decision(0, 4, TENSOR, DATA)
    current = candidate(TENSOR, "current").model_copy(
        update={"gain": 0.0, "saved_expected_seconds": 0.0, "move_seconds": 0.0}
    )
    unsure = "gain 12.3 % (−3 % to 30 %): relative step time uncertain by ±29 %"
    best = weighed("CHOSEN", 8, 840.0, efficiency=0.6375, gain=0.53, samples_per_second=72.0)
    scores = [
        weighed("slower: −12 %", 64, -30.0, saved_low_seconds=-60.0, saved_high_seconds=-10.0),
        weighed("saving uncertain: goodput −3 %", 16, -20.0, saved_low_seconds=-60.0, saved_high_seconds=10.0),
        weighed(unsure, 32, 36.0, saved_low_seconds=-12.0, saved_high_seconds=81.0),
        current,
        best,
    ]
    decided = made.decision.model_copy(update={"candidates": scores, "seconds_left": 2400.0})
    return write_run(folder, start(), made.model_copy(update={"decision": decided}))


def test_candidates_come_in_the_order_of_what_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, str(weighed_run(tmp_path))).splitlines()
    rows = [line for line in lines if line.lstrip().startswith(("TP1", "TP2"))]
    assert [re.search(r"B\d+", row)[0] for row in rows] == ["B8", "B32", "B4", "B16", "B64"]
    assert "14 min (6–21)" in rows[0]
    assert rows[1].split()[-2:] == ["unsure", "[1]"]
    assert [row.split()[-1] for row in rows[3:]] == ["unsure", "slower"]
    assert "[1] gain 12.3 % (−3 % to 30 %): relative step time uncertain by ±29 %" in lines


def test_the_trade_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "throughput ×1.80, efficiency ×0.85 → ×1.53 now; 40 min left → saves 14 min (6–21), move 40 s"
    assert line in printed(capsys, str(weighed_run(tmp_path)))


def test_what_is_at_stake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = decision(0, 4, TENSOR, DATA)
    known = {"regret_bound": 0.03, "critical_batch_low": 84.0, "critical_batch_high": 440.0, "seconds_left": 2400.0}
    decided = made.decision.model_copy(update=known)
    run = write_run(tmp_path, start(), made.model_copy(update={"decision": decided}))
    assert "at most 3 % of the time left (72 s), as φ may be 84 to 440 sequences" in printed(capsys, str(run))


def test_eighty_columns_keep_what_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys, str(weighed_run(tmp_path))).splitlines()
    table = [line for line in lines if line.lstrip().startswith(("candidate", "TP1", "TP2"))]
    assert len(table) == 6  # nothing wraps
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["candidate", "speed", "efficiency", "now", "saves", "verdict"]


def test_an_interval_of_time_has_one_unit_if_it_can() -> None:
    assert duration_interval(840, 360, 1260) == "14 min (6–21)"
    assert duration_interval(120, -2, 246) == "2 min (−2 s to 4.1 min)"
    assert duration_interval(-2, -3, -1) == "−2 s (−3 to −1)"
    assert duration_interval(0.01, -0.02, 0.05) == "< 0.1 s"


def test_what_a_restart_went_back_behind_is_not_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [start(), decision(0, 4, TENSOR, TENSOR), decision(1, 8, TENSOR, DATA), reconfigure(1, 8, TENSOR, DATA)]
    run = write_run(tmp_path, *before, start(4), decision(1, 8, TENSOR, TENSOR))
    assert "none has moved the job" in printed(capsys, str(run))


def test_the_forecast_is_shown_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = decision(0, 4, TENSOR, DATA)
    forecast = Forecast(tokens=2_000_000, value=50.0, low=40.0, high=64.0)
    seen = made.model_copy(update={"decision": made.decision.model_copy(update={"forecast": forecast})})
    assert "  forecast " not in printed(capsys, str(write_run(tmp_path / "one", start(), made)))
    text = printed(capsys, str(write_run(tmp_path / "two", start(), seen)))
    assert "forecast   B_simple 50 (40–64) at 2 M tokens" in text


def test_a_run_is_found_by_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert printed(capsys, "one").startswith("runs/one: decision 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "--decision", "4"], "--decision 4: runs/one has decisions 0 to 3"),
        (["one", "--decision", "-1"], "--decision -1: runs/one has decisions 0 to 3"),
        (["two"], "no run two: neither two nor runs/two is a folder with a job.yaml"),
        (["empty"], "runs/empty: the planner has decided nothing yet"),
    ],
)
def test_user_errors(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent.parent)
    write_run(Path("runs/empty"))
    assert copus_here("explain", *arguments) == 2
    assert capsys.readouterr() == ("", f"copus: {message}\n")


def test_unknown_events_and_torn_lines_are_passed_over(run: Path) -> None:
    with open(run / "events.jsonl", "ab") as events:
        events.write(b'{"type":"telepathy","step":1}\nnonsense\n[1]\n{"type":"decision","number":9}\n{"type":"dec')
    explanation = explanation_of(run, 1)
    assert (explanation.last, explanation.seen_steps) == (3, 5)


def test_a_log_that_another_program_wrote_is_read_too(run: Path) -> None:
    path = run / "events.jsonl"
    lines = [
        json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()
    ]  # type is not first
    path.write_text("\n".join(lines) + "\n")
    assert explanation_of(run, None).seen_steps == 5


def test_of_a_long_run_only_the_decision_that_is_explained_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=2 * place) for place in range(50, 250)]
    run = write_run(tmp_path, start(), decision(0, 4, TENSOR, DATA, others), step(8))
    log, whole = run / "events.jsonl", run / "decisions.jsonl"
    first, taken, stepped = log.read_bytes().splitlines(keepends=True)
    made = whole.read_bytes()
    decisions = [made.replace(b'"number":0', b'"number":%d' % number) for number in range(300)]
    places = [sum(map(len, decisions[:number])) for number in range(300)]
    outcomes = [
        taken.replace(b'"number":0', b'"number":%d' % number).replace(b'"offset":0', b'"offset":%d' % place)
        for number, place in enumerate(places)
    ]
    whole.write_bytes(b"".join(decisions))
    log.write_bytes(first + stepped * 20_000 + b"".join(outcomes))
    numbers = []

    def read(run: Path, taken: DecisionTaken) -> DecisionMade | None:
        numbers.append(taken.number)
        return read_decision(run, taken)

    monkeypatch.setattr("launch.explain.read_decision", read)
    assert explanation_of(run, None).decision.number == 299
    assert numbers == [299]
