"""`copus simulate` on a throughput table written by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launch_events import DATA, TENSOR, noise, reconfigure, start, step, write_run
from launch_jobs import copus_here, write_job

from copus.job import load_job
from launch.simulate_like import trajectory_of
from launch.simulate_show import conclusion
from planner.plan import Plan
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of 400 sequences on two accelerators, with two layouts measured at two batches each."""
    monkeypatch.chdir(tmp_path)
    path = write_job(tmp_path, planner={"every_samples": 4, "max_micro_batch": 1, "min_global_batch": 2})
    model = load_job(path).model
    here = Fingerprint(model=model.digest, precision="fp32", backend="b", hardware="2 × h core", software="s")
    times = {(2, 1): {2: 0.10, 64: 2.0}, (1, 2): {2: 0.22, 64: 1.2}}
    rows = [
        Measurement(
            fingerprint=here,
            model=model,
            configuration=Configuration(layout=Layout(tp=tp, dp=dp), micro_batch=1, global_batch=batch),
            step_seconds=seconds,
            spread_seconds=0.0,
            count=3,
            time=0.0,
        )
        for (tp, dp), by_batch in times.items()
        for batch, seconds in by_batch.items()
    ]
    (tmp_path / "table.jsonl").write_text("not a row\n" + "".join(f"{row.model_dump_json()}\n" for row in rows))
    return path


def test_a_table_of_policies_and_the_plan(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(job), "--noise", "1:100", "--move-seconds", "0.5", "--seeds", "3"]
    assert copus_here(*arguments) == 0
    text = capsys.readouterr().out
    for word in ("goodput", "copus", "norm-test", "cbs-optimistic", "best fixed: TP", "oracle", "adapting is worth"):
        assert word in text
    assert copus_here(*arguments, "--json", "--policy", "goodput", "--policy", "static") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in result["policies"]] == ["goodput", "static"]
    goodput, static = result["policies"]
    assert result["plan"]["seconds"] <= goodput["seconds"] * 1.001
    assert static["seconds"] == pytest.approx(result["as_written"]["seconds"], rel=1e-3), "it stays where it starts"
    assert static["layout_moves"] == 0
    assert goodput["seconds"] < static["seconds"]
    assert next(s["from"] for s in result["plan"]["schedule"]) == 0
    assert copus_here(*arguments, "--json", "--policy", "goodput", "--policy", "static") == 0
    assert json.loads(capsys.readouterr().out) == result, "seeds are fixed"


