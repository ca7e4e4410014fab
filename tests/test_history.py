"""A run read once: what counts, and when it happened."""

import json
from pathlib import Path

import pytest
from launch_events import (
    DATA,
    SEQ_LEN,
    TENSOR,
    decision,
    noise,
    reconfigure,
    start,
    step,
    write_former_log,
    write_run,
    write_timed_run,
)
from told_run import BEGAN, WIDE, evaluate, write_told_run

from copus.audit import audit_run
from copus.events import Checkpoint, End, Failure, Profile, Restart
from launch.history import History, read_history


@pytest.fixture
def told(tmp_path: Path) -> History:
    return read_history(write_told_run(tmp_path / "told"))


def test_what_was_done_again_is_there_once_and_its_time_is_known(told: History) -> None:
    samples = [round(row.tokens / SEQ_LEN) for row in told.steps]
    assert samples == sorted(set(samples))
    assert len(told.steps) == 15 + 10 + 3 + 12
    assert told.repeated_seconds == pytest.approx(3 * 0.11)
    assert [span.configuration for span in told.spans] == [TENSOR, DATA, WIDE]
    assert [told.spans[row.span].configuration.global_batch for row in told.steps] == [row.batch for row in told.steps]
    assert [move.event.after for move in told.moves] == [DATA, WIDE]


def test_time_begins_with_training_and_pauses_have_their_place(told: History) -> None:
    assert told.begin == pytest.approx(-6.0)
    assert told.steps[0].seconds == pytest.approx(0.6)  # after the evaluation, 0.5 s
    kinds = [pause.kind for pause in told.pauses]
    assert kinds.count("evaluating") == 3
    assert (kinds.count("measuring"), kinds.count("down"), kinds.count("moving")) == (1, 1, 2)
    measuring = told.pauses[kinds.index("measuring")]
    assert (measuring.begin, measuring.end) == (pytest.approx(-6.0), pytest.approx(0.0))
    down = told.pauses[kinds.index("down")]
    assert down.end - down.begin == pytest.approx(4.0)  # from the failure to the start
    assert all(pause.begin <= pause.end <= told.end + 1e-6 for pause in told.pauses)


def test_the_clock_stands_still_between_a_stop_and_its_resume(tmp_path: Path) -> None:
    night = 40_000.0
    ended = End(step=1, samples_consumed=4, reason="interrupted", seconds=1.0)
    again = Restart(step=1, samples_consumed=4, attempt=0, resumed_from="x", samples_repeated=0, ranks=2)
    run = write_timed_run(
        tmp_path,
        (BEGAN, start()),
        (BEGAN + 1, step(4, 1.0)),
        (BEGAN + 1, ended),
        (BEGAN + night, again),
        (BEGAN + night + 2, start(4, resumed_from="x")),
        (BEGAN + night + 3, step(8, 1.0)),
    )
    history = read_history(run)
    assert [row.seconds for row in history.steps] == [pytest.approx(1.0), pytest.approx(4.0)]
    assert [(pause.kind, pause.end - pause.begin) for pause in history.pauses] == [("starting", pytest.approx(2.0))]
    assert len(history.spans) == 1


def test_no_time_is_negative_although_the_clock_was_set_back(tmp_path: Path) -> None:
    times = (0.0, 1.0, 2.0, -3598.0, -3597.0)
    log = [(BEGAN + seconds, step(4 * number, 1.0)) for number, seconds in enumerate(times[1:], start=1)]
    history = read_history(write_timed_run(tmp_path, (BEGAN, start()), *log))
    assert [row.seconds for row in history.steps] == pytest.approx([1.0, 2.0, 2.0, 3.0])
    assert history.end == pytest.approx(3.0)


def test_a_resume_after_a_crash_may_measure_first(tmp_path: Path) -> None:
    measured = Profile(step=0, samples_consumed=0, configuration=DATA, done=1, total=1, step_seconds=0.1)
    again = Restart(step=1, samples_consumed=4, attempt=0, resumed_from="x", samples_repeated=0, ranks=2)
    run = write_timed_run(
        tmp_path,
        (BEGAN, start()),
        (BEGAN + 1, step(4, 1.0)),
        (BEGAN + 9000, measured),
        (BEGAN + 9005, again),
        (BEGAN + 9005, start(4, resumed_from="x")),
        (BEGAN + 9006, step(8, 1.0)),
    )
    history = read_history(run)
    assert history.steps[-1].seconds == pytest.approx(7.0)
    assert [(pause.kind, pause.end - pause.begin) for pause in history.pauses] == [("measuring", pytest.approx(5.0))]


