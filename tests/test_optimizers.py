"""The optimizers beside torch's AdamW: against torch's own where it has them, on fused and on cut weights, in bf16."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from copus.backends.optimizers.build import make_optimizer, step_options
from copus.backends.optimizers.rounding import random_16_bits, round_stochastically
from copus.backends.optimizers.updates import orthogonal
from copus.backends.regions import HeldWeight, Region
from copus.backends.step_contract import StepRules
from copus.job import TrainingConfig
from copus.optimizers import Optimizer
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from tests.megatron_jobs import tiny_job
from tests.ranks import run_ranks

NAME = "model.layers.0.mlp.up_proj.weight"
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd"},
    "sgd with momentum": {"kind": "sgd", "momentum": 0.9},
    "adafactor": {"kind": "adafactor"},
    "muon": {"kind": "muon"},
    "signum": {"kind": "signum"},
}


def training_with(optimizer: dict[str, Any], **training: Any) -> TrainingConfig:
    return tiny_job(1, optimizer=optimizer, **training).training


def whole(shape: tuple[int, ...], name: str = NAME) -> HeldWeight:
    """A weight of which one rank has all."""
    return HeldWeight(shape, (Region(Box.whole(shape), Field(name, "float32", shape), (0,) * len(shape)),))


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 10.0 ** -(step % 3) for step in range(steps)]


def run(
    training: TrainingConfig,
    held: HeldWeight,
    weight: torch.Tensor,
    steps: list[torch.Tensor],
    rules: list[StepRules],
) -> torch.Tensor:
    """The weight after a step with each gradient."""
    param = torch.nn.Parameter(weight.clone())
    optimizer = make_optimizer(training, [{"params": [param]}], {param: held})
    product = 1.0
    for number, (gradient, rule) in enumerate(zip(steps, rules, strict=True)):
        rule = replace(rule, beta2_product=product)
        optimizer.param_groups[0].update(step_options(training, rule, number))
        param.grad = gradient.clone().to(param.dtype)
        optimizer.step()
        product *= rule.betas[1]
    return param.data


@pytest.mark.parametrize("shape", [(12, 8), (7,)], ids=str)
def test_adafactor_is_torchs_with_the_decay_of_the_paper(shape: tuple[int, ...]) -> None:
    """1 − β2 = t^(−0.8) begins with β2 = 0, after which nothing is left to correct. torch multiplies the learning rate
    by the root mean square of the weights, but by no less than the second of its `eps`."""
    start, steps = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)), gradients(shape, 6)
    rules = [StepRules(lr=0.01, betas=(0.0, 1 - (step + 1) ** -0.8), weight_decay=0.1) for step in range(6)]
    found = run(training_with({"kind": "adafactor"}), whole(shape), start, steps, rules)

    param = torch.nn.Parameter(start.clone())
    torchs = torch.optim.Adafactor([param], lr=0.01, beta2_decay=-0.8, eps=(1e-15, 1.0), weight_decay=0.1)
    for gradient in steps:
        param.grad = gradient.clone()
        torchs.step()
    torch.testing.assert_close(found, param.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_muon_of_a_matrix_is_torchs(shape: tuple[int, int]) -> None:
    start, steps = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)), gradients(shape, 4)
    rules = [StepRules(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)] * 4
    found = run(training_with({"kind": "muon"}), whole(shape), start, steps, rules)

    param = torch.nn.Parameter(start.clone())
    torchs = torch.optim.Muon([param], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in steps:
        param.grad = gradient.clone()
        torchs.step()
    torch.testing.assert_close(found, param.data, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_what_muon_makes_orthogonal_has_singular_values_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(matrix)
    made = torch.linalg.svdvals(orthogonal(matrix))
    large = values > 0.05 * values.norm()
    assert ((made[large] > 0.6) & (made[large] < 1.3)).all()


@pytest.mark.parametrize("shape", [(6, 4), (7,)], ids=str)
@pytest.mark.parametrize("optimizer", [{"kind": "adamw"}, {"kind": "sgd", "momentum": 0.9}], ids=str)
def test_the_update_of_a_bf16_weight_is_torchs_but_for_rounding(
    optimizer: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """One step from weights and a gradient that bf16 has exactly: the two differ by one rounding."""
    start, steps = torch.ones(shape), [gradient.bfloat16().float() for gradient in gradients(shape, 1)]
    rules = [StepRules(lr=0.3, betas=(0.9, 0.95), weight_decay=0.1)]
    in_fp32 = run(training_with(optimizer), whole(shape), start, steps, rules)
    lean = training_with(optimizer, backend="fsdp", precision="bf16", master_weights="none")
    in_bf16 = run(lean, whole(shape), start.bfloat16(), steps, rules)
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), in_fp32, rtol=2**-7, atol=1e-6)


def test_signum_goes_by_the_sign_of_its_momentum() -> None:
    steps = [torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[-0.05, 0.2, 0.0]])]
    rules = [StepRules(lr=0.5, betas=(0.9, 0.0), weight_decay=0.0)] * 2
    found = run(training_with({"kind": "signum"}), whole((1, 3)), torch.zeros(1, 3), steps, rules)
    assert found.tolist() == [[-1.0, 1.0, 0.0]], "the second gradient is too small to turn the average"


def test_momentum_is_an_average_that_begins_at_zero() -> None:
    rules = [StepRules(lr=1.0, betas=(0.5, 0.0), weight_decay=0.0)] * 2
    training = training_with({"kind": "sgd", "momentum": 0.5})
    found = run(training, whole((1,)), torch.zeros(1), [torch.ones(1)] * 2, rules)
    assert found.item() == -(0.5 + 0.75)


def _fused(shape: tuple[int, int]) -> HeldWeight:
    """Queries, key and value of two groups one below the other, as Megatron fuses them: q q k v q q k v."""
    names = [name for _ in range(2) for name in ("q", "q", "k", "v")]
    heights, taken, regions = {"q": 4, "k": 2, "v": 2}, {"q": 0, "k": 0, "v": 0}, []
    for row, name in enumerate(names):
        field = Field(f"model.layers.0.self_attn.{name}_proj.weight", "float32", (heights[name], shape[1]))
        regions.append(Region(Box((row, 0), (1, shape[1])), field, (taken[name], 0)))
        taken[name] += 1
    return HeldWeight(shape, tuple(regions))


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_every_tensor_in_a_fused_weight_is_updated_by_itself(kind: str) -> None:
    training, rules = training_with({"kind": kind}), [StepRules(lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)] * 3
    start, steps = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)), gradients((8, 5), 3)
    together = run(training, _fused((8, 5)), start, steps, rules)
    for rows in ([0, 1, 4, 5], [2, 6], [3, 7]):
        own = [gradient[rows] for gradient in steps]
        apart = run(training, whole((len(rows), 5)), start[rows], own, rules)
        torch.testing.assert_close(together[rows], apart, rtol=1e-5, atol=1e-6 if kind == "adafactor" else 1e-3)


def _cut(axes: tuple[int, ...]) -> float:
    """How far this rank's part of a weight, after three steps of Adafactor, is from that of a rank that has all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shape = (8, 8)
    parts = [1, 1]
    groups: list[tuple[dist.ProcessGroup, ...]] = [(), ()]
    for place, axis in enumerate(axes):
        parts[axis] = 2
        stride = size // 2 if place == 0 else 1
        for first in range(size):
            ranks = [first, first + stride]
            if first // stride % 2 == 0 and ranks[1] < size:
                group = dist.new_group(ranks)
                if rank in ranks:
                    groups[axis] = (group,)
    position = [0, 0]
    for place, axis in enumerate(axes):
        position[axis] = rank // (size // 2 if place == 0 else 1) % 2
    local = tuple(length // number for length, number in zip(shape, parts, strict=True))
    box = Box((position[0] * local[0], position[1] * local[1]), local)
    slices = tuple(map(slice, box.offset, box.stop))
    held = HeldWeight(local, (Region(Box.whole(local), Field(NAME, "float32", shape), box.offset),), *groups)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rules = [StepRules(lr=0.1, betas=(0.0, 0.9), weight_decay=0.1)] * 3
    training = training_with({"kind": "adafactor"})
    mine = run(training, held, start[slices], [gradient[slices] for gradient in gradients(shape, 3)], rules)
    alone = run(training, whole(shape), start, gradients(shape, 3), rules)
    return (mine - alone[slices]).abs().max().item()


@pytest.mark.dist
def test_adafactor_of_a_cut_weight_is_that_of_the_whole() -> None:
    for axes in ((0,), (1,)):
        assert max(run_ranks(2, _cut, axes)) < 1e-6


@pytest.mark.dist
@pytest.mark.slow
def test_adafactor_of_a_weight_cut_along_both_axes_is_that_of_the_whole() -> None:
    assert max(run_ranks(4, _cut, (0, 1))) < 1e-6


@settings(deadline=None)
@given(st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30))
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(value: float) -> None:
    """Over all 2¹⁶ random values the mean is the number itself: the bits that are cut off count exactly."""
    held, many = whole((2**14,)), torch.full((2**14,), value)
    rounded = torch.empty(2**14, dtype=torch.bfloat16)
    round_stochastically(many.clone(), rounded, held, seed=1, steps=0)
    below = torch.tensor(value).view(torch.int32) & -65536
    neighbours = {below.view(torch.float32).item(), (below + 65536).view(torch.float32).item()}
    assert set(rounded.float().tolist()) <= neighbours
    spacing = max(neighbours) - min(neighbours)
    error = rounded.double().mean().item() - value
    assert abs(error) <= 5 * 0.5 * spacing / 2**7, "five standard errors of a mean of 2¹⁴"


