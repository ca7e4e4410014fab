"""Optimizer state of Megatron-LM's checkpoints: what megatron-core's optimizers save, every backend goes on with."""

import collections
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.checkpoints.safe_loading import load_plain_values
from copus.checkpoints.sharded import Chunk, write_index
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.weights.families import state_shape
from copus.weights.megatron_lm import read_megatron, read_step_count
from copus.weights.saved import begin
from copus.weights.source import find_source
from launch.weights import check_weights
from profiles.layout import Layout
from tests.pretrained import save_tiny
from tests.ranks import own_device, run_ranks
from tests.test_hf_weights import all_tensors, job_from
from tests.test_megatron_lm_weights import megatron_model

LR, BETAS, EPSILON = 1e-2, (0.8, 0.96), 1e-8


def _save(folder: Path, job: JobConfig, sharding: str | None) -> None:
    """Two data parallel ranks of megatron-core, with half of the experts each, make one step, in which every gradient
    is the weight, and save."""
    cpu.before_import()
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from copus.backends.megatron import groups

    layout = Layout(dp=2, ep=2 if job.model.experts else 1, zero=1 if sharding else 0)
    groups.make_groups(layout, 60)
    bf16 = job.training.precision == "bf16"
    network = megatron_model(job, 384, layout)
    source = all_tensors(folder.parent / "model")
    network.load_state_dict(_megatron_tensors(job, network, source), strict=False)
    network = network.bfloat16() if bf16 else network
    reduce = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharding is not None)
    wrapped = DistributedDataParallel(network.config, reduce, network)
    settings = OptimizerConfig(
        **{"optimizer": "adam", "lr": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_eps": EPSILON},
        **{"weight_decay": 0.0, "clip_grad": 0.0, "bf16": bf16, "use_distributed_optimizer": sharding is not None},
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    for weight in network.parameters():
        weight.main_grad.copy_(weight.data)
    optimizer.step()
    model = network.sharded_state_dict()
    metadata = {"chained_optim_avoid_prefix": True} | ({"distrib_optim_sharding_type": sharding} if sharding else {})
    state = {"iteration": 1, "optimizer": optimizer.sharded_state_dict(model, metadata=metadata)}
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(model | state, str(folder))
    groups.leave_groups()
    groups.destroy_groups()


def _megatron_tensors(job: JobConfig, network: Any, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a folder under Megatron's names; rows that pad the vocabulary are 7."""
    from copus.weights.megatron_names import hugging_face_parts

    tensors = {}
    first_expert = job.model.experts // 2 * dist.get_rank()
    for local_name, weight in network.named_parameters():
        tensors[local_name] = torch.full_like(weight, 7.0)
        name = re.sub(r"(?<=local_experts\.)\d+", lambda match: str(int(match[0]) + first_expert), local_name)
        for part in hugging_face_parts(name, tuple(weight.shape), Box.whole(tuple(weight.shape)), job.model):
            stored = source[part.name].float()
            length = min(part.box.shape[0], len(stored) - part.offset[0])
            first = part.box.offset[0]
            tensors[local_name][first : first + length] = stored[part.offset[0] : part.offset[0] + length]
    return tensors


def _expected(weight: torch.Tensor, statistic: str) -> torch.Tensor:
    """After one step from this weight, with the weight as the gradient."""
    if statistic == "exp_avg":
        return (1 - BETAS[0]) * weight
    if statistic == "exp_avg_sq":
        return (1 - BETAS[1]) * weight**2
    return weight - LR * weight / (weight.abs() + EPSILON)


def _errors(folder: Path, job: JobConfig) -> dict[str, float]:
    """Largest differences of this rank's shards from what they should be, by statistic."""
    from copus.backends.registry import find_backend

    backend = find_backend(job.training.backend).load()(job, own_device())
    state = begin(job, backend)
    assert (state.optimizer_steps, backend.optimizer_steps, state.step, state.samples_consumed) == (1, 1, 0, 0)
    assert state.beta2_product == pytest.approx(BETAS[1])
    source = all_tensors(folder)
    errors: dict[str, float] = {}
    for (name, offset), read in backend.live_state().items():
        weight, _, statistic = name.partition("/")
        whole = source[weight].float()
        padding = state_shape(weight, tuple(whole.shape), job.model)[0] - len(whole)
        whole = torch.cat([whole, torch.zeros(padding, *whole.shape[1:])])
        tensor = read().float()
        box = Box(offset, tuple(tensor.shape))
        difference = tensor - _expected(whole, statistic)[box.slices_in(Box.whole(tuple(whole.shape)))]
        errors[statistic] = max(errors.get(statistic, 0.0), difference.abs().max().item())
    backend.close()
    return errors


GO_ON: dict[str, tuple[tuple[str, dict[str, Any], str], ...]] = {
    "qwen3": (
        ("megatron", {"tp": 2}, "fp32"),
        ("megatron", {"dp": 2, "zero": 1}, "bf16"),
        ("fsdp", {"dp": 2, "zero": 3}, "bf16"),
    ),
    "qwen3_moe": (
        ("megatron", {"tp": 2, "sequence_parallel": True}, "fp32"),
        ("megatron", {"dp": 2, "ep": 2, "zero": 1}, "bf16"),
    ),
}
"""Where training goes on, by family: on the backends that train it."""


def _through_copus(folder: Path, family: str, precision: str, sharding: str | None) -> dict[str, dict[str, float]]:
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]  # Megatron calls it on a CPU too
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    saved = folder / "saved"
    _save(saved, job_from(folder / "model", precision=precision), sharding)
    results = {}
    for backend, layout, own in GO_ON[family] if sharding != "dp_reshardable" else ():
        settings = {"init_from": str(saved), "init_optimizer": True, "precision": own}
        job = job_from(folder / "model", backend, layout, **settings)
        results[f"{backend} {layout} {own}"] = _errors(folder / "model", job)
    return results


@pytest.mark.dist
@pytest.mark.parametrize(
    ("family", "precision", "sharding"),
    [
        ("qwen3", "bf16", "fully_reshardable"),
        ("qwen3_moe", "bf16", "fully_reshardable"),
        pytest.param("qwen3", "bf16", None, marks=pytest.mark.slow),
        pytest.param("qwen3", "fp32", None, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "fp32", None, marks=pytest.mark.slow),
    ],
)
def test_moments_masters_and_steps_of_megatron_go_on_in_any_layout(
    family: str, precision: str, sharding: str | None, tmp_path: Path
) -> None:
    """Saved by the distributed optimizer and by the plain ones of bf16 and fp32. The weights of the folder have the
    digits of bf16, so that every number is known."""
    save_tiny(family, tmp_path / "model", torch.bfloat16)
    for errors_of in run_ranks(2, _through_copus, tmp_path, family, precision, sharding):
        assert len(errors_of) == len(GO_ON[family])
        for name, errors in errors_of.items():
            assert {"exp_avg", "exp_avg_sq"} <= errors.keys(), name
            for statistic, error in errors.items():
                assert error < (2e-2 if statistic == "" and "bf16" in name else 1e-6), (name, statistic)


@pytest.mark.dist
@pytest.mark.slow
def test_the_usual_format_of_the_distributed_optimizer_is_refused_and_its_weights_are_read(tmp_path: Path) -> None:
    model = job_from(save_tiny("qwen3", tmp_path / "model", torch.bfloat16)).model
    run_ranks(2, _through_copus, tmp_path, "qwen3", "bf16", "dp_reshardable")
    read_megatron(tmp_path / "saved", model)
    with pytest.raises(JobError, match="in the format dp_reshardable, which is not read: load it in Megatron-LM and"):
        read_megatron(tmp_path / "saved", model, with_optimizer=True)


def test_optimizer_state_that_is_not_there_or_flattened_is_refused_in_a_line(tmp_path: Path) -> None:
    model = job_from(save_tiny("llama", tmp_path / "model")).model

    def index(**shapes: tuple[int, ...]) -> None:
        fields = {name.replace("__", "."): shape for name, shape in shapes.items()}
        records = {
            Field(name, "float32", shape): [Chunk(Box.whole(shape), Box.whole(shape), "x", 0, 0)]
            for name, shape in fields.items()
        }
        write_index(tmp_path, [records])

    embedding = {"embedding__word_embeddings__weight": (130, 32)}
    index(**embedding)
    with pytest.raises(JobError, match="has no optimizer state"):
        read_megatron(tmp_path, model, with_optimizer=True)
    index(**embedding, optimizer__state__exp_avg__embedding__word_embeddings__weight=(1, 1, 4160))
    with pytest.raises(JobError, match="fully_sharded_model_space, which is not read"):
        read_megatron(tmp_path, model, with_optimizer=True)

    with pytest.raises(JobError, match=r"init_optimizer\(true\): .* is a Hugging Face folder, which has weights"):
        check_weights(job_from(tmp_path / "model", init_optimizer=True), notice=lambda line: None)
    job = job_from(tmp_path / "model")
    training = job.training.model_copy(update={"init_optimizer": True, "init_from": None})
    with pytest.raises(JobError, match=r"init_optimizer\(true\) needs training.init_from"):
        check_weights(job.model_copy(update={"training": training}), notice=lambda line: None)
    assert find_source(tmp_path / "model").kind == "hugging_face"


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_the_step_count_is_read_without_running_code_of_the_file(tmp_path: Path) -> None:
    group = {"step": 12.0, "betas": (0.9, 0.95), "params": _Evil()}
    torch.save({"args": _Evil(), "optimizer": {0: {"optimizer": {"param_groups": [group]}}}}, tmp_path / "common.pt")
    assert read_step_count(tmp_path) == (12, 0.95)
    torch.save({"iteration": 7, "optimizer": {"param_groups": [{"betas": None}]}}, tmp_path / "common.pt")
    assert read_step_count(tmp_path) == (7, None)
    torch.save({"iteration": 7}, tmp_path / "common.pt")
    with pytest.raises(JobError, match="says no step count"):
        read_step_count(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not what torch saves"):
        load_plain_values(tmp_path / "common.pt")


class _Script(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(2)

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight, self.training = state[0], state[1]
        print("code of the file was run")

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_an_archive_of_torchscript_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.jit.save(torch.jit.script(_Script()), tmp_path / "common.pt")
    torch.jit.load(tmp_path / "common.pt")
    assert "code of the file was run" in capfd.readouterr().out, "torch runs it"
    with pytest.raises(ValueError, match="no dictionary"):
        read_step_count(tmp_path)
    assert "code of the file was run" not in capfd.readouterr().out


def test_containers_of_the_standard_library_are_passed_over(tmp_path: Path) -> None:
    torch.save(
        {"iteration": 7, "rest": collections.OrderedDict(a=1), "last": collections.deque([1])}, tmp_path / "common.pt"
    )
    assert load_plain_values(tmp_path / "common.pt")["iteration"] == 7
