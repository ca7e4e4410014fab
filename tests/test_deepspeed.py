"""DeepSpeed behind the contract of a backend: every ZeRO stage trains alike, and moves and checkpoints lose no bit."""

import gc
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from copus.backends.deepspeed import step
from copus.backends.deepspeed.partitions import partitions, shard_table
from copus.backends.huggingface import mean_loss
from copus.backends.step_contract import StepRequest
from copus.collectives import RankError
from copus.job import JobError
from profiles.layout import Layout
from tests.deepspeed_jobs import deepspeed_backend, deepspeed_job, whole_state
from tests.megatron_jobs import RULES, configuration, random_batches
from tests.pretrained import open_folder, save_tiny
from tests.ranks import run_ranks
from tests.test_hf_weights import batches, begun, job_from, loss_of
from tests.test_oom_recovery import on_tcp

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
OFFLOADED = {"dp": 2, "zero": 3, "offload_optimizer": True}
STEPS = 3
BUILT = "copus.backends.deepspeed.built"


def _losses(backend: Any, first_sample: int = 0, steps: int = STEPS) -> list[float]:
    samples = range(first_sample, first_sample + 8 * steps, 8)
    return [backend.train_step(random_batches, StepRequest(sample, RULES)).loss for sample in samples]


def _train(zero: int, model: dict[str, Any]) -> list[float]:
    backend = deepspeed_backend(deepspeed_job(zero, dist.get_world_size(), model))
    return [*_losses(backend), backend.evaluate(random_batches, 8)]


def _train_all_stages(model: dict[str, Any]) -> list[list[float]]:
    losses = [_train(zero, model) for zero in STAGES["fp32"]]
    assert "torch._inductor.compile_fx" not in sys.modules, "a compiler that nobody uses takes seconds to import"
    return losses


