"""`copus audit`: what is read from a run's log, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch_events import DATA, TENSOR, candidate, decision, noise, reconfigure, start, step, write_run, write_timed_run
from launch_jobs import copus_here
from told_run import write_told_run

from copus.audit import audit_run
from copus.events import End, Event, Restart, Trial
from launch.audit import audit_lines
from profiles.audit import Audit, Estimate
from profiles.configuration import Configuration

BEGAN = 1_000_000.0


class Log:
    """Writes a run with times: a step of 4 sequences takes 0.1 s in TENSOR, one of 8 takes 0.15 s in DATA."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []
        self.now, self.samples = BEGAN, 0
        self._rng = np.random.default_rng(0)

    def add(self, event: Event, seconds: float = 0.0) -> None:
        self.now += seconds
        self.events.append((self.now, event))

    def train(self, configuration: Configuration, steps: int) -> None:
        usual = 0.1 if configuration == TENSOR else 0.15
        for _ in range(steps):
            seconds = usual * float(np.exp(0.01 * self._rng.standard_normal()))
            self.samples += configuration.global_batch
            self.add(step(self.samples, seconds, configuration.global_batch), seconds)
            self.add(noise(self.samples))

    def move(self, number: int, before: Configuration, after: Configuration, **values: Any) -> None:
        made = decision(number, self.samples, before, after)
        scores = [
            score.model_copy(
                update={"step_seconds": 0.1 if score.configuration == TENSOR else 0.155, "move_seconds": 2.5}
            )
            for score in made.decision.candidates
        ]
        made.decision = made.decision.model_copy(update={"candidates": scores, "trial": values.get("trial", False)})
        self.add(made)
        self.add(reconfigure(number, self.samples, before, after).model_copy(update=values), 2.5)

    def write(self, folder: Path) -> Path:
        return write_timed_run(folder, *self.events)


def test_a_move_is_weighed_with_its_time_and_its_prediction_is_checked(tmp_path: Path) -> None:
    log = Log()
    log.add(start())
    log.train(TENSOR, 40)
    log.move(0, TENSOR, DATA)
    log.train(DATA, 400)
    audit = audit_run(log.write(tmp_path))
    assert (audit.moves, audit.move_seconds, audit.trials) == (1, 2.5, 0)
    assert audit.training_seconds == pytest.approx(40 * 0.1 + 2.5 + 400 * 0.15, rel=0.01)
    assert audit.compared_seconds == pytest.approx(audit.training_seconds + 0.002, rel=1e-6)
    assert audit.first == TENSOR
    assert audit.best_fixed == DATA
    assert audit.best_fixed_ran
    assert (audit.predictions.count, audit.predictions.coverage_pct) == (1, 100.0)  # 0.150 of 0.155 ± 0.01
    assert audit.predictions.mape_pct == pytest.approx(100 * 5 / 155, abs=0.2)
    # B_simple is 12, so φ is 24 in the middle: SE is 6/7 at a batch of 4 and 3/4 at 8.
    progress = 160 * 6 / 7 + 3200 * 3 / 4
    gain = audit.gain_over_first_pct
    assert gain is not None
    expected = 100 * (progress / (6 / 7) / 40 / audit.compared_seconds - 1)
    assert gain.value == pytest.approx(expected, abs=2)
    assert gain.low < expected < gain.high


