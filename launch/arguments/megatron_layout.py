"""The cluster and the layout that Megatron-LM's arguments, and what starts it, describe."""

import math
from typing import Any

from copus.backends.registry import find_backend
from copus.job import JobError
from launch.arguments.command_line import CommandLine
from launch.arguments.given_arguments import GivenArguments
from profiles.layout import Layout

_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
"""`--data-parallel-sharding-strategy` of Megatron-FSDP, by ZeRO stage."""


def read_layout(given: GivenArguments, command: CommandLine) -> int:
    """Fill the cluster section and the layout. Returns the data parallel degree.

    Raises JobError if the accelerators are no whole number of replicas.
    """
    tp = given.whole("--tensor-model-parallel-size") or 1
    pp = given.whole("--pipeline-model-parallel-size") or 1
    cp = given.whole("--context-parallel-size") or 1
    ep = given.whole("--expert-model-parallel-size") or 1
    etp = given.whole("--expert-tensor-parallel-size") or tp
    world = _cluster(given, command, smallest=pp * math.lcm(tp * cp, etp * ep))
    if world % (tp * pp * cp):
        raise JobError(
            f"{world} accelerators ÷ (tp {tp} × pp {pp} × cp {cp}) = {world / (tp * pp * cp):g}, not a whole number of "
            "replicas: --set cluster.nodes=N gives their number"
        )
    if cp > 1 and not _runs(given, "cp", cp, "--context-parallel-size", "its ranks are data parallel here"):
        cp = 1
    layout: dict[str, Any] = {"tp": tp, "pp": pp, "dp": world // (tp * pp * cp)}
    if cp > 1:
        layout["cp"] = cp
    if ep > 1 and _runs(given, "ep", ep, "--expert-model-parallel-size", "every rank has all experts here"):
        layout["ep"] = ep
    _expert_tensor_parallel(given, layout)
    if (chunks := _chunks(given, pp)) > 1:
        layout["vp"] = chunks
    if given.flag("--sequence-parallel"):
        if tp > 1:
            layout["sequence_parallel"] = True
        else:
            given.leave("--sequence-parallel", "is not needed", "there is none without tensor parallelism")
    _recompute(given, layout)
    _sharding(given, layout)
    given.job.put("training.layout", layout)
    if given.flag("--overlap-grad-reduce"):
        given.job.put("training.overlap_grad_reduce", True)
    return int(layout["dp"])


def _cluster(given: GivenArguments, command: CommandLine, smallest: int) -> int:
    """Number of accelerators; as few as the layout fills, if nothing tells."""
    put, nodes, per_node = given.job.put, command.nodes or 1, command.per_node
    if per_node is None:
        per_node = -(-smallest // nodes) if command.nodes else min(smallest, 8)
        nodes = -(-smallest // per_node)
        put("cluster.nodes", nodes)
        given.job.assume("cluster.accelerators_per_node", per_node, "as few as the layout fills; nothing tells")
    else:
        put("cluster.nodes", nodes)
        put("cluster.accelerators_per_node", per_node)
    given.job.assume("cluster.accelerator", "h100-sxm", "no argument names it")
    return nodes * per_node


def _expert_tensor_parallel(given: GivenArguments, layout: dict[str, Any]) -> None:
    """How many ranks split each expert. Megatron-LM takes degrees here that the backend does not run."""
    argument, tp = "--expert-tensor-parallel-size", layout["tp"]
    etp = given.whole(argument) or tp
    if etp == tp or not given.whole("--num-experts"):
        return
    instead = "experts are split as all else is"
    if tp % etp:
        given.leave(argument, "is lost", f"tp({tp}) ÷ etp({etp}) is not whole: {tp / etp:g}; {instead}")
        return
    try:
        find_backend("megatron").check_layout(Layout.model_validate({**layout, "etp": etp}))
    except ValueError as error:
        given.leave(argument, "is lost", f"{error}; {instead}")
    else:
        layout["etp"] = etp


def _runs(given: GivenArguments, degree: str, size: int, argument: str, instead: str) -> bool:
    """Whether the backend has a kind of parallelism. If not, the argument is reported."""
    try:
        find_backend("megatron").check_layout(Layout.model_validate({"dp": size, degree: size}))
    except ValueError as error:
        given.leave(argument, "is lost", f"{error}; {instead}")
        return False
    return True


def _chunks(given: GivenArguments, pp: int) -> int:
    """Model chunks of a pipeline stage."""
    chunks, layers = (
        given.whole("--num-virtual-stages-per-pipeline-rank"),
        given.whole("--num-layers-per-virtual-pipeline-stage"),
    )
    total = given.job.values.get("model", {}).get("layers")
    if layers and total:
        if total % (pp * layers):
            raise JobError(
                f"--num-layers-per-virtual-pipeline-stage {layers}: {total} layers ÷ (pp {pp} × {layers}) = "
                f"{total / (pp * layers):g}, not a whole number of chunks"
            )
        chunks = total // (pp * layers)
    return chunks if chunks and pp > 1 else 1


def _recompute(given: GivenArguments, layout: dict[str, Any]) -> None:
    kind = given.text("--recompute-granularity")
    if given.flag("--recompute-activations") and kind is None:
        kind = "selective"
    if kind in ("selective", "full"):
        layout["recompute"] = kind
    for name, usual, reason in (
        ("--recompute-method", "uniform", "full recomputation is of every layer"),
        ("--recompute-num-layers", "1", "full recomputation is of every layer"),
        ("--recompute-modules", "core_attn", "selective recomputation is of attention"),
    ):
        given.leave(name, "is not needed" if given.text(name) == usual else "is lost", reason)


def _sharding(given: GivenArguments, layout: dict[str, Any]) -> None:
    if given.flag("--use-distributed-optimizer"):
        layout["zero"] = 1
    if given.flag("--use-torch-fsdp2"):
        given.job.put("training.backend", "fsdp", "--use-torch-fsdp2")
        layout["zero"] = 3
    strategy = given.text("--data-parallel-sharding-strategy") or "no_shard"
    if "--use-megatron-fsdp" in given:
        if strategy != "no_shard":
            layout["zero"] = 1
        stage = _STRATEGIES.index(strategy) if strategy in _STRATEGIES else 0
        further = f"; training.backend: fsdp has stage {stage}" if stage > 1 else ""
        given.leave("--use-megatron-fsdp", "is lost", f"the optimizer's state alone is shared out here{further}")
