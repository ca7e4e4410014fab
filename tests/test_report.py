"""`copus report`: the numbers behind the plots, and what the page says where there is little to say."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launch_events import (
    DATA,
    SEQ_LEN,
    TENSOR,
    TOTAL_SAMPLES,
    decision,
    noise,
    reconfigure,
    start,
    step,
    trial,
    write_run,
    write_timed_run,
)
from launch_jobs import copus_here
from told_run import HOSTILE, evaluate, told_events, write_told_run

from copus.events import Event
from launch.history import History, LossAt, StepAt, read_history
from launch.intervals import interval_of_ratio
from launch.report import page
from launch.report.comparison import comparison, differences, flat, names
from launch.report.decisions import MOST_DECISIONS, kept_numbers
from launch.report.series import (
    decomposition,
    first_throughput,
    move_outcomes,
    predicted_lines,
    profiled_lines,
    reached,
    seen_points,
    smoothed_loss,
    thinned,
    thinned_peaks,
    time_shares,
)
from launch.report.single import job_values, single


@pytest.fixture
def told(tmp_path: Path) -> History:
    return read_history(write_told_run(tmp_path / "told"))


@given(rows=st.lists(st.integers(), max_size=60), most=st.integers(2, 20))
def test_thinning_keeps_the_ends_and_the_order(rows: list[int], most: int) -> None:
    places = list(range(len(rows)))
    kept = thinned(places, most)
    assert len(kept) == min(len(rows), most)
    assert kept == sorted(set(kept))
    assert kept[:1] + kept[-1:] == places[:1] + places[-1:]


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), most=st.integers(4, 60))
def test_thinning_by_peaks_keeps_order_ends_and_extremes(values: list[float], most: int) -> None:
    rows = list(enumerate(values))
    kept = thinned_peaks(rows, lambda row: row[1], most)
    assert len(kept) <= most
    assert kept == sorted(set(kept) & set(rows))
    assert (kept[0], kept[-1]) == (rows[0], rows[-1])
    heights = [height for _, height in kept]
    assert (min(heights), max(heights)) == (min(values), max(values))


def test_the_smoothed_loss_counts_sequences_and_not_steps() -> None:
    def steps(batches: list[int], losses: list[float | None]) -> list[StepAt]:
        ends = [sum(batches[: place + 1]) for place in range(len(batches))]
        return [StepAt(end, end, loss, 1.0, batch, 0) for end, loss, batch in zip(ends, losses, batches, strict=True)]

    assert [row.loss for row in smoothed_loss(steps([4] * 9, [3.0] * 9))] == pytest.approx([3.0] * 9)
    one = smoothed_loss(steps([1, 1, 2] + [4] * 300, [2.0, 4.0, 6.0] + [1.0] * 300))
    two = smoothed_loss(steps([1, 1, 2] + [8] * 150, [2.0, 4.0, 6.0] + [1.0] * 150))
    assert one[0].loss == 2.0
    assert one[-1].loss == pytest.approx(two[-1].loss, abs=1e-3)
    assert len(smoothed_loss(steps([4, 4], [None, 2.0]))) == 1
    assert smoothed_loss([]) == []


def test_goodput_is_the_product_of_its_parts(told: History) -> None:
    rows = decomposition(told, 2.0, "plain")
    assert [row.efficiency is None for row in rows] == [row.tokens <= 20 * SEQ_LEN for row in rows]
    last = rows[-1]
    assert last.throughput == pytest.approx(16 / 0.2)
    assert last.efficiency == pytest.approx(1 / (1 + 16 / (2 * 12.0)))
    assert last.goodput == pytest.approx(80 * 0.6)
    assert last.unmoved == pytest.approx(40 / (1 + 4 / 24))  # 4 sequences in 0.1 s
    aware = decomposition(told, 2.0, "lr-aware")[-1]
    assert aware.goodput == pytest.approx(80 * 0.6 * 4)


def test_the_first_configuration_is_as_fast_as_its_steps_were_and_before_them_as_it_was_measured(told: History) -> None:
    assert first_throughput(told) == pytest.approx(4 / 0.1)
    told.steps.clear()
    assert first_throughput(told) == pytest.approx(4 / 0.08)


def test_trials_have_a_table_of_their_own_and_are_no_moves(tmp_path: Path) -> None:
    """One that returned, one after which the job stayed."""
    events: list[Event] = [start(), *(step(4 * place) for place in range(1, 10))]
    for number, outcome in enumerate(("returned", "stayed")):
        events.append(reconfigure(number, 40, TENSOR, DATA).model_copy(update={"trial": True}))
        if outcome == "returned":
            events.append(reconfigure(number, 40, DATA, TENSOR).model_copy(update={"trial": True}))
        events.append(trial(number, 40, outcome))
    events += [reconfigure(2, 40, DATA, TENSOR), step(44)]
    history = read_history(write_run(tmp_path, *events))
    assert [move.event.decision for move in history.moves] == [1, 2]
    content = single(history)
    table = content.values["trials"]
    assert [row.cells[-2:] for row in table.rows] == [
        ["step ×1.32 (1.20 to 1.45)", "returned"],
        ["step ×1.32 (1.20 to 1.45)", "stayed"],
    ]
    assert {"name": "trials", "value": "2", "note": "took 6 s"} in content.values["tiles"]
    assert dict(content.values["audit"])["cost"].startswith("2 trials took 6 s")


def test_shares_of_time_are_all_of_it(told: History) -> None:
    shares = {share.kind: share for share in time_shares(told)}
    assert sum(share.share for share in shares.values()) == pytest.approx(1)
    assert shares["training"].seconds == pytest.approx(15 * 0.1 + 13 * 0.11 + 12 * 0.2)
    assert shares["repeated"].seconds == pytest.approx(0.33)
    assert shares["measuring"].seconds == pytest.approx(6.0)
    assert shares["moving"].seconds == pytest.approx(2.501)
    assert shares["down"].seconds == pytest.approx(4.0)
    assert time_shares(History(Path("none"))) == []


def test_lines_have_the_fastest_micro_batch_of_each_batch(told: History) -> None:
    made = told.decision(2)
    assert made is not None
    lines = predicted_lines(made)
    assert [(point.batch, round(point.rate)) for point in lines["TP1·PP2·DP1"]] == [(4, 27), (8, 32)]
    assert lines["TP1·PP1·DP2"][0].spread == pytest.approx(16.0)
    measured = profiled_lines(told)
    assert {name: [round(point.rate) for point in line] for name, line in measured.items()} == {
        "TP2·PP1·DP1": [50],
        "TP1·PP1·DP2": [80],
    }
    assert [(point.layout, point.batch, point.steps) for point in seen_points(told)] == [
        ("TP2·PP1·DP1", 4, 15),
        ("TP1·PP1·DP2", 8, 13),
        ("TP1·PP1·DP2", 16, 12),
    ]


def test_moves_are_predicted_against_seen(told: History) -> None:
    first, second = move_outcomes(told)
    assert (first.predicted_seconds, first.seen_seconds, first.steps) == (0.1, pytest.approx(0.11), 13)
    assert (second.predicted_seconds, second.seen_seconds, second.steps) == (0.1, pytest.approx(0.2), 12)
    assert first.reason == HOSTILE
    told.decisions.clear()
    assert move_outcomes(told)[0].predicted_seconds is None


def test_when_a_loss_was_reached() -> None:
    rows = [LossAt(0, 0, 8.0), LossAt(100, 10, 6.0), LossAt(200, 30, 7.0), LossAt(300, 40, 5.0)]
    assert reached(rows, 7.0) == LossAt(50, 5, 7.0)
    assert reached(rows, 5.5) == LossAt(275, 37.5, 5.5)
    assert reached(rows, 9.0) == rows[0]
    assert reached(rows, 4.0) is None


def test_the_page_says_what_happened(told: History) -> None:
    content = single(told)
    text = " ".join(content.summary)
    assert f"of {TOTAL_SAMPLES * SEQ_LEN / 1000:.1f} k" in text
    assert "from 8.200 to 4.500" in text
    assert "moved 2 times, from TP2·PP1·DP1 B4 m1 to TP1·PP1·DP2 B16 m2, in 2.5 s" in text
    assert "By its own data its first configuration would have taken" in text
    figures = {"overview-time", "overview-tokens", "predictions", "lines"}
    assert set(content.figures) == figures | {"speed", "efficiency", "lr", "beta2", "grad-norm"}
    assert [row.mark for row in content.values["decision"].rows].count("chosen") == 1
    shades = content.values["shades"]
    assert list(shades) == told.layouts()
    for figure in content.figures.values():
        drawn = [trace["line"]["color"] for trace in figure["data"] if trace.get("name") in shades and "line" in trace]
        assert all(colour in shades.values() for colour in drawn)


def test_moves_are_marks_in_a_lane_and_hide_no_curve(told: History) -> None:
    figure = single(told).figures["overview-time"]
    assert "shapes" not in figure["layout"]
    marks = {trace["name"]: trace for trace in figure["data"] if trace.get("mode") == "markers"}
    assert [len(marks[f"move to another {kind}"]["x"]) for kind in ("layout", "batch")] == [1, 1]
    assert {trace["yaxis"] for trace in marks.values()} == {"y4"}
    ran = [trace for trace in figure["data"] if trace.get("y", [""])[0] == "ran"]
    assert sum(len(trace["x"]) for trace in ran) == len(told.spans)
    ends = max(begin + length for trace in ran for begin, length in zip(trace["base"], trace["x"], strict=True))
    assert ends == pytest.approx(told.end, rel=1e-3)


def test_the_first_losses_do_not_set_the_axis(tmp_path: Path) -> None:
    losses = [11.0, 9.0, *(4.0 - place / 100 for place in range(100))]
    run = write_run(tmp_path, start(), *(step(4 * place, loss=loss) for place, loss in enumerate(losses, start=1)))
    low, high = single(read_history(run)).figures["overview-time"]["layout"]["yaxis"]["range"]
    assert low < 3.01
    assert 4.0 < high < 7.0


def test_every_decision_is_a_map_of_goodput_by_batch_and_layout(told: History) -> None:
    maps = single(told).data["decisions"]
    assert [made["number"] for made in maps["decisions"]] == [0, 1, 2]
    assert maps["first"] == 1  # the last one that moved the job
    first = maps["decisions"][0]
    row, column = first["chosen"]
    assert (maps["layouts"][row][0], maps["batches"][column]) == ("TP1·PP1·DP2", 8)
    assert first["cells"][row][column] == [2.0, 2, "CHOSEN"]  # 80 samples/s over 40, at one efficiency
    row, column = first["current"]
    assert first["cells"][row][column] == [1.0, 1, "current"]
    assert maps["decisions"][2]["chosen"] == maps["decisions"][2]["current"]


def test_of_many_decisions_those_that_moved_the_job_are_kept(tmp_path: Path) -> None:
    stays = [decision(number, 4, TENSOR, TENSOR) for number in range(MOST_DECISIONS + 50)]
    moved = decision(len(stays), 4, TENSOR, DATA)
    history = read_history(write_run(tmp_path, start(), step(4), *stays, moved))
    numbers = kept_numbers(history)
    assert len(numbers) == MOST_DECISIONS
    assert numbers[-1] == len(stays)


def test_the_speed_is_there_with_its_utilization_where_that_is_known(told: History) -> None:
    def tile(name: str) -> dict[str, str]:
        return next(each for each in single(told).values["tiles"] if each["name"] == name)

    assert (tile("tokens/s")["value"], tile("tokens/s")["note"]) == ("2.56 k", "of the last steps")
    assert told.status.start is not None
    told.status.start = told.status.start.model_copy(update={"peak_samples_per_second": 200.0})
    assert tile("tokens/s")["note"] == "MFU 40 %"


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 30, 36, 37, 60, 64, 70, 90])
def test_a_run_can_be_looked_at_whatever_is_there_of_it(tmp_path: Path, length: int) -> None:
    run = write_timed_run(tmp_path / "run", *told_events()[:length])
    with open(run / "events.jsonl", "a") as log:
        log.write('{"type":"step","st')
    content = single(read_history(run))
    expected = {"overview-time", "overview-tokens", "predictions", "lines"}
    assert set(content.figures) | set(content.reasons) >= expected
    assert content.summary[0]
    assert page([run]).count("</html>") == 1


def test_a_run_in_which_no_loss_was_finite_or_evaluated_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", start(), evaluate(0, 8.0), step(4, loss=None), noise(4))
    content = single(read_history(run))
    headings = [heading["text"] for heading in content.figures["overview-time"]["layout"]["annotations"]]
    assert "no loss of this run was finite" in headings[0]
    assert "evaluated once, was 8.000" in content.summary[0]
    assert content.summary[1] == "It ran in TP2·PP1·DP1 B4 m1 throughout."


def test_nothing_of_the_run_becomes_part_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPUS_TEST_SECRET", "tell nobody")
    run = write_told_run(tmp_path / "<b>bold")
    for text in (page([run]), page([run, write_told_run(tmp_path / "other")])):
        body = text.partition('<script type="application/json"')[0]
        assert "&lt;b&gt;bold" in body
        assert [tag for tag in ("<script", "<img", "<b>") if tag in body] == []
        assert [secret for secret in ("tell nobody", "hunter2") if secret in text] == []
        values = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
        assert values is not None
        assert "<" not in values[1]
        json.loads(values[1])
    assert job_values(run)["profile"]["options"] == {"api_key": "(left out)", "depth": 3}


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [write_told_run(tmp_path / "fast"), write_told_run(tmp_path / "slow", slower=2.0)]
    values = yaml.safe_load((runs[1] / "job.yaml").read_text())
    values["planner"]["policy"] = "static"
    (runs[1] / "job.yaml").write_text(yaml.safe_dump(values))
    text = page(runs)
    assert "planner.policy" in text
    assert "+100 %" in text  # twice the time to the same loss
    values["model"]["vocab"] = 5
    (runs[1] / "job.yaml").write_text(yaml.safe_dump(values))
    assert "cannot be compared: model.vocab is not the same" in page(runs)
    once = write_timed_run(tmp_path / "once", *told_events()[:20])
    (once / "job.yaml").write_text((runs[0] / "job.yaml").read_text())
    assert "At least two evaluations" in page([runs[0], once])
    empty = [write_run(tmp_path / name) for name in ("none", "nor this")]
    assert "None of these runs has trained a step yet" in page(empty)


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_an_interval(tmp_path: Path) -> None:
    runs = [write_told_run(tmp_path / name, slower=slower) for name, slower in (("a", 1.0), ("b", 1.2), ("c", 2.0))]
    for seed, run in enumerate(runs):
        values = yaml.safe_load((run / "job.yaml").read_text())
        values["training"]["seed"] = seed
        values["planner"]["policy"] = "static" if run.name == "c" else "copus"
        (run / "job.yaml").write_text(yaml.safe_dump(values))
    content = comparison([read_history(run) for run in runs])
    grouped, alone = [row.cells for row in content.values["equal"].rows]
    assert (grouped[:2], alone[:2]) == (["a", "2"], ["c", "1"])
    assert alone[4] == "–"
    ends = interval_of_ratio([10.0, 12.0])
    assert ends is not None
    half = 6.314 * math.log(1.2) / 2  # Student's t for one degree of freedom, times the standard error
    assert ends == pytest.approx([math.sqrt(120) * math.exp(sign * half) for sign in (-1, 1)], rel=1e-3)


def test_jobs_differ_in_fields() -> None:
    one, two = flat({"name": "a", "x": {"y": 1, "z": {}}}), flat({"name": "b", "x": {"y": 2, "z": {}}, "w": None})
    assert one == {"name": "a", "x.y": 1, "x.z": {}}
    assert differences({"one": one, "two": two}) == {"x.y": ["1", "2"], "w": ["–", "None"]}
    assert names([Path("/a/runs/x"), Path("/b/runs/x")]) == ["a/runs/x", "b/runs/x"]


def test_the_file_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_told_run(tmp_path / "told")
    assert copus_here("report", str(run)) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    written = (run / "report.html").read_text()
    assert written.startswith("<!DOCTYPE html>")
    assert copus_here("report", str(run), str(run), "--output", str(tmp_path / "x.html"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "output": str(tmp_path / "x.html")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["told", "x.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two"], "no run two: neither two nor runs/two is a folder with a job.yaml"),
        (["told", "--output", "a.pdf"], "--output a.pdf: expected a name that ends in .html"),
        (["told", "--output", "no/such/a.html"], "--output no/such/a.html: No such file or directory"),
    ],
)
def test_user_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write_told_run(tmp_path / "told")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert copus_here("report", *arguments) == 2
    assert capsys.readouterr() == ("", f"copus: {message}\n")
    assert sorted(tmp_path.rglob("*")) == before