def test_trials_are_no_moves_but_one_after_which_the_job_stayed_is(tmp_path: Path) -> None:
    log = Log()
    log.add(start())
    log.train(TENSOR, 40)
    for number, outcome in enumerate(("returned", "stayed")):
        log.move(number, TENSOR, DATA, trial=True)
        log.train(DATA, 6)
        if outcome == "returned":
            log.add(reconfigure(number, log.samples, DATA, TENSOR).model_copy(update={"trial": True}), 2.5)
        ended: dict[str, Any] = {
            "candidate": DATA,
            "running": TENSOR,
            "steps": 6,
            "decision": number,
            "outcome": outcome,
        }
        ended |= {"seconds": 6.0, "move_seconds": 5.0, "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
        log.add(Trial(step=0, samples_consumed=log.samples, **ended))
        log.train(TENSOR if outcome == "returned" else DATA, 20)
    audit = audit_run(log.write(tmp_path))
    assert (audit.trials, audit.trial_seconds, audit.trial_move_seconds) == (2, 12.0, 10.0)
    assert (audit.moves, audit.move_seconds) == (1, 0.0)
    assert audit.predictions.count == 2
    assert "2 trials took 12 s (" in "\n".join(audit_lines(audit))


def test_what_was_done_again_and_the_time_down_are_lost_and_count_once(tmp_path: Path) -> None:
    audit = audit_run(write_told_run(tmp_path / "told"))
    assert audit.restart_seconds == pytest.approx(
        0.33 + 4.5
    )  # three steps again; the failure came 0.5 s after the last
    assert audit.measuring_seconds == 0.0
    assert audit.moves == 2


def test_time_between_a_stop_and_its_resume_is_nobodys(tmp_path: Path) -> None:
    log = Log()
    log.add(start())
    log.train(TENSOR, 10)
    log.add(End(step=10, samples_consumed=40, reason="interrupted", seconds=1.0))
    restart = {"attempt": 0, "resumed_from": "checkpoints/x", "samples_repeated": 0, "ranks": 2}
    log.add(Restart(step=10, samples_consumed=40, **restart), 3600.0)
    log.add(start(40))
    log.train(TENSOR, 10)
    audit = audit_run(log.write(tmp_path))
    assert audit.restart_seconds == 0.0
    assert audit.training_seconds == pytest.approx(2.0, rel=0.05)


def test_guesses_and_refused_candidates_are_no_fixed_configurations(tmp_path: Path) -> None:
    """One is known to ±60 %, the other may not be chosen: both look four times as fast as what ran."""
    log = Log()
    log.add(start())
    log.train(TENSOR, 60)
    guess, refused = (DATA.model_copy(update={"global_batch": batch}) for batch in (16, 32))
    made = decision(0, log.samples, TENSOR, TENSOR)
    scores = [score.model_copy(update={"move_seconds": 0.0}) for score in made.decision.candidates]
    scores.append(candidate(guess, "slower", 0.1).model_copy(update={"step_seconds_spread": 0.06, "move_seconds": 1.0}))
    scores.append(candidate(refused, "may not fit", 0.1))
    made.decision = made.decision.model_copy(update={"candidates": scores})
    log.add(made)
    assert audit_run(log.write(tmp_path)).best_fixed == TENSOR


def test_without_a_noise_scale_costs_are_known_and_gains_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, start(), *(step(4 * place) for place in range(1, 30)))
    assert copus_here("audit", str(run), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gain_over_first_pct"] is None
    assert values["predictions"] == {"count": 0, "mape_pct": None, "coverage_pct": None}
    assert copus_here("audit", str(run)) == 0
    assert "gain           unknown: the noise scale, or every step time, is" in capsys.readouterr().out


def test_a_run_without_training_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("audit", str(write_run(tmp_path))) == 2
    assert "nothing has been trained yet" in capsys.readouterr().err


def test_the_lines_say_signs_shares_and_what_never_ran() -> None:
    audit = Audit(
        training_seconds=100.0,
        compared_seconds=90.0,
        trial_seconds=2.0,
        trial_move_seconds=0.5,
        move_seconds=0.3,
        measuring_seconds=10.0,
        restart_seconds=0.0,
        moves=1,
        trials=1,
        first=TENSOR,
        best_fixed=DATA,
        gain_over_first_pct=Estimate(value=20.0, low=-0.04, high=41.0),
        gain_over_best_fixed_pct=Estimate(value=-3.25, low=-12.0, high=4.0),
        regret_to_best_schedule_pct=Estimate(value=6.0, low=2.0, high=9.0),
        predictions={"count": 1, "mape_pct": 4.0, "coverage_pct": 100.0},
    )
    assert audit_lines(audit) == [
        "audit: speed to the same progress, with 90 % intervals",
        "  vs first       +20 % (0 to +41) over TP2·PP1·DP1 B4 m1",
        "  vs best fixed  −3.2 % (−12 to +4) over TP1·PP1·DP2 B8 m2, which never ran: predicted",
        "  regret         +6 % (+2 to +9) time over the best schedule of hindsight",
        "  cost           1 trial took 2 s (2 % of training), 1 move took 0.3 s",
        "  measuring      10 s before training; with it +8 % over the first",
        "  predictions    1 step time off by 4 % on average, 100 % within their 80 % interval",
    ]


def test_a_first_configuration_that_was_left_before_any_step_counts_by_its_prediction(tmp_path: Path) -> None:
    log = Log()
    log.add(start())
    log.move(0, TENSOR, DATA)
    log.train(DATA, 60)
    audit = audit_run(log.write(tmp_path))
    assert audit.first == TENSOR
    # Both do the same number of sequences a second but for 3 %, and a batch of 4 teaches more: 24 ÷ 28 beside 24 ÷ 32.
    assert audit.gain_over_first_pct is not None
    assert audit.gain_over_first_pct.value < 0
