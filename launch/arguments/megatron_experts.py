"""The experts and the router that Megatron-LM's arguments describe."""

import re

from launch.arguments.given_arguments import GivenArguments

_FIRST_DENSE = re.compile(r"\(?\[0\](?:\*(\d+))?\+\[1\](?:\*\d+)?\)?")
"""`--moe-layer-freq "([0]*3+[1]*58)"`: layers without experts come first."""
_BALANCED_OVER = {"seq_aux_loss": "sequence", "aux_loss": "micro-batch"}
_OF_THE_ROUTER = (
    ("scores", "--moe-router-score-function"),
    ("groups", "--moe-router-num-groups"),
    ("groups_per_token", "--moe-router-group-topk"),
    ("scale", "--moe-router-topk-scaling-factor"),
    ("z_loss", "--moe-z-loss-coeff"),
)


def dense_layers(given: GivenArguments) -> int:
    """First layers without experts. Another pattern of layers is reported."""
    pattern = given.text("--moe-layer-freq")
    first = _FIRST_DENSE.fullmatch((pattern or "").replace(" ", "").strip("'\""))
    if first:
        return int(first[1] or 1)
    if pattern not in (None, "1"):
        given.leave("--moe-layer-freq", "changes the training", "all layers have experts")
    return 0


def read_experts(given: GivenArguments, experts: int) -> None:
    """Fill the fields of experts and their router, but for their width."""
    put = given.job.put
    put("model.experts", experts)
    given.put("model.experts_per_token", "--moe-router-topk", given.whole("--moe-router-topk"), 2)
    if shared := given.whole("--moe-shared-expert-intermediate-size"):
        put("model.shared_expert_hidden", shared)
    if (capacity := given.real("--moe-expert-capacity-factor")) is not None:
        put("model.capacity_factor", capacity)
    dispatcher = given.text("--moe-token-dispatcher-type")
    if dispatcher == "flex":
        given.leave("--moe-token-dispatcher-type", "is not needed", "tokens come to their experts by alltoall")
    else:
        put("training.expert_dispatch", dispatcher or "allgather")
    _read_router(given)


def _read_router(given: GivenArguments) -> None:
    router = {}
    for field, name in _OF_THE_ROUTER:
        value = given.text(name) if field == "scores" else given.real(name)
        if value is not None:
            router[field] = int(value) if field.startswith("groups") else value
    if given.flag("--moe-router-pre-softmax") and router.get("scores") != "sigmoid":
        router["normalized"] = False
    rate = given.real("--moe-router-bias-update-rate")
    if given.flag("--moe-router-enable-expert-bias"):
        router["bias_update_rate"] = 1e-3 if rate is None else rate
    balance, coefficient = (
        given.text("--moe-router-load-balancing-type") or "aux_loss",
        given.real("--moe-aux-loss-coeff"),
    )
    router["aux_loss"] = coefficient or 0.0
    if balance in _BALANCED_OVER:
        router["aux_loss_over"] = _BALANCED_OVER[balance]
    else:
        router["aux_loss"] = 0.0
        if balance != "none":
            given.leave(
                "--moe-router-load-balancing-type", "changes the training", "no loss spreads tokens over experts"
            )
    given.job.put("model.router", router)
