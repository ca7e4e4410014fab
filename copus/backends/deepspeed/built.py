"""A DeepSpeed engine on one rank: how it is made, what it consists of, and how to let go of it."""

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.adamw import adam_state
from copus.backends.deepspeed.gradients import BIASES, MATRICES, NORMS
from copus.backends.deepspeed.partitions import Groups
from copus.backends.deepspeed.upstream import DeepSpeedConfig, Engine, Partitioner, destroy_engine, init_groups
from copus.backends.huggingface import build_causal_lm, restore_rotary_frequencies
from copus.collectives import no_agreement, run_on_all_ranks
from copus.job import JobConfig
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape

_BUCKET = 50_000_000
"""Most gradients that are reduced at once: 200 MB in fp32."""


@dataclass
class BuiltModel:
    """What a layout consists of on this rank. A build that fails half-way lacks the last of it."""

    device: torch.device
    layout: Layout
    model: Any = None
    groups: list[dict[str, torch.nn.Parameter]] = field(default_factory=list)
    """The parameters of each group, by name."""
    adam: torch.optim.AdamW | None = None
    """The optimizer that DeepSpeed drives. Its parameters are the model's, or this rank's flat buffers of masters."""
    engine: Any = None
    part_norms: Any = None
    """What the noise is measured with."""
    has_gradients: bool = False
    """Whether gradients are there that no update has used: after a step that was skipped."""

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's wrapper around the optimizer; with ZeRO 0 there is none, and it is the optimizer itself."""
        return self.engine.optimizer

    @property
    def flat_masters(self) -> list[torch.Tensor]:
        """This rank's flat buffer of fp32 weights of each group; ZeRO 1 to 3."""
        wrapper = self.zero_optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            if hasattr(wrapper, name):
                return getattr(wrapper, name)
        raise AttributeError(f"{type(wrapper).__name__} of this version of DeepSpeed has no flat masters")

    @property
    def flat_weights(self) -> list[torch.Tensor]:
        """What the model computes with of the same ranges."""
        wrapper, rank = self.zero_optimizer, dist.get_rank()
        if self.layout.zero == 3:
            return wrapper.fp16_partitioned_groups_flat
        name = "bf16_partitioned_groups"
        cut = getattr(wrapper, name if hasattr(wrapper, name) else "parallel_partitioned_bit16_groups")
        return [parts[rank] for parts in cut]

    @property
    def optimized(self) -> list[torch.Tensor]:
        """The tensors that the optimizer has a state for."""
        if self.layout.zero:
            return self.flat_masters
        return [param for group in self.groups for param in group.values()]

    def release(self) -> None:
        """Let go of the memory: engine, model and hooks refer to each other in circles."""
        if self.part_norms is not None:
            self.part_norms.close()
        if self.engine is not None:
            destroy_engine(self.engine, self.model)


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict[str, torch.nn.Parameter]]:
    """Parameters by group and name."""
    groups: list[dict[str, torch.nn.Parameter]] = [{}, {}, {}]
    for name, param in named:
        groups[BIASES if name.endswith("bias") else NORMS if "norm" in name else MATRICES][name] = param
    return [group for group in groups if group]


@functools.lru_cache(maxsize=4)
def parameter_shapes(shape: ModelShape) -> Groups:
    """Shapes of the parameters of each group, without memory for them."""
    model = build_causal_lm(shape, torch.float32, torch.device("meta"), None)
    return [
        {name: tuple(param.shape) for name, param in group.items()}
        for group in parameter_groups(model.named_parameters())
    ]


def build(built: BuiltModel, job: JobConfig, configuration: Configuration) -> None:
    """Make model, optimizer and engine, with weights that are still to be filled. What fails leaves behind in `built`
    what there was until then. Collective.

    Raises RankError on all ranks if one of them cannot make the model, and MidCollectiveError if this rank cannot make
    the engine while the others may wait for it.
    """
    init_groups(dist.get_backend(), timedelta(seconds=job.launch.timeout_seconds))
    config = engine_config(job, configuration)
    # With ZeRO 3 the ranks wait for each other in the engine's constructor: one that has no memory for the model must
    # say so before, and one that fails in there must end. With ZeRO 0 to 2 all can still agree after it.
    run_on_all_ranks(lambda: _make_model(built, job, config))
    assert built.adam is not None, "it is made with the model"
    with no_agreement() if built.layout.zero == 3 else nullcontext():
        Engine(
            built,
            args=None,
            model=built.model,
            optimizer=built.adam,
            model_parameters=[param for group in built.groups for param in group.values()],
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config),
        )
    for tensor in built.optimized:
        adam_state(built.adam, tensor)


def _make_model(built: BuiltModel, job: JobConfig, config: dict[str, Any]) -> None:
    """Make the model and torch's optimizer. Not collective."""
    layout, device = built.layout, built.device
    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    if layout.zero == 3:
        built.model = build_causal_lm(job.model, dtype, torch.device("meta"), None, layout.recompute)
        partitioner = Partitioner(config_dict_or_path=config, dtype=dtype)
        _cut(built.model, partitioner, job.model.tied_embeddings, device)
    else:
        built.model = build_causal_lm(job.model, dtype, device, None, layout.recompute)
    built.groups = parameter_groups(built.model.named_parameters())
    # DeepSpeed may make a step to see the optimizer's state: at a learning rate of 0 it changes nothing.
    groups = [{"params": list(group.values())} for group in built.groups]
    built.adam = torch.optim.AdamW(groups, lr=0.0, fused=True)


def engine_config(job: JobConfig, configuration: Configuration) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping, learning rates and the boundaries of steps are copus's."""
    layout, training = configuration.layout, job.training
    in_bf16 = training.precision == "bf16"
    zero: dict[str, Any] = {
        "stage": layout.zero,
        "overlap_comm": training.overlap_grad_reduce,
        "reduce_bucket_size": min(_BUCKET, job.model.parameters),
        # one flat buffer for each group of parameters
        "sub_group_size": 10**15,
        # a gathered copy that outlives a step would be stale after a move
        "stage3_param_persistence_threshold": 0,
        # the norm is computed where the step's other figures are
        "compute_grad_norm": not (layout.zero == 2 or (layout.zero == 1 and not in_bf16)),
    }
    if layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": configuration.micro_batch,
        "gradient_accumulation_steps": configuration.num_microbatches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW is vectorised on the host too; DeepSpeed's would be compiled at the first start
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": in_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }


def _cut(model: Any, partitioner: Partitioner, tied_embeddings: bool, device: torch.device) -> None:
    """Give a model on meta memory, module by module, and keep this rank's part of each parameter."""
    for module in model.modules():
        if not (tied_embeddings and module is model.lm_head):
            module.to_empty(device=device, recurse=False)
            partitioner._convert_to_zero_parameters(module.parameters(recurse=False))
    model.tie_weights()
    restore_rotary_frequencies(model)