def test_numbers_that_bf16_has_are_kept_and_infinities_too() -> None:
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf"), -float("inf"), float("nan")])
    rounded = torch.empty(6, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), rounded, whole((6,)), seed=3, steps=7)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0, equal_nan=True)


@given(st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_random_bits_are_uniform_and_neighbours_do_not_go_together(key: int) -> None:
    bits = random_16_bits(key, torch.arange(2**15)).double() / 2**16
    assert bits.min() >= 0
    assert bits.max() < 1
    assert abs(bits.mean().item() - 0.5) < 6 / (12 * 2**15) ** 0.5
    assert abs(torch.corrcoef(torch.stack([bits[1:], bits[:-1]]))[0, 1].item()) < 6 / 2**7.5


def test_rounding_is_the_same_however_a_weight_is_cut_and_differs_by_step_seed_and_name() -> None:
    shape = (6, 10)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def rounded(box: Box, seed: int = 1, steps: int = 4, name: str = NAME) -> torch.Tensor:
        held = HeldWeight(box.shape, (Region(Box.whole(box.shape), Field(name, "bfloat16", shape), box.offset),))
        target = torch.empty(box.shape, dtype=torch.bfloat16)
        round_stochastically(weight[tuple(map(slice, box.offset, box.stop))].clone(), target, held, seed, steps)
        return target

    everything = rounded(Box.whole(shape))
    for box in (Box((2, 0), (3, 10)), Box((0, 4), (6, 3)), Box((1, 7), (2, 2))):
        assert torch.equal(rounded(box), everything[tuple(map(slice, box.offset, box.stop))])
    for other in ({"seed": 2}, {"steps": 5}, {"name": "model.layers.1.mlp.up_proj.weight"}):
        assert not torch.equal(rounded(Box.whole(shape), **other), everything)


@given(st.sampled_from([1 / 64, 0.25, 1, 4, 64]), st.sampled_from([*KINDS.values(), {"kind": "adamw"}]))
def test_every_optimizer_keeps_its_weight_decay_per_token(kappa: float, optimizer: dict[str, Any]) -> None:
    config = TypeAdapter(Optimizer).validate_python({**optimizer, "weight_decay": 0.1})
    assert config.lr_factor(kappa) * config.weight_decay_at(kappa) / kappa == pytest.approx(0.1)
    assert config.lr_factor(kappa) == pytest.approx(kappa if config.kind == "sgd" else kappa**0.5)
    half = {name: getattr(config, name) for name in ("beta2",) if hasattr(config, name)}
    if half:
        assert config.betas_at(kappa)[1] ** (1 / kappa) == pytest.approx(half["beta2"]), "the same half-life in tokens"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"kind": "muon"}, "layout": {"tp": 2}}, r"layout.tp\(2\) is not supported with optimizer.kind"),
        ({"optimizer": {"kind": "adafactor"}, "layout": {"dp": 2, "zero": 1}}, r"layout.zero\(1\) is not supported"),
        (
            {"optimizer": {"kind": "adafactor"}, "backend": "deepspeed"},
            r"kind\(adafactor\): this backend has adamw: gradients are scaled",
        ),
        (
            {"master_weights": "none", "precision": "bf16", "backend": "deepspeed", "layout": {"dp": 2, "zero": 2}},
            r"master_weights\(none\) is not supported by this backend",
        ),
        (
            {"master_weights": "none", "precision": "bf16", "layout": {"dp": 2, "zero": 1}},
            r"layout.zero\(1\) is not supported with master_weights\(none\)",
        ),
        ({"master_weights": "none", "backend": "fsdp"}, r"master_weights\(none\) needs precision\(bf16\), not fp32"),
        ({"optimizer": {"kind": "lion"}}, "adamw, sgd, adafactor, muon or signum"),
    ],
    ids=str,
)
def test_what_a_backend_cannot_do_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    from copus.job import JobError

    with pytest.raises(JobError, match=message) as refused:
        tiny_job(2, **{"layout": {"dp": 2}, **settings})
    assert "\n" not in str(refused.value)
