"""The simulator: exact where the answer is known, the same for the same seed, and the benchmark on a small table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_planner_decision import DP2, TP2, of

from benchmarks import policies
from planner.menu import Menu
from planner.policies.goodput import Goodput
from planner.policies.policy import Copus, Static
from planner.simulator.meter import NoiseMeter
from planner.simulator.runs import Runs
from planner.simulator.simulate import best_fixed_seconds, oracle, simulate
from planner.simulator.trajectory import (
    POINTS,
    geometric,
    kaplan_critical_batch,
    power,
    published_schedules,
    steps,
    through,
)

BATCHES = (2, 4, 8, 16, 32, 64)
TABLE = {of(DP2, 1, b): 100 * b / (b + 20.0) for b in BATCHES} | {of(TP2, 1, b): 60 * b / (b + 4.0) for b in BATCHES}
MENU, SPEED = Menu.of(list(TABLE)), np.array(list(TABLE.values()))


def runs_of(phi, seeds=4, cost=0.0, **changes):
    values = {
        "critical_batch": np.stack([phi] * seeds),
        "progress": np.full(seeds, 50_000.0),
        "planned_samples": np.full(seeds, 100_000.0),
        "every_samples": np.full(seeds, 500.0),
        "move_seconds": np.full((seeds, 3), [0.0, 0.0, cost]),
        "seed": np.arange(seeds),
        "noise": np.full(seeds, 0.3),
        "factor_error": np.ones(seeds),
    }
    return Runs(**(values | changes))


def test_a_run_that_never_moves_takes_the_time_of_the_integral():
    """∫ (1 + B/φ) dp / T with φ geometric: Σ over the progress has a closed form."""
    phi = geometric(4.0, 64.0)
    outcome = simulate(MENU, SPEED, runs_of(phi, noise=np.full(4, 1e-6)), Static(), record=True)
    index = outcome.paths[0][0][1]
    batch, speed = MENU.global_batch[index], SPEED[index]
    exact = 50_000 * (1 + batch * (1 / 4 - 1 / 64) / np.log(16)) / speed
    assert outcome.seconds == pytest.approx(np.full(4, exact), rel=1e-4)
    assert outcome.samples == pytest.approx(outcome.seconds * speed)
    assert outcome.moves.sum() == 0


def test_perfect_knowledge_and_free_moves_reach_the_oracle_and_nobody_beats_it():
    phi = geometric(2.0, 128.0)
    for cost in (0.0, 5.0, 100.0):
        plan = oracle(MENU, SPEED, phi, 50_000.0, np.array([0, 0, cost]))
        for policy in (Goodput(), Copus(0.0), Static()):
            outcome = simulate(MENU, SPEED, runs_of(phi, cost=cost), policy)
            assert (outcome.seconds > plan.seconds * (1 - 1e-3)).all()
        exact = simulate(MENU, SPEED, runs_of(phi, noise=np.full(4, 1e-3)), Copus(0.0))
    free = oracle(MENU, SPEED, phi, 50_000.0, np.zeros(3))
    assert exact.seconds == pytest.approx(np.full(4, free.seconds), rel=2e-3)


def test_seeds_are_what_differs_and_nothing_else():
    phi = geometric(2.0, 128.0)
    first = simulate(MENU, SPEED, runs_of(phi), Goodput())
    again = simulate(MENU, SPEED, runs_of(phi).take(np.array([2, 1])), Goodput())
    assert again.seconds.tolist() == first.seconds[[2, 1]].tolist()
    assert len(set(first.seconds.tolist())) > 1


def test_moves_are_paid():
    phi = geometric(2.0, 128.0)
    free = simulate(MENU, SPEED, runs_of(phi), Copus(0.1))
    paid = simulate(MENU, SPEED, runs_of(phi, cost=7.0), Copus(0.1))
    assert free.moves[:, 2].sum() > 0
    assert paid.seconds == pytest.approx(free.seconds + 7.0 * free.moves[:, 2])


@pytest.mark.slow
def test_wrong_throughputs_are_learned_by_running():
    """With throughputs 30 % off, who plans on trying loses less than who believes the table."""
    phi = geometric(8.0, 64.0)
    wrong = runs_of(phi, seeds=24, cost=1.0, throughput_error=0.3)
    ours = simulate(MENU, SPEED, wrong, Goodput())
    greedy = simulate(MENU, SPEED, wrong, Copus(0.1))
    assert ours.seconds.mean() < greedy.seconds.mean()


def test_a_drift_is_followed(monkeypatch: pytest.MonkeyPatch):
    """The machine's speed wanders: who corrects all throughputs by the steps is faster than who believes what he has
    seen of one configuration and the old table of the others."""

    def one_by_one(menu, state, rate, steps):
        rows = np.arange(len(rate))
        state.believed[rows, state.current], state.error[rows, state.current] = rate, 0.0

    drifting = runs_of(geometric(8.0, 64.0), seeds=8, cost=1.0, drift=0.2)
    corrected = simulate(MENU, SPEED, drifting, Goodput()).seconds.mean()
    monkeypatch.setattr("planner.simulator.training._learn_throughputs", one_by_one)
    assert corrected < simulate(MENU, SPEED, drifting, Goodput()).seconds.mean()


def test_the_best_fixed_configuration_of_hindsight_is_the_best_of_all_runs_that_never_move():
    """Also on a machine that drifts and has bursts, where it is another one in each run."""
    runs = runs_of(geometric(2.0, 128.0), seeds=2, drift=0.2, bursts=0.2, throughput_error=0.15)
    runs = replace(runs, every_samples=np.full(2, 10_000.0))
    stayed = [
        simulate(MENU, SPEED, replace(runs, start=np.full(2, index)), Static()).seconds for index in range(len(MENU))
    ]
    assert best_fixed_seconds(MENU, SPEED, runs) == pytest.approx(np.min(stayed, axis=0))


def test_drift_and_correlated_errors_are_survived():
    phi = geometric(8.0, 64.0)
    steady = simulate(MENU, SPEED, runs_of(phi), Goodput())
    drifting = simulate(MENU, SPEED, runs_of(phi, drift=0.2, correlation=0.9), Goodput())
    assert np.isfinite(drifting.seconds).all()
    assert drifting.seconds == pytest.approx(steady.seconds, rel=0.5)
    assert drifting.seconds.tolist() != steady.seconds.tolist()


def test_a_blind_start_costs_the_more_the_further_off_the_guess_is():
    """100 to 400 steps are so short that 20 of them, before the noise scale is known, count."""
    short = {"planned_samples": np.full(8, 4000.0), "progress": np.full(8, 2000.0), "every_samples": np.full(8, 20.0)}
    runs = runs_of(geometric(64.0, 256.0), seeds=8, **short)
    seconds = {
        guess: simulate(MENU, SPEED, replace(runs, first_guess=np.full(8, guess)), Goodput()).seconds.mean()
        for guess in (1e-3, 1.0, 1e3)
    }
    plan = oracle(MENU, SPEED, geometric(64.0, 256.0), 2000.0, np.zeros(3))
    assert plan.seconds < seconds[1.0] < min(seconds[1e-3], seconds[1e3])
    assert seconds[1.0] < 1.1 * plan.seconds, "one noise scale and 20 steps cost little"


def test_a_pinned_start_is_kept_until_the_noise_scale_is_known():
    first = next(index for index, each in enumerate(TABLE) if each == of(TP2, 1, 2))
    runs = runs_of(geometric(64.0, 256.0), first_guess=np.ones(4), start=np.full(4, first))
    for path in simulate(MENU, SPEED, runs, Goodput(), record=True).paths:
        assert path[0] == (0.0, first)
        assert path[1][0] * 50_000 >= 20 * 2 / (1 + 2 / 64), "20 steps of two sequences"


def test_the_noise_scale_of_a_job_is_late_and_gets_surer():
    meter = NoiseMeter.unknown(1)
    rng = np.random.default_rng(0)
    lags, errors = [], []
    for first in range(0, 40_000, 100):
        now = 10.0 + first / 100
        ends = np.array([float(first)]), np.array([first + 100.0])
        meter.observe(np.array([now]), *ends, np.array([4.0]), np.array([40_000.0]), rng.normal(size=1))
        lags.append(float(first + 100 - meter.centroid[0]))
        errors.append(float(np.sqrt(meter.variance[0])))
    half_life = 0.02 * 40_000
    assert lags[-1] == pytest.approx(half_life / np.log(2), rel=0.1)
    assert errors[0] == pytest.approx(0.8 * np.sqrt(4 / 100))
    assert errors[-1] == pytest.approx(0.8 * np.sqrt(4 / half_life * np.log(2) / 2), rel=0.1)
    assert meter.average[0] == pytest.approx(10 + float(meter.centroid[0]) / 100, rel=0.25)


def test_trajectories():
    assert (geometric(2, 64)[0], geometric(2, 64)[-1]) == pytest.approx((2, 64))
    assert power(2, 64)[0] == 2
    assert kaplan_critical_batch(3.0, 1) == pytest.approx(1.08e6, rel=0.01), "some 10^6 tokens at a loss of 3"
    assert steps([0.25, 1.0], [1.0, 5.0])[[0, 100, 300, -1]].tolist() == [1.0, 1.0, 5.0, 5.0]
    assert through([1.0, 0.0], [100.0, 1.0])[POINTS // 2] == pytest.approx(10.0)


def test_published_schedules(tmp_path: Path):
    file = tmp_path / "batch_noise.csv"
    file.write_text(
        "kind,model,tokens_seen_or_budget,batch_tokens,batch_sequences,seq_len\n"
        "schedule,A,0,4096,,1024\nschedule,A,1e9,8192,8,1024\nschedule,B,0,,4,1024\nlaw,C,0,,4,1\nschedule,D,,x,,\n"
    )
    found = published_schedules(file)
    assert list(found) == ["A"]
    assert found["A"][[0, 100, -1]].tolist() == [4.0, 4.0, 8.0]


HEADER = "source_id,sweep_id,tp,pp,dp,recompute,mbs,gbs,step_time_s\n"


def test_the_benchmark_prints_every_cell(tmp_path: Path, capsys):
    lines = [
        f"vtrain-single,s,{c.layout.tp},1,{c.layout.dp},full,1,{c.global_batch},{c.global_batch / v}\n"
        for c, v in TABLE.items()
    ]
    (tmp_path / "throughput.csv").write_text(HEADER + "".join(lines) + "other,s,1,1,1,full,1,2,1.0\n")
    assert (
        policies.main(["--data", str(tmp_path), "--json", "--seeds", "1", "--only", "copus", "goodput", "static"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    # Three policies in a still world, `goodput` again if c is learned, two from a blind start, three on a drift.
    assert len(result["cells"]) == 27 * 3 + 27 + 27 * 2 + 3 * 3
    assert {cell["world"] for cell in result["cells"]} == {"still", "blind", "drifting"}
    keys = {"table", "noise_from", "noise_to", "move_cost_steps", "calibration", "policy", "ratio_to_oracle"}
    assert keys | {"gain_over_best_fixed_pct", "low", "high"} <= set(result["cells"][0])
    assert all(cell["ratio_to_oracle"] > 0.999 for cell in result["cells"])
    assert result["summary"]["all_tables"]["goodput"]["cells"] == 27
    assert policies.main(["--data", str(tmp_path / "none")]) == 2


def test_a_wrong_c_is_learned_from_changes_of_batch_and_costs_less_then():
    """c is believed twice what it is: changes of batch pull it back, and what it costs becomes less."""
    phi = geometric(2.0, 128.0)
    long = {"planned_samples": np.full(8, 4e6), "progress": np.full(8, 2e6), "every_samples": np.full(8, 2e4)}
    wrong = runs_of(phi, seeds=8, factor_error=np.full(8, 2.0), **long)
    fixed = simulate(MENU, SPEED, wrong, Goodput())
    learned = simulate(MENU, SPEED, replace(wrong, factor_range=2.6), Goodput())
    assert learned.seconds.mean() < fixed.seconds.mean()


def test_trials_stay_within_their_budget():
    """With wrong tables, and none allowed, nothing that never ran is tried."""
    wrong = runs_of(geometric(8.0, 64.0), seeds=4, cost=1.0, throughput_error=0.2)
    none = simulate(MENU, SPEED, replace(wrong, trial_budget=0.0), Goodput())
    some = simulate(MENU, SPEED, replace(wrong, trial_budget=0.02), Goodput())
    assert np.isfinite(some.seconds).all()
    assert none.seconds.tolist() != some.seconds.tolist()
