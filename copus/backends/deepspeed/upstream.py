"""What is changed in DeepSpeed 0.19, and why. Imported before the rest of it."""

import logging
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# On a CPU the first process compiles collectives in shared memory, for minutes and with the others waiting, and leaves
# a lock behind if it is killed. They serve inference; training goes through the process groups anyway.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
# Ranks compare the order of their modules. It is the same, and in a world of one process (`copus.profiling.solo`) there
# is no rank 0 to compare with.
partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # prints in every build, whatever the log level


class Engine(DeepSpeedEngine):
    """An engine whose weights are filled after it is made: nothing is broadcast before."""

    def _broadcast_model(self) -> None:
        pass


class Partitioner(Init):
    """Cuts parameters for ZeRO 3 where they stand, whatever is in them."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def init_distributed(backend: str) -> None:
    """Let DeepSpeed use the process group that there is."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)


def drop_groups(broken: bool) -> None:
    """Forget DeepSpeed's process groups; unless a step has broken them, destroy them first."""
    group = groups._WORLD_GROUP
    if group is not None and not broken:
        dist.destroy_process_group(group)
    groups._release_process_group_references()


def destroy_engine(engine: Engine) -> None:
    """Let go of an engine and its model.

    ZeRO 3 makes classes of autograd functions for every module. They outlive it, and refer to the module and, through
    it, to everything else: what they refer to is emptied.
    """
    model, optimizer = engine.module, engine.optimizer
    engine.destroy()
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is not None:
        parameter_offload.FWD_MODULE_STACK.clear()
        for owner in (*model.parameters(), *list(model.modules()), offload, optimizer, engine):
            vars(owner).clear()
