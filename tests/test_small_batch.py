"""Small batches: the policy that takes the smallest one that is fast enough, what accumulation is for, and verdicts."""

import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.small_batch import ARMS, Grid, best_loss, is_inside, result_of, verdict, width
from benchmarks.small_batch_memory import FULL, SMALL_MODEL, job_of, peak, predicted_bytes, run
from copus.job import load_job
from launch.smallest_batch import smallest_batch, smallest_batch_facts
from planner.memory_check import PeakMemory
from planner.policies.smallest_saturating import SmallestSaturating
from planner.predictor import CandidateEstimate
from planner.small_batch import accumulation_purpose, smallest_saturating
from profiles.configuration import Configuration
from profiles.layout import Layout
from tests.policy_situations import situation_of

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "small-batch.yaml"
ALONE, PIPELINE = Layout(), Layout(pp=2)


def of(global_batch: int, micro_batch: int, layout: Layout = ALONE) -> Configuration:
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)


def estimate(configuration: Configuration, step_seconds: float | None, refusal: str = "") -> CandidateEstimate:
    peak = PeakMemory(1.0, 1.0, 1.0, {}, "first", None)
    return CandidateEstimate(configuration, step_seconds, 0.0, "measured", peak, refusal, not refusal, None)


SPEEDS = {of(1, 1): 10.0, of(2, 2): 18.0, of(4, 4): 19.2, of(8, 8): 20.0, of(8, 4): 20.0, of(4, 1): 10.0}


@pytest.mark.parametrize("current", [of(1, 1), of(8, 4), of(4, 4)], ids=lambda each: each.label)
def test_the_smallest_batch_at_95_percent_of_the_best_throughput_is_chosen(current: Configuration) -> None:
    situation = situation_of(SPEEDS, current, 100.0)
    choice = SmallestSaturating().choose(situation)
    assert situation.menu.configurations[int(choice.index[0])] == of(4, 4)
    reason = SmallestSaturating().reason(situation, choice)
    assert reason == "4 is the smallest batch that reaches 95 % of the best throughput: 19.2 of 20 samples/s"


def test_what_runs_stays_while_it_is_fast_enough_and_while_nothing_is_known() -> None:
    nearly = SPEEDS | {of(4, 2): 19.1}
    situation = situation_of(nearly, of(4, 2), 100.0)
    assert SmallestSaturating().choose(situation).index[0] == situation.current[0]
    unknown = situation_of(dict.fromkeys(SPEEDS, 0.0), of(2, 2), 100.0)
    assert SmallestSaturating().choose(unknown).index[0] == unknown.current[0]


def test_candidates_without_a_throughput_are_not_called_slow() -> None:
    situation = situation_of(SPEEDS | {of(8, 2): 0.0, of(16, 4): 0.0}, of(4, 4), 100.0)
    policy = SmallestSaturating()
    choice = policy.choose(situation)
    assert policy.reason(situation, choice).endswith(
        "19.2 of 20 samples/s, of 6 of 8 candidates: of the others none is known"
    )
    verdicts = [policy.verdict(situation, choice, index) for index in (0, 3, 6)]
    below = "below 95 % of the best throughput"
    assert verdicts == [below, "a smaller batch is as fast", "its throughput is not known"]


def test_the_plan_names_the_same_batch() -> None:
    found = smallest_saturating([estimate(c, c.global_batch / speed) for c, speed in SPEEDS.items()])
    assert found is not None
    assert found.configuration == of(4, 4)
    assert smallest_saturating([]) is None


@pytest.mark.parametrize(
    ("chosen", "estimates", "said"),
    [
        (of(8, 8), [], ""),
        (of(8, 4, Layout(dp=2)), [], ""),
        (of(8, 2, PIPELINE), [], "4 micro-batches on one replica fill its 2 pipeline stages"),
        (of(32, 4), [], "8 micro-batches on one replica, since max_micro_batch(16) is less than the batch"),
        (of(8, 4), [], "2 micro-batches on one replica, since the models have ruled out a micro-batch of 8"),
        (
            of(8, 4),
            [estimate(of(8, 8), 1.0, "does not fit: 84.1 of 80.0 GiB")],
            "2 micro-batches on one replica, since a micro-batch of 8 may not be chosen: does not fit: 84.1 of 80.0 GiB",  # noqa: E501
        ),
        (
            of(8, 4),
            [estimate(of(8, 8), 1.1), estimate(of(8, 4), 1.0)],
            "2 micro-batches on one replica, 10 % faster than a micro-batch of 8",
        ),
    ],
)
def test_accumulation_on_one_replica_says_what_it_is_for(
    chosen: Configuration, estimates: list[CandidateEstimate], said: str
) -> None:
    assert accumulation_purpose(chosen, {each.configuration: each for each in estimates}, 16) == said


def test_the_example_begins_at_batch_1_and_names_its_memory_with_every_optimizer() -> None:
    job = load_job(EXAMPLE)
    assert (job.training.global_batch, job.training.optimizer.kind) == (1, "adafactor")
    from copus.estimate import estimate_of

    smallest = smallest_batch(job, estimate_of(job))
    assert smallest is not None
    peaks = smallest.peak_bytes
    assert set(peaks) == {"adafactor", "adamw", "sgd", "muon", "signum"}
    assert peaks["sgd"] < peaks["adafactor"] < peaks["signum"] <= peaks["muon"] < peaks["adamw"]
    assert smallest.accumulation == "2 micro-batches on one replica, since max_micro_batch(16) is less than the batch"
    assert ("accumulates", smallest.accumulation) in smallest_batch_facts(smallest)[1]
    assert peaks["adamw"] - peaks["sgd"] == pytest.approx(8 * job.model.parameters, rel=0.01)


