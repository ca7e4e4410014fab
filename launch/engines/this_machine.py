"""What this machine cannot do for certain, refused before anything starts."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from copus.backends.registry import find_backend
from copus.job import JobConfig, JobError
from profiles.formatting import gibibytes

RANKS_PER_CORE = 8
"""More ranks than this for each core of the machine are a mistake."""
SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
"""NCCL's own switch, as in `copus.devices`, which imports torch."""


def check_this_machine(job: JobConfig) -> None:
    """Raise JobError for more ranks than it can take, for what the backend needs of a node and it lacks, for more GPUs
    than it has, and, if the ranks share the machine's memory, for a larger model than it can hold."""
    cores = os.cpu_count() or 1
    ranks = job.cluster.accelerators_per_node
    if ranks > RANKS_PER_CORE * cores:
        raise JobError(
            f"cluster.accelerators_per_node({ranks}) is more than {RANKS_PER_CORE} ranks for each of this machine's "
            f"{cores} CPU cores"
        )
    try:
        find_backend(job.training.backend).check_node(job.training)
    except ValueError as error:
        raise JobError(f"training.{error}") from None
    if job.cluster.accelerator != "cpu":
        if not _has_gpu():
            raise JobError(
                f"cluster.accelerator({job.cluster.accelerator}): this machine has no GPU; `cpu` is what runs on its "
                "cores"
            )
        gpus = _nvidia_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if gpus is not None and gpus < ranks and os.environ.get(SHARING) != "1":
            raise JobError(
                f"cluster.accelerators_per_node({ranks}) is more than the {gpus} GPUs that this machine shows "
                f"(CUDA_VISIBLE_DEVICES counts; {SHARING}=1 lets ranks share them)"
            )
        return
    memory, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), least_bytes(job)
    if needed > memory:
        raise JobError(
            f"model: {job.model.parameters} parameters with training.micro_batch({job.training.micro_batch}) × "
            f"model.seq_len({job.model.seq_len}) tokens take at least {gibibytes(needed)}, and this "
            f"machine has {gibibytes(memory)}"
        )


def check_interfaces(environment: Mapping[str, str], accelerator: str) -> None:
    """Raise JobError if gloo or, on GPUs, NCCL is told to use a network interface that this machine does not have.

    gloo takes names with commas between; NCCL takes prefixes, `=` for whole names, `^` for those to leave out.
    """
    have = [name for _, name in socket.if_nameindex()]
    named = environment.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in named.split(",") if name and name not in have]
    if missing:
        raise JobError(_no_interface("GLOO_SOCKET_IFNAME", named, missing[0], have))
    named = environment.get("NCCL_SOCKET_IFNAME", "")
    if accelerator == "cpu" or not named or named.startswith("^"):
        return
    names, exact = named.removeprefix("=").split(","), named.startswith("=")
    if not any(one == name if exact else one.startswith(name) for one in have for name in names):
        raise JobError(_no_interface("NCCL_SOCKET_IFNAME", named, names[0], have))


def own_address_towards(address: str) -> str | None:
    """This machine's IPv4 address from which it reaches another; None where that has none, or is not to be reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: the system only looks for the way
        except OSError:
            return None
        own: str = probe.getsockname()[0]
        return own


def interface_of(address: str) -> str | None:
    """The network interface that has an address of this machine's."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if any(one.address == address for one in has)), None)


def _no_interface(variable: str, named: str, missing: str, have: list[str]) -> str:
    return f"{variable}({named}): this machine has no network interface {missing}; it has {', '.join(have)}"


def _has_gpu() -> bool:
    """Whether the system knows of one, NVIDIA's, AMD's or Windows' own. Asking torch takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path(place).exists() for place in ("/dev/kfd", "/dev/dxg"))


def _nvidia_gpus(visible: str | None) -> int | None:
    """NVIDIA's GPUs that processes see, with CUDA_VISIBLE_DEVICES as it is (None: not set). None if there are none of
    that make: other makers' devices are not counted here."""
    devices = sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return None
    return devices if visible is None else sum(name.strip() not in ("", "-1") for name in visible.split(","))


def least_bytes(job: JobConfig) -> int:
    """Less memory than all ranks together can do with: weights, gradients and optimizer state, once where the
    optimizer is sharded, and the inputs of all layers and the logits of one micro-batch in each replica."""
    model, training = job.model, job.training
    replicas, kept = training.layout.dp, training.optimizer.state()
    of_optimizer = 4 * min(kept.of_matrices, kept.of_embeddings)
    of_weight = 8 if training.has_fp32_weights else 4
    state = model.parameters * (of_weight * replicas + of_optimizer * (1 if training.layout.zero else replicas))
    tokens = training.micro_batch * model.seq_len
    return state + 2 * replicas * tokens * (model.layers * model.hidden + model.padded_vocab)
