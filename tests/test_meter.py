"""The meter in a plain loop: the right numbers, no matter how the loop is written, and a word about what is wrong."""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import copus
from copus.backends.norm_layers import NormLayers, norms_of
from copus.meter.noise_meter import MeterWarning
from copus.meter_log import meter_steps
from copus.noise.run_noise import RunNoise
from copus.noise.step_estimate import estimate_step
from planner.efficiency import doubling
from planner.sampling import HalfLife

VOCAB, WIDTH, TOKENS = 40, 12, 6
MICRO_BATCH, COUNT, STEPS = 2, 4, 6


class Model(nn.Module):
    """Token by token, with both kinds of norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.first = nn.LayerNorm(WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.second = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.first(self.embedding(tokens))).relu()
        logits: torch.Tensor = self.output(self.second(hidden))
        return logits


Microbatch = tuple[torch.Tensor, torch.Tensor]


def batches(sizes: list[int], seed: int = 0) -> list[Microbatch]:
    """Random tokens, and labels that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(VOCAB * torch.rand(size, TOKENS, generator=generator) ** 3).long() for size in sizes]
    return [(tokens, (7 * tokens + 1) % VOCAB) for tokens in drawn]


def mean_loss(model: nn.Module, microbatch: Microbatch) -> torch.Tensor:
    """Mean cross entropy."""
    tokens, labels = microbatch
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


Loop = Callable[..., copus.NoiseMeter]


