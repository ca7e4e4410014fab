"""What the memory model says, against what autograd keeps in the real Megatron model, and what FSDP allocates."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.small_batch_memory import FULL, SMALL_MODEL, predicted_bytes
from benchmarks.small_batch_memory import job_of as memory_job_of
from copus.job import JobConfig
from profiles.configurations import Configurations
from profiles.memory import MEGATRON
from profiles.memory.activations import layer_activations
from tests.megatron_jobs import backend_of, tiny_job
from tests.ranks import run_ranks

MODEL = {"hidden": 256, "ffn_hidden": 704, "heads": 4, "kv_heads": 2, "seq_len": 128, "vocab": 250}
LATENT = {
    "kv_heads": 4,
    "latent_attention": {"query_rank": 128, "kv_rank": 64, "rope_dim": 32, "value_dim": 64},
}
CASES: dict[int, list[dict[str, Any]]] = {  # by number of ranks
    1: [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "bf16", "model": {"gated_mlp": False}},
        {"precision": "bf16", "model": {"norm": "layernorm", "qk_norm": "head"}},
        {"precision": "bf16", "model": {"norm": "layernorm", "positions": "learned", "bias": "all", "head_dim": 96}},
        {"precision": "bf16", "model": {"norm": "layernorm", "norm_position": "both", "sliding_window": 32}},
        {"precision": "bf16", "model": LATENT | {"head_dim": 96}},  # values narrower than keys
        {"precision": "bf16", "model": LATENT | {"head_dim": 64}},  # as wide
        {"precision": "fp32", "layout": {"recompute": "full"}},
    ],
    2: [
        {"precision": "bf16", "layout": {"tp": 2}},
        {"precision": "bf16", "layout": {"tp": 2, "sequence_parallel": True}},
        {"precision": "bf16", "layout": {"cp": 2}},
        {"precision": "bf16", "layout": {"cp": 2, "recompute": "selective"}},
        {"precision": "bf16", "layout": {"cp": 2}, "model": {"norm": "layernorm", "qk_norm": "head"}},
    ],
}


def job_of(ranks: int, case: dict[str, Any], layers: int) -> JobConfig:
    shape = MODEL | {"layers": layers} | case.get("model", {})
    training = {"precision": case["precision"], "global_batch": 2, "micro_batch": 2}
    return tiny_job(ranks, case.get("layout"), shape, **training)


def kept_bytes(job: JobConfig) -> int:
    """Bytes of the distinct tensors that the forward pass of a micro-batch keeps on this rank, weights left out."""
    (chunk,) = backend_of(job).built.chunks
    weights = {each.untyped_storage().data_ptr() for each in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that nothing else gets its address
        return tensor

    tokens = torch.zeros((2, MODEL["seq_len"] // job.training.layout.cp), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = chunk(tokens, positions, None, labels=tokens)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def kept_by_a_layer(ranks: int) -> list[float]:
    """Of every case: half the difference of four and two layers."""
    return [(kept_bytes(job_of(ranks, case, 4)) - kept_bytes(job_of(ranks, case, 2))) / 2 for case in CASES[ranks]]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", CASES)
def test_a_layer_keeps_what_the_model_says(ranks: int) -> None:
    for case, seen in zip(CASES[ranks], run_ranks(ranks, kept_by_a_layer, ranks)[0], strict=True):
        job = job_of(ranks, case, 2)
        element = 4 if case["precision"] == "fp32" else 2
        c = Configurations.of([job.training.configuration])
        predicted = layer_activations(job.model, c, element, MEGATRON).kept[0]
        layout, tokens = job.training.layout, job.model.seq_len // job.training.layout.cp
        if layout.recompute != "full":
            # Sines and cosines of the rotary positions, for queries and keys: small, and not in the model.
            predicted += 4 * tokens * job.model.rotary_width * element * (job.model.positions == "rope")
            if job.model.norm == "rmsnorm":
                # It is not one kernel on a CPU: it keeps its input, and that over its root mean square, in fp32.
                split = layout.tp if layout.sequence_parallel else 1
                widths = 2 * job.model.hidden
                if latent := job.model.latent_attention:
                    widths += latent.query_rank + latent.kv_rank
                    # What the keys' rotated part lies in is not kept beside that copy.
                    predicted -= 2 * tokens * latent.rope_dim * element
                predicted += (4 + 4 - element) * 2 * tokens * widths / split
        assert seen == pytest.approx(predicted, rel=0.01), case


LAYOUTS: list[dict[str, Any]] = [{"dp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 2}, {"dp": 2, "zero": 3}, {"tp": 2}]


def fsdp_cases() -> list[JobConfig]:
    """With fp32 masters and without; with one micro-batch and with two, whose gradients are added up."""
    return [
        memory_job_of(
            FULL[case] | {"layout": layout, "global_batch": count * layout.get("dp", 1)},
            SMALL_MODEL,
            "fsdp",
            ranks=2,
        )
        for case in ("SGD", "SGD, bf16 weights alone")
        for layout in LAYOUTS
        for count in (1, 2)
    ]


def fsdp_peaks() -> list[int]:
    """The smaller one of two, since gloo's threads sometimes let go of a buffer late."""
    from benchmarks.small_batch_memory_cases import full, peak_of

    return [min(peak_of(full(job), 2)["allocated_bytes"] for _ in range(2)) for job in fsdp_cases()]


@pytest.mark.dist
@pytest.mark.slow
def test_fsdp_allocates_what_the_model_says_with_every_zero_stage() -> None:
    peaks = np.min(run_ranks(2, fsdp_peaks, timeout_seconds=500), axis=0)
    for job, seen in zip(fsdp_cases(), peaks, strict=True):
        training = job.training
        assert sum(predicted_bytes(job).values()) == pytest.approx(seen, rel=0.1), (
            training.layout,
            training.global_batch,
        )