@pytest.mark.parametrize("requeued", [True, False])
def test_the_time_until_a_scheduler_starts_a_dead_job_again_is_downtime(tmp_path: Path, requeued: bool) -> None:
    values = {"attempt": 0, "resumed_from": "x", "samples_repeated": 0, "ranks": 2}
    run = write_timed_run(
        tmp_path,
        (BEGAN, start()),
        (BEGAN + 1, step(4, 1.0)),
        (BEGAN + 121, Restart(step=1, samples_consumed=4, requeued=requeued, **values)),
        (BEGAN + 121, start(4, resumed_from="x")),
        (BEGAN + 122, step(8, 1.0)),
    )
    history = read_history(run)
    assert history.steps[-1].seconds == pytest.approx(122.0 if requeued else 2.0)
    down = [pause.end - pause.begin for pause in history.pauses if pause.kind == "down"]
    assert down == ([pytest.approx(120.0)] if requeued else [])


def test_decisions_are_read_one_by_one(told: History) -> None:
    assert sorted(told.decisions) == [0, 1, 2]
    made = told.decision(1)
    assert made is not None
    assert made.chosen == WIDE
    assert told.decision(7) is None


def test_a_log_that_another_program_wrote_is_read_alike(told: History) -> None:
    path = told.run / "events.jsonl"
    lines = [
        json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()
    ]  # type is not first
    path.write_text("\n".join(lines) + "\n")
    again = read_history(told.run)
    assert again.decision(1) == told.decision(1)
    assert (again.steps, again.pauses, again.moves) == (told.steps, told.pauses, told.moves)
    assert [pause.kind for pause in told.pauses].count("planning") == 3


def test_whole_decisions_are_in_a_file_of_their_own_and_every_one_can_be_read(tmp_path: Path) -> None:
    others = [DATA.model_copy(update={"global_batch": 8 * place}) for place in range(2, 80)]
    made = [decision(number, 4, TENSOR, TENSOR, others) for number in range(5)]
    run = write_run(tmp_path, start(), *made[:3])
    with open(run / "decisions.jsonl", "ab") as file:
        file.write(b'{"type":"decision","st')  # the writer died
    write_run(run, *made[3:], step(8))
    history = read_history(run)
    assert [history.decision(number) for number in range(5)] == [each.decision for each in made]
    assert sum(pause.kind == "planning" for pause in history.pauses) == 5
    assert max(map(len, (run / "events.jsonl").read_bytes().splitlines())) < 1000
    (run / "decisions.jsonl").unlink()
    assert read_history(run).decision(1) is None


def test_a_log_with_whole_decisions_among_the_events_is_read_alike(told: History) -> None:
    audit, decisions = audit_run(told.run), [told.decision(number) for number in range(3)]
    write_former_log(told.run)
    assert '"candidates"' in (told.run / "events.jsonl").read_text()
    former = read_history(told.run)
    assert [former.decision(number) for number in range(3)] == decisions
    assert None not in decisions
    assert (former.steps, former.pauses, former.spans) == (told.steps, told.pauses, told.spans)
    assert audit_run(told.run) == audit


def test_a_former_log_that_goes_on_in_the_present_form_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path, start(), decision(0, 4, TENSOR, DATA), reconfigure(0, 4, TENSOR, DATA))
    write_former_log(run)
    write_run(run, step(12), decision(1, 12, DATA, DATA))
    history = read_history(run)
    assert [taken.file for taken in history.decisions.values()] == ["events.jsonl", "decisions.jsonl"]
    assert [history.decision(number) is None for number in (0, 1)] == [False, False]


def test_torn_lines_unknown_events_and_a_missing_log(tmp_path: Path) -> None:
    run = write_told_run(tmp_path / "told")
    whole = (run / "events.jsonl").read_bytes()
    before = len(read_history(run).steps)
    (run / "events.jsonl").write_bytes(
        b'{"type":"telepathy"}\nnonsense\n{"type":"decision","decision":[]}\n' + whole[:-40]
    )
    assert len(read_history(run).steps) == before
    (run / "events.jsonl").unlink()
    assert read_history(run).steps == []


def test_a_log_cut_anywhere_can_be_read(tmp_path: Path) -> None:
    whole = (write_told_run(tmp_path / "told") / "events.jsonl").read_bytes()
    cut = write_timed_run(tmp_path / "cut")
    for length in range(0, len(whole), 1777):
        (cut / "events.jsonl").write_bytes(whole[:length])
        history = read_history(cut)
        assert history.end >= history.begin


def test_notices_are_in_words(tmp_path: Path) -> None:
    failure = Failure(step=0, samples_consumed=0, rank=1, message="disk full", fatal=False)
    saved = Checkpoint(step=1, samples_consumed=4, path="x", seconds=0.1, bytes=1)
    events = [start(), step(4), noise(4), saved, failure, decision(0, 4, TENSOR, DATA), evaluate(4, None)]
    events.append(reconfigure(0, 4, TENSOR, DATA))
    history = read_history(write_timed_run(tmp_path, *((BEGAN + place, event) for place, event in enumerate(events))))
    assert [notice.text for notice in history.notices] == ["disk full"]
    assert history.evaluations == []