def loop(
    loss: Callable[[nn.Module, Microbatch], torch.Tensor] = mean_loss,
    sizes: list[int] | None = None,
    divide: bool = True,
    show: str = "optimizer",
    zero_grad: bool = True,
    scaler: Any = None,
    last_sizes: list[int] | None = None,
    **options: Any,
) -> copus.NoiseMeter:
    """A few steps at frozen weights."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = copus.NoiseMeter(model, optimizer if show == "optimizer" else None, **options)
    for step in range(STEPS):
        parts = batches((last_sizes if step == STEPS - 1 else None) or sizes or [MICRO_BATCH] * COUNT, step)
        with meter.step() if show == "context" else contextlib.nullcontext():
            for part in parts:
                value = loss(model, part) / (len(parts) if divide else 1)
                (value if scaler is None else scaler.scale(value)).backward()
        if scaler is None:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3 if zero_grad else 1e3)
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if zero_grad:
            optimizer.zero_grad()
    meter.close()
    return meter


def expected(steps: range) -> tuple[float, float]:
    """|G|² and tr Σ by plain autograd, averaged over steps of equal size."""
    model = Model()
    estimates = []
    for step in steps:
        gradients = []
        for part in batches([MICRO_BATCH] * COUNT, step):
            whole = torch.autograd.grad(mean_loss(model, part), list(model.parameters()))
            gradients.append(torch.cat([gradient.flatten() for gradient in whole]).double())
        each_sq = np.array([float(gradient.square().sum()) for gradient in gradients])
        mean = torch.stack(gradients).mean(dim=0)
        estimates.append(estimate_step(float(mean.square().sum()), each_sq, MICRO_BATCH))
    # Early in a run step s of t weighs (s/t)²; the first block is the first step.
    first = STEPS - len(estimates)
    noise = RunNoise(HalfLife(0, 100))
    weights = []
    for _ in range(STEPS):
        noise._clock.tick(MICRO_BATCH * COUNT)
        weights.append(noise._clock.now)
    decay = np.array([0.5 ** (weights[-1] - weight) for weight in weights[first:]])
    values = np.array([(estimate.grad_sq, estimate.noise_trace) for estimate in estimates])
    grad_sq, trace = (decay[:, None] * values).sum(axis=0) / decay.sum()
    return float(grad_sq), float(trace)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is complained about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeterWarning)
        yield


GIVEN = {"micro_batch": MICRO_BATCH, "micro_batches": COUNT}


@pytest.mark.parametrize(
    ("first", "how"),
    [
        (0, GIVEN),
        (0, {"show": "context", **GIVEN}),
        (0, {"show": "nothing", **GIVEN}),
        (1, {"show": "context"}),
        (1, {}),
    ],
    ids=["optimizer", "context", "passes alone", "counted context", "counted optimizer"],
)
def test_every_way_to_write_the_loop_gives_the_figures_of_plain_autograd(
    first: int, how: dict[str, Any], quiet: None
) -> None:
    """Clipped to nothing before each update: the meter has read the gradients by then. A loop whose batch is not said
    shows it in its first step."""
    meter = loop(source="microbatch", **how)
    assert (meter.noise.grad_sq, meter.noise.noise_trace) == pytest.approx(expected(range(first, STEPS)), rel=1e-5)
    assert (meter.problems, meter.noise.samples) == ([], STEPS - first)
    assert (meter.steps, meter.samples) == (STEPS, STEPS * MICRO_BATCH * COUNT)


def test_a_loss_that_is_not_divided_by_the_micro_batches_has_the_same_noise_scale(quiet: None) -> None:
    divided, whole = loop(**GIVEN), loop(divide=False, **GIVEN)
    assert whole.noise.value == pytest.approx(divided.noise.value, rel=1e-5)
    assert whole.noise.grad_sq == pytest.approx(COUNT**2 * divided.noise.grad_sq, rel=1e-5)


def test_norm_layers_of_torch_are_those_of_single_sequences() -> None:
    model = Model()
    ((tokens, labels),) = batches([4])
    layers = NormLayers(norms_of(model), sequence_axis=0, counts=True)
    assert layers.names == {"first.weight", "first.bias", "second.weight"}
    layers.start(True)
    mean_loss(model, (tokens, labels)).backward()
    seen = layers.collect(1, 4, torch.device("cpu"))
    chosen = [param for name, param in model.named_parameters() if name in layers.names]
    for index in range(4):
        alone = torch.autograd.grad(mean_loss(model, (tokens[index : index + 1], labels[index : index + 1])), chosen)
        assert float(seen[index]) == pytest.approx(sum(float(g.double().square().sum()) for g in alone), rel=1e-5)


def test_a_known_gradient_scaler_is_undone(quiet: None) -> None:
    plain = loop(**GIVEN)
    scaled = loop(scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=1024.0)), grad_scaler=scaler, **GIVEN)
    assert scaled.noise.grad_sq == pytest.approx(plain.noise.grad_sq, rel=1e-5)
    assert scaled.noise.value == pytest.approx(plain.noise.value, rel=1e-5)


def summed(model: nn.Module, microbatch: Microbatch) -> torch.Tensor:
    """The loss of somebody who sums over tokens."""
    return TOKENS * len(microbatch[0]) * mean_loss(model, microbatch)


def padded(model: nn.Module, microbatch: Microbatch) -> torch.Tensor:
    """Labels of −100 are left out, in some micro-batches more of them than in others."""
    tokens, labels = microbatch
    kept = labels.clone()
    kept[:, 1 + int(tokens[0, 0]) % 4 :] = -100
    return mean_loss(model, (tokens, kept))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"loss": summed}, "not the mean over its tokens"),
        ({"loss": padded}, "micro-batches count . to . tokens"),
        ({"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}, "not the mean over its tokens"),
        ({"zero_grad": False}, r"zero_grad\(\) was not called"),
        ({"sizes": [2, 2, 2, 1]}, "differ in their sequences"),
        ({"last_sizes": [1] * COUNT}, r"this rank has \[1\] instead of 2"),
        ({"sizes": [4]}, "is one part per step"),
        ({"micro_batch": 2, "micro_batches": 3}, r"backward passes instead of micro_batches\(3\)"),
    ],
    ids=["summed", "uneven tokens", "scaled", "stale", "uneven", "last batch", "one part", "passes"],
)
def test_bad_use_is_told(how: dict[str, Any], said: str) -> None:
    with pytest.warns(MeterWarning, match=said):
        meter = loop(**how)
    assert any(re.search(said, problem) for problem in meter.problems)


class Losses(Model):
    """Returns the loss of every token."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Labels are those of `batches`."""
        logits = super().forward(tokens)
        return nn.functional.cross_entropy(logits.transpose(1, 2), (7 * tokens + 1) % VOCAB, reduction="none")


