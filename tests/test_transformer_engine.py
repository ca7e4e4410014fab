"""Megatron's layers of Transformer Engine modules, against those of torch's kernels.

Transformer Engine needs a GPU: `stand_ins/transformer_engine.py` has its modules' names, arguments and shapes, computed
by torch. So these tests show that Megatron's specification of them is built, cut, named, moved, saved and measured
right, and nothing of the kernels themselves.
"""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.step_contract import StepRequest
from copus.checkpoints.sharded import read_index
from copus.job import JobConfig, parse_job
from tests.megatron_jobs import RULES, SHAPE, backend_of, configuration, random_batches, save_checkpoint
from tests.ranks import run_ranks
from tests.test_experts import MOE, WITH_BIASES
from tests.test_model_families import FAMILIES

Figures = tuple[list[float], list[float], np.ndarray]
"""Losses, |g|² of each step, and |g_j|² of the parts of the first one."""
KERNELS = ("torch", "transformer-engine")
STAND_INS = Path(__file__).parent / "stand_ins"


def with_transformer_engine(ranks: int, function: Any, *arguments: Any) -> list[Any]:
    """Run it on ranks that import the stand-in, which the fork server has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_INS))
        return run_ranks(ranks, function, *arguments, context=multiprocessing.get_context("spawn"), timeout_seconds=600)


def _job(kernels: str, layout: dict[str, Any], model: dict[str, Any], precision: str = "fp32", **training: Any) -> Any:
    job = parse_job(
        {
            "name": "tiny",
            "model": {**SHAPE, **model},
            "cluster": {"accelerators_per_node": dist.get_world_size(), "accelerator": "b200"},
            "planner": {"policy": "copus", "start": "job"},
            "training": {
                **{"layout": layout, "global_batch": 8, "micro_batch": 1 if "experts" in model else 2},
                **{"tokens": 100_000, "evaluate_sequences": 8, "kernels": kernels, "optimizer": {"weight_decay": 0.01}},
                **({} if precision == "fp32" else {"precision": precision}),
                **training,
            },
        }
    )
    return _in(job, precision)


def _in(job: JobConfig, precision: str) -> JobConfig:
    """Also in fp32, which is refused on GPUs and shows more."""
    return job.model_copy(update={"training": job.training.model_copy(update={"precision": precision})})


def _figures(job: JobConfig, source: str) -> Figures:
    backend = backend_of(job)
    names = [name for chunk in backend.built.chunks for name, _ in chunk.named_parameters()]
    is_fused = any("layer_norm_weight" in name for name in names)
    assert is_fused == (job.training.kernels != "torch" and job.model.norm_position != "post")
    results = [backend.train_step(random_batches, StepRequest(8 * step, RULES, source)) for step in range(3)]
    backend.close()
    assert results[0].parts is not None
    losses, squares = ([getattr(result, name) for result in results] for name in ("loss", "grad_sq"))
    return losses, squares, np.sort(results[0].parts.squared_norms)


def _train(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[list[Figures]]:
    """Of each layout and model, with both kernels."""
    return [[_figures(_job(kernels, *case), "microbatch") for kernels in KERNELS] for case in cases]


def _check(pairs: list[list[Figures]]) -> None:
    for torchs, fused in pairs:
        np.testing.assert_allclose(fused[0], torchs[0], rtol=1e-6)
        np.testing.assert_allclose(fused[1], torchs[1], rtol=1e-5)
        np.testing.assert_allclose(fused[2], torchs[2], rtol=1e-6)


@pytest.mark.dist
@pytest.mark.slow
def test_every_family_trains_as_with_kernels_of_torch() -> None:
    models = [{}, *FAMILIES.values(), MOE, WITH_BIASES]
    _check(with_transformer_engine(1, _train, [({}, model) for model in models])[0])


CUT = {"tp": 2, "sequence_parallel": True}
TWO_RANKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tp": 2}, FAMILIES["gpt"]),
    (CUT, FAMILIES["post-norm"]),
    (CUT, FAMILIES["deepseek"]),
    ({"cp": 2}, FAMILIES["qwen"]),
    ({"cp": 2, "zero": 1}, FAMILIES["gemma"]),
    ({"pp": 2, "vp": 2}, FAMILIES["nemotron"]),
    ({"dp": 2, "ep": 2, "zero": 1}, MOE),
    (CUT, WITH_BIASES),
    (CUT | {"ep": 2, "etp": 1, "zero": 1}, MOE),
]


@pytest.mark.dist
@pytest.mark.slow
def test_layouts_of_two_ranks_train_as_with_kernels_of_torch() -> None:
    _check(with_transformer_engine(2, _train, TWO_RANKS)[0])


def _tour(model: dict[str, Any], layouts: list[dict[str, Any]], folder: str) -> tuple[list[str], list[list[float]]]:
    """What was not the same after the state went through the layouts and back; and, by the kernels that a checkpoint
    was written with, the losses of the next step of both kernels."""
    changed: list[str] = []
    losses: list[list[float]] = []
    for kernels in KERNELS:
        backend = backend_of(_job(kernels, layouts[0], model, "bf16"))
        for step in range(2):
            backend.train_step(random_batches, StepRequest(8 * step, RULES))
        before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
        for layout in [*layouts[1:], layouts[0]]:
            backend.move(configuration(8, 2, **layout))
        after = {place: tensor() for place, tensor in backend.live_state().items()}
        assert before.keys() == after.keys()
        changed += [name for (name, at), tensor in before.items() if not torch.equal(tensor, after[name, at])]
        save_checkpoint(backend, Path(folder) / kernels)
        backend.close()
    fields = [sorted(map(str, read_index(Path(folder) / kernels))) for kernels in KERNELS]
    assert fields[0] == fields[1], "a checkpoint has the same fields, whatever it was trained with"
    for written in KERNELS:
        losses.append([])
        for kernels in KERNELS:
            backend = backend_of(_job(kernels, layouts[1], model, "bf16"))
            backend.load(Path(folder) / written, 2)
            losses[-1].append(backend.train_step(random_batches, StepRequest(16, RULES)).loss)
            backend.close()
    return changed, losses


TOURS = {
    "dense": (
        FAMILIES["gpt"],
        [{"dp": 2, "zero": 1}, CUT, {"pp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2, "vp": 2, "zero": 1}],
    ),
    "experts": (
        MOE,
        [
            {"dp": 2, "ep": 2, "zero": 1},
            CUT,
            {"pp": 2},
            {"dp": 2},
            {"dp": 2, "ep": 2},
            CUT | {"ep": 2, "etp": 1},
            {"cp": 2, "zero": 1},
        ],
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["experts", pytest.param("dense", marks=pytest.mark.slow)])
def test_moves_change_no_bit_and_either_kernels_read_checkpoints_of_the_other(kind: str, tmp_path: Path) -> None:
    for changed, losses in with_transformer_engine(2, _tour, *TOURS[kind], str(tmp_path)):
        assert changed == []
        np.testing.assert_allclose(losses, losses[0][0], rtol=2e-3)


WIDE = {"hidden": 64, "ffn_hidden": 128, "head_dim": 16, "seq_len": 64}
WIDE_EXPERTS = WIDE | MOE | {"expert_hidden": 64, "shared_expert_hidden": 64}


def _long_batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 64 tokens, each four of the short ones."""
    tokens, labels = random_batches(4 * first, 4 * count)
    return tokens.view(count, 64), labels.view(count, 64)


