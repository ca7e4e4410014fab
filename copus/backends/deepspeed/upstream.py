"""What is changed in DeepSpeed 0.19, and why. Imported before the rest of it."""

import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"  # the job's, whatever a shell says

import deepspeed
from deepspeed.runtime import bf16_optimizer, compiler
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups
from deepspeed.utils.debug import debug_clear_module_and_param_names

from copus.collectives import no_agreement

# Whenever DeepSpeed builds ZeRO it imports its Muon, which has functions compiled: the compiler alone is seconds of
# imports on every rank. No job here uses that Muon, so its functions stay as they are.
_compile, compiler.compile = compiler.compile, lambda: lambda function: function
from deepspeed.runtime.zero.muon import muon_optimizer as muon_optimizer  # noqa: E402

compiler.compile = _compile

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

    is_whole = False
    """Whether its constructor has come to the end."""

    def __init__(self, owner: Any, **options: Any) -> None:
        """Becomes `owner.engine` at once: what a constructor that fails has made can then be destroyed."""
        owner.engine = self
        super().__init__(**options)
        self.is_whole = True

    def _broadcast_model(self) -> None:
        pass


class Partitioner(Init):
    """Cuts parameters for ZeRO 3 where they stand, whatever is in them."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def init_groups(backend: str, timeout: timedelta) -> None:
    """Let DeepSpeed use the process group that there is, and make its own one of all ranks. Collective. Raises
    MidCollectiveError if this rank cannot make it, since the others may wait for it.

    `timeout` is how long a collective waits for the others. DeepSpeed gives its groups none, and torch then takes 30
    minutes, in which nobody notices that a rank hangs.
    """
    sys.modules["deepspeed.comm.torch"].TorchBackend.new_group = lambda self, ranks: dist.new_group(
        ranks, timeout=timeout
    )
    with no_agreement():
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
        groups._clone_world_group()


def drop_groups(broken: bool) -> None:
    """Forget DeepSpeed's process groups; unless a step has broken them, destroy them first."""
    group = groups._WORLD_GROUP
    if group is not None and not broken:
        dist.destroy_process_group(group)
    groups._release_process_group_references()


def destroy_engine(engine: Engine, model: Any) -> None:
    """Let go of an engine, also of one whose constructor failed, and of its model.

    ZeRO 3 makes classes of autograd functions for every module. They outlive it, and refer to the module and, through
    it, to everything else: what they refer to is emptied.
    """
    optimizer = getattr(engine, "optimizer", None)
    if engine.is_whole:
        engine.destroy()
    else:  # the wrapper around the optimizer is known to nobody but the parameters, in circles Python cannot see
        debug_clear_module_and_param_names()
        for param in model.parameters():
            vars(param).clear()
            if param._post_accumulate_grad_hooks:
                param._post_accumulate_grad_hooks.clear()
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is not None:
        parameter_offload.FWD_MODULE_STACK.clear()
        for owner in (*model.parameters(), *list(model.modules()), offload, optimizer, engine):
            vars(owner).clear()
