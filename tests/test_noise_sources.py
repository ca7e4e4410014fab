"""Every source of parts, on every kind of layout, against plain autograd on the unwrapped model."""

import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from copus.backends.megatron import model as megatron_model
from copus.backends.megatron.main_params import main_params
from copus.backends.megatron.modules import RMSNorm
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest
from planner.backend_traits import PartCount
from planner.noise_sources import NORMLAYER, split
from planner.sampling import executed_configuration
from profiles.configuration import Configuration
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks

pytestmark = pytest.mark.dist

ADAM = {"noise_metric": "adam"}
Figures = tuple[float, list[float]]
"""|g|² of the mean, and |g_j|² of the parts, in the same coordinates."""


def _ranks(layout: dict[str, Any]) -> int:
    return int(np.prod([layout.get(name, 1) for name in ("tp", "pp", "dp")]))


def _step(
    layout: dict[str, Any],
    source: str,
    model: dict[str, Any],
    planner: dict[str, Any],
    training: dict[str, Any],
    steps_before: int,
) -> dict[str, Figures]:
    """The parts of one step after some steps of training, by kind."""
    job = tiny_job(_ranks(layout), layout, model, **{"micro_batch": 2, "global_batch": 8, **training})
    job = job.model_copy(update={"planner": job.planner.model_copy(update=planner)})
    backend = backend_of(job)
    for step in range(steps_before):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    result = backend.train_step(random_batches, StepRequest(8 * steps_before, RULES, source))
    kinds = {"full": result.parts, "norm layers": result.norm_layer_parts}
    return {kind: (parts.grad_sq, list(parts.squared_norms)) for kind, parts in kinds.items() if parts is not None}


def _by_autograd(part_size: int, model: dict[str, Any], norms_only: bool, adam: bool, steps_before: int) -> Figures:
    """The same by torch alone, on one rank: backward passes of the unwrapped model over one part after another."""
    backend = backend_of(tiny_job(1, {}, model, micro_batch=2))
    for step in range(steps_before):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    network: Any = backend.built.chunks[0].module
    norm_weights = {id(module.weight) for module in network.modules() if isinstance(module, RMSNorm)}
    params = [param for param in network.parameters() if not norms_only or id(param) in norm_weights]
    weights = {}
    for main in main_params(backend.built.optimizer):
        if adam:
            v = main.state["exp_avg_sq"] / (1 - main.group["betas"][1] ** float(main.state["step"]))
            weights[id(main.param)] = torch.where(v > 0, 1 / (v.sqrt() + main.group["eps"]), 0.0).double()
    parts = []
    for first in range(8 * steps_before, 8 * steps_before + 8, part_size):
        tokens, labels = (each.to(own_device()) for each in random_batches(first, part_size))
        loss = network(tokens, None, None, labels=labels).mean()
        gradients = torch.autograd.grad(loss, params)
        scaled = [
            gradient.double() * weights.get(id(param), 1.0) for param, gradient in zip(params, gradients, strict=True)
        ]
        parts.append(torch.cat([each.reshape(-1) for each in scaled]))
    together = torch.stack(parts)
    return float((together.mean(dim=0) ** 2).sum()), (together**2).sum(dim=1).tolist()


@functools.cache
def _expected(part_size: int, tied: bool, norms_only: bool, adam: bool, steps_before: int) -> Figures:
    model = {"tied_embeddings": tied}
    return run_ranks(1, _by_autograd, part_size, model, norms_only, adam, steps_before)[0]


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({}, {}),
        ({"tp": 2}, {}),
        ({"tp": 2, "sequence_parallel": True}, {"tied_embeddings": True}),
        ({"pp": 2}, {"tied_embeddings": True}),
        ({"pp": 2, "vp": 2}, {}),
        ({"dp": 2}, {}),
        ({"dp": 2, "zero": 1}, {}),
        ({"tp": 2, "recompute": "full"}, {}),
        ({"tp": 2, "pp": 2, "sequence_parallel": True}, {}),
    ],
    ids=str,
)
def test_norm_layers_see_every_sequence(layout: dict[str, Any], model: dict[str, Any]) -> None:
    seen = run_ranks(_ranks(layout), _step, layout, "microbatch+normlayer", model, {}, {}, 1)[0]
    tied = model.get("tied_embeddings", False)
    mean_sq, parts = _expected(1, tied, True, False, 1)
    np.testing.assert_allclose(seen["norm layers"][0], mean_sq, rtol=1e-3)
    np.testing.assert_allclose(seen["norm layers"][1], parts, rtol=1e-3)
    mean_sq, parts = _expected(2, tied, False, False, 1)
    np.testing.assert_allclose(seen["full"][0], mean_sq, rtol=1e-3)
    np.testing.assert_allclose(seen["full"][1], parts, rtol=1e-3)


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ({}, "microbatch"),
        ({"tp": 2, "sequence_parallel": True}, "microbatch"),
        ({"pp": 2}, "microbatch"),
        ({"dp": 2}, "replica"),
        ({"dp": 2, "zero": 1}, "microbatch"),
        ({"dp": 2, "zero": 1}, "replica"),
    ],
    ids=str,
)
def test_norms_divided_by_the_root_of_adams_second_moment(layout: dict[str, Any], source: str) -> None:
    model = {"tied_embeddings": True}
    seen = run_ranks(_ranks(layout), _step, layout, source + "+normlayer", model, ADAM, {}, 2)[0]
    part_size = 4 if source == "replica" else 2
    for kind, norms_only, size in (("full", False, part_size), ("norm layers", True, 1)):
        mean_sq, parts = _expected(size, True, norms_only, True, 2)
        np.testing.assert_allclose(seen[kind][0], mean_sq, rtol=1e-2)
        np.testing.assert_allclose(seen[kind][1], parts, rtol=1e-2)


