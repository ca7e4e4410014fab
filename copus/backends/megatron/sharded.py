"""Megatron's own description of who holds which part of which tensor: the basis of initialisation, checkpoints and
moves."""

from typing import Any

from copus.backends.megatron import cpu

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402


def metadata() -> dict[str, Any]:
    """How state is described: optimizer state in the shape of the parameters, so that any layout can read it.

    The default sharding of the distributed optimizer, `fully_sharded_model_space`, raises in 0.16.1.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside data parallelism and bf16 wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def state_dict(chunks: list[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    """Weights and, where `optimizer` is given, optimizer state of this rank, as megatron's sharded tensors.

    The keys are the same whatever the virtual pipeline, so that checkpoints fit every layout.
    """
    described = metadata()
    models = {
        f"model{index}" if len(chunks) > 1 else "model": unwrap(chunk).sharded_state_dict(metadata=described)
        for index, chunk in enumerate(chunks)
    }
    state: dict[str, Any] = dict(models)
    if optimizer is not None:
        of_models = models if len(chunks) > 1 else models["model"]
        state["optimizer"] = optimizer.sharded_state_dict(of_models, is_loading=is_loading, metadata=described)
    return state


def model_tensors(chunk: Any) -> list[ShardedTensor]:
    """The weights of one model chunk; each `data` is the live weight or, for gate and up of a SwiGLU, a view of its
    half."""
    state = unwrap(chunk).sharded_state_dict(metadata=metadata())
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
