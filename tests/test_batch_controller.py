"""The batch by itself: when it changes, and what the optimizer uses then."""

from typing import Any

import pytest
import torch

import copus
from copus.optimizers import AdamW
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale


class Meter:
    """A meter that says what it is told to."""

    critical_batch_factor, replicas = 2.0, 1

    def __init__(self) -> None:
        self.batch = Configuration(layout=Layout(), micro_batch=4, global_batch=16)
        self.say(None, None)
        self.set: list[tuple[int, int]] = []

    def say(self, low: float | None, high: float | None) -> None:
        value = None if low is None else (low + (high or 2 * low)) / 2
        self.noise = NoiseScale(grad_sq=1.0, noise_trace=1.0, value=value, low=low, high=high, samples=20)
        self.critical_batch = value and self.critical_batch_factor * value

    def set_batch(self, micro_batch: int, micro_batches: int) -> None:
        self.set.append((micro_batch, micro_batches))


def controlled(**options: Any) -> tuple[Meter, torch.optim.AdamW, copus.BatchController]:
    """A controller of 4 micro-batches of 4."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    meter = Meter()
    options = {"most_micro_batches": 16, "every_steps": 2, **options}
    return meter, optimizer, copus.BatchController(meter, optimizer, **options)


def update(optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, gradient)
    optimizer.step()


def test_it_doubles_only_while_the_critical_batch_is_surely_twice_the_batch() -> None:
    meter, optimizer, controller = controlled()
    for low, high, micro_batches in (
        (None, None, 4),
        (15.9, 80.0, 4),
        (16.0, 80.0, 8),
        (16.0, 80.0, 8),
        (99.0, None, 16),
    ):
        meter.say(low, high)
        update(optimizer)
        update(optimizer)
        assert controller.micro_batches == micro_batches
    meter.say(1e6, None)
    update(optimizer)
    update(optimizer)
    assert controller.micro_batches == 16, "the limit"
    assert meter.set == [(4, 8), (4, 16)]


def test_it_halves_only_while_the_critical_batch_is_surely_less_than_half_of_the_batch_and_leaves_two_parts() -> None:
    meter, _, controller = controlled()
    meter.say(1.0, 4.0)
    assert not controller.apply()
    meter.say(1.0, 3.9)
    assert controller.apply()
    assert controller.micro_batches == 2
    meter.say(0.1, 0.2)
    assert not controller.apply(), "one part would show no noise"


def _values(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def test_the_values_of_a_step_are_those_of_a_job_and_the_schedule_sees_none_of_them() -> None:
    meter, optimizer, controller = controlled(every_steps=1)
    seen: list[dict[str, Any]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    )
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    meter.say(100.0, 200.0)
    for _ in range(3):
        update(optimizer)
    assert _values(optimizer) == before
    rules = AdamW(betas=(0.9, 0.99), weight_decay=0.1)
    kappas = [1.0, 2.0, 4.0]
    assert [step["betas"] for step in seen] == [rules.betas_at(kappa) for kappa in kappas]
    # The product of learning rate and decay is free of the correction of Adam's bias.
    for step, kappa in zip(seen, kappas, strict=True):
        wanted = 0.01 * rules.lr_factor(kappa) * rules.weight_decay_at(kappa)
        assert step["lr"] * step["weight_decay"] == pytest.approx(wanted)
    assert controller.reference_steps == 1 + 2 + 4


def test_equal_gradients_give_updates_of_the_learning_rate_whatever_beta2_was() -> None:
    """With the right bias correction v̂ of equal gradients is their square, and m̂ the gradient."""
    meter, optimizer, _ = controlled(every_steps=1)
    meter.say(1000.0, 2000.0)
    (weight,) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for kappa in (1.0, 2.0, 4.0):
        before = weight.detach().clone()
        update(optimizer)
        moved = float((before - weight).detach()[0])
        assert moved == pytest.approx(0.01 * kappa**0.5, rel=1e-4)


def test_state_goes_on_where_it_was() -> None:
    meter, optimizer, controller = controlled(every_steps=1)
    meter.say(100.0, 200.0)
    update(optimizer)
    again_meter, _, again = controlled()
    again.load_state_dict(controller.state_dict())
    assert (again.micro_batches, again.reference_steps) == (controller.micro_batches, controller.reference_steps)
    assert again_meter.set == [(4, 8)]


def test_what_cannot_be_controlled_is_refused() -> None:
    meter = Meter()
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="this is SGD"):
        copus.BatchController(meter, torch.optim.SGD([weight], lr=0.1), most_micro_batches=8)
    with pytest.raises(ValueError, match=r"micro_batches\(4\) ≤ most_micro_batches\(2\)"):
        copus.BatchController(meter, torch.optim.AdamW([weight]), most_micro_batches=2)