def test_before_adams_first_step_there_is_no_scale_to_divide_by() -> None:
    assert run_ranks(1, _step, {}, "microbatch+normlayer", {}, ADAM, {}, 0)[0] == {}


@pytest.mark.parametrize(
    "layout",
    [{"dp": 2}, {"dp": 2, "zero": 1}, {"pp": 2, "dp": 2}, {"pp": 2, "vp": 2, "dp": 2}, {"tp": 2, "dp": 2, "zero": 1}],
    ids=str,
)
@pytest.mark.parametrize("source", ["microbatch+normlayer", "replica"])
def test_an_overlapped_reduction_changes_nothing(layout: dict[str, Any], source: str) -> None:
    """In several steps, since megatron's first one reduces at the end whatever the setting; in small buckets, so that
    some are reduced long before the others are full."""
    plain = run_ranks(_ranks(layout), _step, layout, source, {}, {}, {}, 2)[0]
    overlapped = run_ranks(_ranks(layout), _overlapped_step, layout, source)[0]
    assert plain.keys() == overlapped.keys()
    for kind, (mean_sq, parts) in plain.items():
        np.testing.assert_allclose(overlapped[kind][0], mean_sq, rtol=1e-4)
        np.testing.assert_allclose(overlapped[kind][1], parts, rtol=1e-4)


def _overlapped_step(layout: dict[str, Any], source: str) -> dict[str, Figures]:
    small = functools.partial(megatron_model.DistributedDataParallelConfig, bucket_size=2000)
    with mock.patch.object(megatron_model, "DistributedDataParallelConfig", small):
        return _step(layout, source, {}, {}, {"overlap_grad_reduce": True}, 2)


def test_clipping_does_not_change_what_is_measured() -> None:
    free = run_ranks(1, _step, {}, "microbatch+normlayer", {}, {}, {"clip_grad": 0.0}, 0)[0]
    clipped = run_ranks(1, _step, {}, "microbatch+normlayer", {}, {}, {"clip_grad": 1e-3}, 0)[0]
    assert clipped == free


@pytest.mark.parametrize("layout", [{"dp": 2, "zero": 1}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_in_bf16_the_parts_are_those_of_fp32(layout: dict[str, Any]) -> None:
    exact = run_ranks(1, _step, {}, "microbatch+normlayer", {}, {}, {}, 0)[0]
    rounded = run_ranks(2, _step, layout, "microbatch+normlayer", {}, {}, {"precision": "bf16"}, 0)[0]
    for kind, (mean_sq, parts) in exact.items():
        np.testing.assert_allclose(rounded[kind][0], mean_sq, rtol=5e-2)
        np.testing.assert_allclose(rounded[kind][1], parts, rtol=5e-2)


def _parts(configurations: list[Configuration], sources: list[str]) -> list[list[dict[str, PartCount]]]:
    """The parts that steps of every configuration give, by source, for every source of a step."""
    backend = backend_of(tiny_job(configurations[0].layout.accelerators, configurations[0].layout.model_dump()))
    seen = []
    for one in configurations:
        backend.move(one)
        results = [backend.train_step(random_batches, StepRequest(0, RULES, source)) for source in sources]
        seen.append(
            [
                {
                    name: PartCount(len(parts.squared_norms), parts.part_size)
                    for name, parts in zip(
                        (split(source)[0], NORMLAYER), (result.parts, result.norm_layer_parts), strict=True
                    )
                    if name and parts is not None
                }
                for source, result in zip(sources, results, strict=True)
            ]
        )
    return seen


SOURCES = ["microbatch+normlayer", "replica", "normlayer"]


def test_a_lone_micro_batch_has_the_sequences_of_the_norm_layers() -> None:
    lone, odd, single = run_ranks(1, _parts, [configuration(8, 8), configuration(3, 3), configuration(1, 1)], SOURCES)[
        0
    ]
    assert lone == [{"microbatch": (2, 4), "normlayer": (8, 1)}, {}, {"normlayer": (8, 1)}]
    assert odd == [{"normlayer": (3, 1)}, {}, {"normlayer": (3, 1)}]
    assert single == [{}, {}, {}]


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}, {"pp": 2, "vp": 2}], ids=str)
def test_the_description_tells_the_parts_without_torch(layout: dict[str, Any]) -> None:
    """`BackendTraits.parts` of the configuration that is executed, those that can be compared, is what steps show."""
    description = find_backend("megatron")
    configurations = [configuration(8, 2, **layout), configuration(4, 1, **layout), configuration(4, 2, **layout)]
    if "vp" in layout:
        configurations.pop()  # an interleaved pipeline needs whole rounds
    for one, seen in zip(configurations, run_ranks(2, _parts, configurations, SOURCES)[0], strict=True):
        for source, parts in zip(SOURCES, seen, strict=True):
            told = description.parts(executed_configuration(description, one, source))
            assert parts == {name: told[name] for name in source.split("+") if told[name].number > 1}