def _eight_bit() -> list[list[float]]:
    """Losses in bf16, fp8 and mxfp8 around a move, of a dense model and of one with experts."""
    runs = []
    for model in (WIDE, WIDE_EXPERTS):
        for precision in ("bf16", "fp8", "mxfp8"):
            backend = backend_of(_job("transformer-engine", {"dp": 2, "zero": 1}, model, precision))
            losses = [backend.train_step(_long_batches, StepRequest(8 * step, RULES)).loss for step in range(3)]
            backend.move(configuration(8, 1, tp=2, sequence_parallel=True))
            losses += [backend.train_step(_long_batches, StepRequest(24 + 8 * step, RULES)).loss for step in range(3)]
            types = {str(tensor().dtype) for (name, _), tensor in backend.live_state().items() if "/" not in name}
            assert types <= {"torch.bfloat16", "torch.float32"}, "of weights: products alone are in 8 bits"
            backend.close()
            runs.append(losses)
    return runs


@pytest.mark.dist
@pytest.mark.slow
def test_products_of_eight_bits_train_nearly_as_those_of_bf16() -> None:
    runs = with_transformer_engine(2, _eight_bit)[0]
    for bf16, *eight_bit in (runs[:3], runs[3:]):
        for losses in eight_bit:
            assert losses != bf16, "products are rounded"
            np.testing.assert_allclose(losses, bf16, rtol=1e-2)
            assert losses[-1] < losses[0]