def test_the_noise_of_a_run_and_of_a_published_schedule(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(job.parent / "runs" / "one", start(), noise(4), noise(300), reconfigure(0, 4, TENSOR, DATA))
    assert run.is_dir()
    assert copus_here("simulate", str(job), "--like", "one", "--json", "--seeds", "2", "--policy", "goodput") == 0
    like = json.loads(capsys.readouterr().out)
    assert "as run" in like["noise"]
    assert like["move_seconds"] > 0
    (job.parent / "s.csv").write_text(
        "kind,model,tokens_seen_or_budget,batch_tokens,batch_sequences,seq_len\n"
        "schedule,A,0,,4,1024\nschedule,A,1e9,,64,1024\n"
    )
    assert copus_here("simulate", str(job), "--noise", "s.csv:A", "--json", "--seeds", "2", "--policy", "goodput") == 0
    assert "published" in json.loads(capsys.readouterr().out)["noise"]


def test_the_noise_of_a_run_that_was_made_longer_is_spread_over_all_of_it(job: Path) -> None:
    longer = start(400, resumed_from="x").model_copy(update={"total_samples": 800})
    at = {
        samples: noise(samples).model_copy(update={"value": value}) for samples, value in ((4, 1), (400, 4), (800, 9))
    }
    write_run(job.parent / "runs" / "one", start(), at[4], at[400], longer, at[800])
    phi = trajectory_of(Path("runs/one"), critical_batch_factor=2.0)
    assert (phi[0], phi[-1]) == pytest.approx((2 * 1, 2 * 9), rel=0.01)
    assert phi[len(phi) // 2] == pytest.approx(2 * 4, rel=0.01)


def test_what_a_run_did_stands_beside_what_was_to_be_expected_of_it(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its length, its moves after the first step, and not those of trials."""
    moved = reconfigure(0, 100, TENSOR, DATA)
    steps = [step(4 * place, 0.1 + 0.01 * (place % 3), 4) for place in range(1, 30)]
    write_run(job.parent / "runs" / "one", start(), *steps, noise(40), moved, noise(300))
    assert copus_here("simulate", str(job), "--like", "one", "--json", "--seeds", "2") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in result["policies"]] == ["goodput"], "that of the job file"
    made = result["made"]
    assert (made["samples"], made["layout_moves"], made["batch_moves"], made["trials"]) == (300, 1, 0, 0)
    assert 0 <= made["drift"] < 1
    (row,) = result["policies"]
    assert row["moves_low"] <= row["layout_moves"] + row["batch_moves"] <= row["moves_high"]
    assert copus_here("simulate", str(job), "--like", "one", "--seeds", "1") == 0
    text = capsys.readouterr().out
    assert "runs/one made 1 move after its start, 1 of them to another layout, and 0 trials in 300 sequences" in text
    assert "goodput is expected to make " in text


def test_seesaw_follows_the_decay_of_the_learning_rate(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(job), "--noise", "1:100", "--json", "--seeds", "1", "--policy", "seesaw"]
    moves = []
    for decay in ("constant", "cosine", "wsd"):
        changed = ["--set", f"training.decay={decay}", "--set", "planner.start=job"]
        assert copus_here(*arguments, *changed) == 0
        (row,) = json.loads(capsys.readouterr().out)["policies"]
        moves.append(row["batch_moves"])
    assert moves[0] == 0 < min(moves[1:])


def test_a_loss_is_called_a_loss() -> None:
    """The best schedule may be behind the best fixed configuration, if the job does not start in that."""
    plan = Plan((), seconds=150.0, fixed_index=0, fixed_seconds=100.0, fixed_samples=1.0, samples=1.0)
    said = conclusion(plan, "TP1")
    assert said.startswith("adapting does not pay here: even the best schedule takes 50 % longer than TP1")
    assert "worth 100 % over TP1" in conclusion(replace(plan, seconds=50.0), "TP1")
    assert conclusion(replace(plan, seconds=99.5), "TP1").endswith("hardly anything")


def test_a_picture(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert copus_here("simulate", str(job), "--noise", "1:100", "--seeds", "2", "--plot", "p.svg") == 0
    assert "<svg" in Path("p.svg").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --noise"),
        (["--noise", "1:x"], "--noise 1:x"),
        (["--noise", "8:inf"], "--noise 8:inf"),
        (["--noise", "nan:8"], "--noise nan:8"),
        (["--noise", "1:2", "--law", "cubic"], "--law cubic"),
        (["--noise", "1:2", "--error", "nan"], "--error nan"),
        (["--noise", "1:2", "--move-seconds", "inf"], "--move-seconds inf"),
        (["--noise", "1:2", "--policy", "best"], "--policy best"),
        (["--noise", "1:2", "--seeds", "0"], "--seeds"),
        (["--noise", "none.csv:A"], "none.csv"),
        (["--noise", "1:2", "--plot", "p.txt"], "--plot p.txt"),
        (["--noise", "1:2", "--set", "cluster.accelerator=abacus"], "abacus"),
        (["--noise", "1:2", "--set", "profile.table=."], "profile.table"),
        (["--like", "nobody"], "nobody"),
    ],
)
def test_what_the_user_has_to_mend(
    job: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copus_here("simulate", str(job), *options) == 2
    *warned, error = capsys.readouterr().err.splitlines()
    assert said in error
    assert all(line.startswith("copus: warning: table.jsonl: skipped 1 of 5 lines, which are no") for line in warned)