def test_the_width_of_a_range_of_learning_rates_is_read_between_the_points_of_the_grid() -> None:
    losses = {1.0: 3.2, 4.0: 3.1, 16.0: 3.0, 64.0: 3.1}
    assert (best_loss(losses), is_inside(losses)) == (3.0, True)
    assert width(losses) == pytest.approx(2.0), "half of the way to either neighbour, two octaves apart"
    assert width({1.0: 3.0, 4.0: math.inf}) == 0
    assert not is_inside({1.0: 3.0, 4.0: 3.1})


@pytest.mark.parametrize(
    ("figures", "holds"),
    [([0.01, 0.02, 0.015], True), ([0.2, 0.21, 0.22], False), ([0.0, 0.05, 0.12], None), ([0.0], None)],
)
def test_a_verdict_holds_fails_or_stays_open(figures: list[float], holds: bool | None) -> None:
    assert verdict("nats behind", figures, 0.05, decided=True)["holds"] is holds
    assert verdict("nats behind", figures, 0.05, decided=False)["holds"] is None


def test_finished_cells_are_not_trained_again_and_a_best_rate_at_the_end_extends_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(EXAMPLE)
    trained: list[tuple[float, int]] = []

    def train(self: Grid, arm: object, batch: int, runs: list[tuple[float, int]]) -> list[float]:
        trained.extend(runs)
        return [3.0 + (math.log10(lr / 3.0)) ** 2 for lr, _ in runs]  # best at 3, beyond the first grid of AdamW

    monkeypatch.setattr(Grid, "_train", train)
    Grid(job, tmp_path).fill(ARMS[0], 8, (0, 1), lambda said: None)
    first = len(trained)
    again = Grid(job, tmp_path)
    again.fill(ARMS[0], 8, (0, 1), lambda said: None)
    assert len(trained) == len(set(trained)) == first
    for seed in (0, 1):
        losses = again.losses(ARMS[0], 8, seed)
        assert is_inside(losses)
        best = min(losses, key=lambda lr: losses[lr])
        beside = sorted(losses, key=lambda lr: abs(math.log(lr / best)))[1:3]
        assert all(abs(math.log2(lr / best)) < 1.1 for lr in beside), "the grid is finer around the best"


def test_verdicts_on_what_is_not_trained_are_open_and_the_others_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grid, "_train", lambda self, arm, batch, runs: [3.0 + math.log10(lr) ** 2 for lr, _ in runs])
    grid = Grid(load_job(EXAMPLE), tmp_path)
    for arm, batch in ((ARMS[0], 1), (ARMS[0], 4), (ARMS[3], 1)):  # none at 16
        grid.fill(arm, batch, (0, 1), lambda said: None)
    grid.fill(ARMS[3], 16, [0], lambda said: None)
    result = result_of(grid, [1, 4, 16], (0, 1))
    rows = [(row["optimizer"], row["batch"], row["seeds"]) for row in result["rows"]]
    assert rows == [("adamw", 1, 2), ("adamw", 4, 2), ("sgd", 1, 2), ("sgd", 16, 1)]
    said = {entry["statement"].partition(" ")[0]: (entry["figure"], entry["holds"]) for entry in result["verdicts"]}
    assert said == {
        "AdamW": (None, None),
        "batch": (None, None),
        "SGD": (pytest.approx(0.0, abs=0.1), True),
        "Adafactor": (None, None),
        "at": (None, None),
    }


def test_the_peak_of_memory_is_the_largest_sum_of_changes() -> None:
    assert peak([3, -1, 4, -2, 1]) == 6
    assert peak([-2, 1]) == 0
    assert peak([]) == 0


def test_the_memory_model_counts_bytes_a_weight_of_every_case_of_full_training() -> None:
    jobs = {case: job_of(settings, SMALL_MODEL) for case, settings in FULL.items()}
    parts = {case: predicted_bytes(job) for case, job in jobs.items()}
    kept = {case: parts[case]["optimizer"] / job.model.parameters for case, job in jobs.items()}
    assert kept["AdamW, fp32"] == kept["AdamW"] == pytest.approx(4 + 8), "fp32 weights and two moments"
    assert kept["SGD, bf16 weights alone"] == pytest.approx(2)
    assert kept["Adafactor, bf16 weights alone"] == pytest.approx(2, rel=0.05)
    for case, job in jobs.items():
        element, gradient = 4 if "fp32" in case else 2, 2 if "alone" in case else 4
        gathered = (parts[case]["weights"] + parts[case]["gradients"]) / job.model.parameters
        assert gathered < element + gradient, "gathered weights go as gradients come"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_training_allocates_what_the_memory_model_says_to_within_10_percent_with_every_optimizer(backend: str) -> None:
    result = run(SMALL_MODEL, backend, 2, Console(quiet=True))
    assert {row["case"] for row in result["rows"]} >= set(FULL)
    assert result["largest_error_pct"] < 10