@pytest.mark.parametrize(("reduce", "complaints"), [(torch.mean, 0), (torch.sum, 1)])
def test_a_model_that_returns_losses_shows_whether_they_are_averaged(
    reduce: Callable[[torch.Tensor], torch.Tensor], complaints: int
) -> None:
    model = Losses()
    meter = copus.NoiseMeter(model, **GIVEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokens, _ in batches([MICRO_BATCH] * COUNT):
            (reduce(model(tokens)) / COUNT).backward()
    assert [problem for problem in meter.problems if "not the mean" in problem] == meter.problems
    assert len(meter.problems) == complaints


def test_outputs_that_are_no_logits_and_no_losses_raise_no_false_alarm(quiet: None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    meter = copus.NoiseMeter(model, **GIVEN)
    for seed in range(COUNT):
        inputs = torch.rand(MICRO_BATCH, 4, generator=torch.Generator().manual_seed(seed))
        ((model(inputs) + 9).square().mean() / COUNT).backward()  # every gradient is positive, and they are large
    assert meter.problems == []


def test_an_unknown_scaler_is_told_even_if_the_model_shows_no_logits() -> None:
    with pytest.warns(MeterWarning, match="the loss is scaled by 1024"):
        meter = loop(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), **GIVEN)
    assert meter.problems


def _halve(param: torch.Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(0.5)


def test_gradients_that_somebody_changes_are_told_and_not_measured() -> None:
    model = Model()
    meter = copus.NoiseMeter(model, **GIVEN)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(_halve)
    *first, last = batches([MICRO_BATCH] * COUNT)
    for part in first:
        mean_loss(model, part).backward()
    with pytest.warns(MeterWarning, match="Such steps are not measured"):
        mean_loss(model, last).backward()
    assert meter.noise.samples == 0


def test_one_part_is_refused_where_it_is_said_beforehand() -> None:
    with pytest.raises(ValueError, match=r"micro_batches\(1\) × 1 replica is one part"):
        copus.NoiseMeter(Model(), micro_batch=8, micro_batches=1)


def test_models_that_nobody_can_measure_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a torch module"):
        copus.NoiseMeter("model")
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        copus.NoiseMeter(Model().requires_grad_(False))


def test_evaluations_between_micro_batches_do_not_count(quiet: None) -> None:
    def with_evaluation(model: nn.Module, microbatch: Microbatch) -> torch.Tensor:
        with torch.no_grad():
            model(batches([7])[0][0])
        return mean_loss(model, microbatch)

    assert loop(loss=with_evaluation, **GIVEN).noise == loop(**GIVEN).noise


def test_a_closed_meter_leaves_no_hook_behind() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copus.NoiseMeter(model, optimizer).close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(param._backward_hooks for param in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_state_goes_on_where_it_was() -> None:
    meter = loop(**GIVEN)
    again = copus.NoiseMeter(Model(), **GIVEN)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert (again.noise, again.steps, again.samples) == (meter.noise, meter.steps, meter.samples)


def test_the_log_has_a_line_for_every_step(tmp_path: Path) -> None:
    model = Model()
    meter = copus.NoiseMeter(model, **GIVEN)
    meter.log(tmp_path / "noise.jsonl")
    for step in range(3):
        for part in batches([MICRO_BATCH] * COUNT, step):
            mean_loss(model, part).backward()
        model.zero_grad()
    meter.close()
    lines = list(meter_steps(tmp_path / "noise.jsonl"))
    assert [(line.step, line.samples, line.global_batch, line.micro_batch) for line in lines] == [
        (1, 8, 8, 2),
        (2, 16, 8, 2),
        (3, 24, 8, 2),
    ]
    assert lines[0].step_seconds is None
    assert lines[-1].step_seconds is not None
    assert lines[-1].noise == meter.noise


def test_a_doubling_brings_half_of_the_steps_far_below_the_critical_batch_and_nothing_far_above() -> None:
    assert doubling(1, 1e9).steps_ratio == pytest.approx(0.5)
    assert doubling(1, 1e9).samples_ratio == pytest.approx(1.0)
    assert doubling(10**9, 1).steps_ratio == pytest.approx(1.0)
    at_it = doubling(32, 32)  # 1 + B/φ goes from 2 to 3
    assert (at_it.steps_ratio, at_it.samples_ratio, at_it.break_even) == pytest.approx((0.75, 1.5, 4 / 3))


def test_figures_are_numbers_by_name() -> None:
    meter = loop(**GIVEN)
    noise = meter.noise.model_copy(update={"value": 10.0, "low": 8.0, "high": None})
    meter._estimate = noise
    assert meter.figures() == {
        "noise_scale": 10.0,
        "noise_scale_low": 8.0,
        "critical_batch": 20.0,
        "doubling_steps_ratio": pytest.approx((1 + 16 / 20) / (1 + 8 / 20) / 2),
        "doubling_samples_ratio": pytest.approx((1 + 16 / 20) / (1 + 8 / 20)),
        "step_seconds": meter._step_seconds,
        "samples": STEPS * 8,
        "global_batch": 8,
        "micro_batch": MICRO_BATCH,
    }