@pytest.mark.dist
@pytest.mark.parametrize(
    "model",
    [
        {},
        pytest.param({"tied_embeddings": True, "gated_mlp": False}, marks=pytest.mark.slow),
        pytest.param({"bias": "all", "activation": "gelu_tanh"}, marks=pytest.mark.slow),
        pytest.param({"qk_norm": "head", "head_dim": 16}, marks=pytest.mark.slow),
        pytest.param({"norm_position": "post", "qk_norm": "projection"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_stage_has_the_losses_of_one_rank(model: dict[str, Any]) -> None:
    alone = run_ranks(1, _train, 0, model)[0]
    for losses in run_ranks(2, _train_all_stages, model)[0]:
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


def _move_through_all_stages(precision: str) -> tuple[list[float], list[float], list[str]]:
    """Losses of a job that stays and of one that moves, a few steps in each layout, and what a move changed."""
    there: list[dict[str, Any]] = [{"dp": 2, "zero": zero} for zero in STAGES[precision]]
    layouts = [*there, OFFLOADED, *there[::-1]]
    first = STAGES[precision][0]
    stays = _losses(deepspeed_backend(deepspeed_job(first, 2, precision=precision)), steps=STEPS * len(layouts))
    backend = deepspeed_backend(deepspeed_job(first, 2, precision=precision))
    moves, changed = [], []
    for number, layout in enumerate(layouts):
        before = whole_state(backend)
        backend.move(configuration(8, 2, **layout))
        after = whole_state(backend)
        changed += [name for name in before.keys() | after.keys() if not np.array_equal(before[name], after[name])]
        moves += _losses(backend, 8 * STEPS * number)
    return stays, moves, changed


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_moves_between_stages_change_no_bit_and_losses_go_on(precision: str) -> None:
    stays, moves, changed = run_ranks(2, _move_through_all_stages, precision)[0]
    assert changed == []
    np.testing.assert_allclose(moves, stays, rtol=1e-5 if precision == "fp32" else 1e-3)


def _living_bytes() -> int:
    gc.collect()
    tensors = (value for value in gc.get_objects() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


ROUNDS = 13
"""Through four stages each: 52 moves."""


def _grow() -> list[dict[str, int]]:
    """What this process holds after each round through the stages."""
    backend = deepspeed_backend(deepspeed_job(0, 2))
    held = []
    for _ in range(ROUNDS):
        for zero in (1, 2, 3, 0):
            backend.move(configuration(8, 2, dp=2, zero=zero))
            backend.train_step(random_batches, StepRequest(0, RULES, "microbatch+normlayer"))
        of_process = {name: len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")}
        held.append({"tensors": _living_bytes(), **of_process, "resident": psutil.Process().memory_info().rss})
    return held


@pytest.mark.dist
@pytest.mark.slow
def test_a_job_that_moves_to_and_fro_does_not_grow() -> None:
    """Neither tensors nor open files nor threads; memory as the system counts it by less than 0.5 MB a move."""
    for held in run_ranks(2, _grow, timeout_seconds=600):
        print(held)
        second, last = held[1], held[-1]
        assert last["tensors"] == second["tensors"]
        assert last["fd"] <= second["fd"]
        assert last["task"] <= second["task"]
        assert last["resident"] - second["resident"] < 4 * (ROUNDS - 2) * 2**19


def _fail_to_move(after: int, owner_name: str, place: str) -> tuple[list[int], list[float], list[float]]:
    """A move that fails on rank 1 behind a place in the build: bytes of living tensors before it and after, and losses
    of the job and of one that stays."""
    gc.freeze()  # what was imported takes long to search
    before = 3 if after == 1 else 1
    stays = _losses(deepspeed_backend(deepspeed_job(before, 2)), steps=2)
    backend = deepspeed_backend(deepspeed_job(before, 2))
    moves = _losses(backend, steps=1)
    owner = pkgutil.resolve_name(owner_name)
    original, held = getattr(owner, place), [_living_bytes()]

    def no_room(*arguments: Any, **options: Any) -> Any:
        setattr(owner, place, original)  # it fails once
        result = original(*arguments, **options)
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no room")
        return result

    setattr(owner, place, no_room)
    with pytest.raises(RankError, match="rank 1: OutOfMemoryError: no room"):
        backend.move(configuration(8, 2, dp=2, zero=after))
    held.append(_living_bytes())
    return held, moves + _losses(backend, 8, steps=1), stays


@pytest.mark.dist
@pytest.mark.parametrize(
    ("after", "owner", "place"),
    [
        pytest.param(3, BUILT, "_cut", id="the model of ZeRO 3"),
        pytest.param(3, BUILT, "adam_state", id="Adam's state"),
        pytest.param(
            1,
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "initialize_optimizer_states",
            id="inside the engine's constructor",
        ),
        pytest.param(
            1,
            "deepspeed.runtime.engine:DeepSpeedEngine",
            "_configure_checkpointing",
            id="at its end",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_move_that_fails_on_one_rank_leaves_nothing_and_happens_on_none(after: int, owner: str, place: str) -> None:
    for (before, held), moves, stays in run_ranks(2, _fail_to_move, after, owner, place, timeout_seconds=110):
        assert held <= before
        assert moves == stays


def _no_room_in_the_engine() -> None:
    backend = deepspeed_backend(deepspeed_job(1, 2))
    if dist.get_rank() == 1:

        def no_room(*_: Any) -> None:
            raise torch.OutOfMemoryError("no room")

        optimizer = pkgutil.resolve_name("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3")
        optimizer._create_fp32_partitions = no_room
    backend.move(configuration(8, 2, dp=2, zero=3))


@pytest.mark.dist
def test_a_rank_that_cannot_make_the_engine_of_zero_3_ends_at_once_and_waits_for_nobody() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1:[\s\S]*MidCollectiveError: OutOfMemoryError: no room"):
        run_ranks(2, _no_room_in_the_engine, timeout_seconds=60)


def _save_and_load(folder: Path) -> tuple[list[str], list[float], list[float]]:
    """A checkpoint of every stage, read by another one that has trained on something else before."""
    changed, expected, resumed = [], [], []
    for zero, other in ((0, 3), (3, 1), (1, 2), (2, 0)):
        backend = deepspeed_backend(deepspeed_job(zero, 2))
        _losses(backend)
        place = folder / str(zero)
        if dist.get_rank() == 0:
            place.mkdir()
        dist.barrier()
        save = backend.begin_save(place, copy=False)
        save.write()
        save.finish()
        saved = whole_state(backend)
        expected += _losses(backend, 800)
        backend = deepspeed_backend(deepspeed_job(other, 2, seed=7))
        _losses(backend, 400)
        backend.load(place, STEPS)
        loaded = whole_state(backend)
        changed += [name for name in saved.keys() | loaded.keys() if not np.array_equal(saved[name], loaded[name])]
        resumed += _losses(backend, 800)
    return changed, expected, resumed


@pytest.mark.dist
def test_a_checkpoint_of_one_stage_goes_on_in_another(tmp_path: Path) -> None:
    changed, expected, resumed = run_ranks(2, _save_and_load, tmp_path)[0]
    assert changed == []
    np.testing.assert_allclose(resumed, expected, rtol=1e-5)


def _begin(folder: Path, precision: str) -> list[float]:
    """Losses of held-out sequences, with the weights of a folder, at every stage."""
    losses = []
    for zero in STAGES[precision]:
        backend = begun(job_from(folder, "deepspeed", {"dp": 2, "zero": zero}, precision=precision))
        losses.append(backend.evaluate(batches, 4))
        backend.close()
    return losses


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_job_begins_with_the_weights_of_a_folder(precision: str, rtol: float, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    expected = loss_of(open_folder(tmp_path / "llama"))
    np.testing.assert_allclose(run_ranks(2, _begin, tmp_path / "llama", precision)[0], expected, rtol=rtol)


def _change_batch() -> list[list[tuple[float, float]]]:
    shown = []
    for zero in STAGES["fp32"]:
        backend = deepspeed_backend(deepspeed_job(zero, 2))
        results = []
        for micro_batch in (1, 4, 2):
            assert backend.move(configuration(8, micro_batch, dp=2, zero=zero)).bytes_moved == 0
            results.append(backend.train_step(random_batches, StepRequest(0, RULES)))
        shown.append([(result.loss, result.grad_sq) for result in results])
    return shown


@pytest.mark.dist
def test_micro_batch_and_accumulation_change_in_the_running_engine() -> None:
    alike = run_ranks(2, _change_batch)[0]
    for shown in alike[1:]:
        np.testing.assert_allclose(shown, alike[0], rtol=1e-5)


def _go_back(stages: list[tuple[int, int]]) -> list[tuple[list[float], list[float]]]:
    """Losses of a job that moves, has no memory there for a step, and goes back; and of one that stays."""
    on_tcp()

    def no_room(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if dist.get_rank() == 1 and first % 4:  # its second micro-batch
            raise torch.OutOfMemoryError("no room")
        return random_batches(first, count)

    losses = []
    for before, after in stages:
        stays = _losses(deepspeed_backend(deepspeed_job(before, 2)), steps=2 * STEPS)
        backend = deepspeed_backend(deepspeed_job(before, 2))
        moves = _losses(backend)
        backend.move(configuration(8, 2, dp=2, zero=after))
        with pytest.raises(RankError, match="no room"):
            backend.train_step(no_room, StepRequest(8 * STEPS, RULES, on_trial=True))
        backend.recover(configuration(8, 2, dp=2, zero=before))
        losses.append((moves + _losses(backend, 8 * STEPS), stays))
        backend.close()
    return losses


@pytest.mark.dist
def test_a_step_without_memory_is_taken_back_and_the_job_goes_on() -> None:
    for moves, stays in run_ranks(2, _go_back, [(1, 3), (3, 2), (2, 0)])[0]:
        np.testing.assert_allclose(moves, stays, rtol=1e-5)


def _skip(layouts: list[dict[str, Any]], precision: str) -> list[tuple[list[float], list[float]]]:
    """Losses of a job with a step whose gradient is not finite on one rank, and of one without it."""
    losses = []
    for layout in layouts:
        stays = _losses(deepspeed_backend(deepspeed_job(0, 2, layout=layout, precision=precision)), steps=4)
        backend = deepspeed_backend(deepspeed_job(0, 2, layout=layout, precision=precision))
        before = _losses(backend, steps=2)
        original = step.mean_loss
        step.mean_loss = lambda *arguments: mean_loss(*arguments) * (float("nan") if dist.get_rank() == 0 else 1.0)
        try:
            assert backend.train_step(random_batches, StepRequest(400, RULES)).skipped
        finally:
            step.mean_loss = original
        losses.append((before + _losses(backend, 16, steps=2), stays))
        assert backend.optimizer_steps == 4
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(precision: str) -> None:
    layouts = [*({"dp": 2, "zero": zero} for zero in STAGES[precision]), OFFLOADED]
    for skipped, stays in run_ranks(2, _skip, layouts, precision)[0]:
        assert skipped == stays


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_ranges_of_all_ranks_cover_every_parameter_once(zero: int, ranks: int) -> None:
    groups = [{"a": (7, 5), "b": (3,), "c": (2, 3, 4)}, {"norm": (5,)}]
    elements = {name: [0] * int(np.prod(shape)) for group in groups for name, shape in group.items()}
    buffers: dict[tuple[int, int], set[int]] = {}
    for part in partitions(groups, Layout(dp=ranks, zero=zero)):
        for index in range(part.start, part.stop):
            elements[part.name][index] += 1
        buffer = buffers.setdefault((part.rank, part.group), set())
        own = set(range(part.position, part.position + part.stop - part.start))
        assert not buffer & own, "two ranges overlap in a rank's buffer"
        buffer |= own
    assert all(count == 1 for counts in elements.values() for count in counts)
    table = shard_table(groups, "bf16", Layout(dp=ranks, zero=zero))
    assert {field.name for field in table.fields} >= {"a", "a/master", "a/exp_avg", "norm/exp_avg_sq"}


@pytest.mark.parametrize(
    ("layout", "training", "message"),
    [
        ({"tp": 2}, {}, r"tp\(2\) is not supported by the deepspeed backend: it is data parallel only"),
        ({"pp": 2}, {}, r"pp\(2\) is not supported"),
        ({"dp": 2}, {"precision": "bf16"}, r"precision\(bf16\) needs layout.zero of 1 to 3"),
        (
            {"dp": 2},
            {"overlap_grad_reduce": True},
            r"overlap_grad_reduce\(true\) is not supported .* zero\(0\) in fp32",
        ),
        ({"dp": 2}, {"dropout": 0.1}, r"dropout\(0.1\): the models of transformers"),
        (
            {"dp": 2, "zero": 2, "offload_optimizer": True},
            {},
            r"offload_optimizer\(true\) needs zero\(3\), not zero\(2\)",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_in_one_line(
    layout: dict[str, int], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        deepspeed_job(0, 2, layout=layout, **training)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    monkeypatch.setattr(
        "copus.backends.description.find_spec", lambda name: None if name == "deepspeed" else util.find_spec(name)
    )
    with pytest.raises(JobError, match=r"backend: this backend needs deepspeed: pip install 'copus\[deepspeed\]'"):
        deepspeed_job(1, 2)


def _group_timeout() -> float:
    from deepspeed.utils import groups

    job = deepspeed_job(1, 1)
    backend = deepspeed_backend(
        job.model_copy(update={"launch": job.launch.model_copy(update={"timeout_seconds": 77.0})})
    )
    group = groups._get_data_parallel_group()
    backend.close()
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


@pytest.mark.dist
def test_the_groups_of_deepspeed_wait_as_long_as_the_job_says() -> None:
    """torch's default is half an hour: nobody would notice a rank that hangs."""
    assert run_ranks(1, _group_timeout) == [77.0]
