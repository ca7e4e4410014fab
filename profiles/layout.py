"""Where the model lies: the degrees of each kind of parallelism."""

from typing import Literal

from pydantic import Field, model_validator

from profiles.cluster import Cluster
from profiles.model_shape import ModelShape
from profiles.record import PositiveInt, Record

Recompute = Literal["none", "selective", "full"]
"""What of the forward pass is run again in the backward pass: nothing, attention, every layer."""
ContextExchange = Literal["gathered", "ring"]
"""How context parallel ranks get the keys and values of all tokens: gathered, or piece by piece from a neighbour."""
ExpertDispatch = Literal["alltoall", "allgather", "flex"]
"""How tokens come to experts on other ranks, by megatron-core's names. alltoall: a copy for each of a token's experts.
allgather: every token to all ranks of the group. flex (DeepEP, HybridEP): once to a node, there once to each rank."""


class Layout(Record):
    """Degrees of parallelism, in the usual order: tensor, context, data, pipeline (tensor innermost)."""

    tp: PositiveInt = 1
    """Tensor parallel degree."""
    pp: PositiveInt = 1
    """Pipeline parallel degree."""
    vp: PositiveInt = 1
    """Virtual pipeline: model chunks per pipeline stage (1 = plain 1F1B)."""
    cp: PositiveInt = 1
    """Context parallel degree: so many ranks split each sequence, in 2·cp pieces of which every rank has an early and a
    late one."""
    ep: PositiveInt = 1
    """Expert parallel degree: groups of ep data and context parallel ranks split the experts."""
    etp: PositiveInt | None = Field(default=None, json_schema_extra={"default_in_words": "tp"})
    """Tensor parallel degree of the experts: so many ranks split the matrices of each expert. Less than tp lets tensor
    parallel ranks hold different experts: groups of etp · ep ranks share all of them out."""
    dp: PositiveInt = 1
    """Data parallel degree."""
    sequence_parallel: bool = False
    """Split the activations outside of matrix products over the tensor parallel ranks (needs tp > 1)."""
    recompute: Recompute = "none"
    """Activation recomputation: none, attention only, or every layer."""
    zero: Literal[0, 1, 2, 3] = 0
    """State that data parallel ranks split: 0 nothing, 1 optimizer state (Megatron's distributed optimizer), 2
    gradients, 3 weights."""
    dp_replicate: PositiveInt = 1
    """Copies of the state that `zero` splits: every dp ÷ dp_replicate ranks, at least 2, hold one together. 1: all data
    parallel ranks hold one. More is hybrid sharding (HSDP), which gathers and scatters over fewer ranks and needs more
    memory."""
    offload_optimizer: bool = False
    """Keep the optimizer state and the reduced gradients in the host's memory, and update the weights there. Saves
    accelerator memory, and makes every step longer."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "Layout":
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel(true) needs tp > 1, but tp = 1")
        if self.tp % self.expert_tp:
            raise ValueError(f"tp({self.tp}) ÷ etp({self.etp}) is not whole: {self.tp / self.expert_tp:g}")
        if self.etp == self.tp:  # one layout is one value, however it was written
            object.__setattr__(self, "etp", None)
        if self.vp > 1 and self.pp == 1:
            raise ValueError(f"vp({self.vp}) needs pp > 1, but pp = 1")
        if self.dp % self.dp_replicate:
            raise ValueError(
                f"dp({self.dp}) ÷ dp_replicate({self.dp_replicate}) is not whole: {self.dp / self.dp_replicate:g}"
            )
        if self.dp_replicate > 1 and self.zero == 0:
            raise ValueError(f"dp_replicate({self.dp_replicate}) needs zero > 0: with zero = 0 nothing is shared out")
        if 1 < self.dp_replicate == self.dp:
            raise ValueError(
                f"dp_replicate({self.dp_replicate}) leaves dp({self.dp}) ÷ dp_replicate = 1 rank for each copy, which "
                "shares nothing out: more data parallel ranks, or zero: 0"
            )
        return self

    @property
    def accelerators(self) -> int:
        """Ranks that the layout takes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that split the matrices of each expert."""
        return self.etp or self.tp

    @property
    def dp_shard(self) -> int:
        """Data parallel ranks that hold one copy of what `zero` shares out: 1 where it shares out nothing."""
        return self.dp // self.dp_replicate if self.zero else 1

    @property
    def label(self) -> str:
        """Short name for people: `TP2·PP1·DP4`, with the less usual degrees only where they are not 1."""
        degrees = [("TP", self.tp), ("PP", self.pp), ("DP", self.dp)]
        degrees += [(name, value) for name, value in (("VP", self.vp), ("CP", self.cp), ("EP", self.ep)) if value > 1]
        degrees += [("ETP", self.etp)] if self.etp else []
        extras = ["SP"] * self.sequence_parallel + [f"Z{self.zero}"] * (self.zero > 0)
        extras += [f"HSDP{self.dp_replicate}×{self.dp_shard}"] * (self.dp_replicate > 1)
        extras += [f"recompute:{self.recompute}"] * (self.recompute != "none")
        extras += ["offload"] * self.offload_optimizer
        return "·".join([f"{name}{value}" for name, value in degrees] + extras)

    def check(self, model: ModelShape, cluster: Cluster) -> None:
        """Raise ValueError, with the arithmetic, if this layout cannot hold the model on the cluster."""
        if self.accelerators != cluster.accelerators:
            raise ValueError(
                f"tp({self.tp}) × pp({self.pp}) × cp({self.cp}) × dp({self.dp}) = {self.accelerators} "
                f"≠ {cluster.accelerators} accelerators"
            )
        if self.ep > 1 and not model.experts:
            raise ValueError(f"ep({self.ep}) needs a model with experts")
        if self.etp and not model.experts:
            raise ValueError(f"etp({self.etp}) needs a model with experts")
        has_dense_mlps = model.expert_layers < model.layers
        divisions = [
            ("model.heads", model.heads, "tp", self.tp),
            ("model.kv_heads", model.kv_heads, "tp", self.tp),
            *([("model.ffn_hidden", model.ffn_hidden, "tp", self.tp)] if has_dense_mlps else []),
            ("padded vocabulary", model.padded_vocab, "tp", self.tp),
        ]
        if model.experts:
            divisions += [
                (
                    *("model.expert_hidden" if has_dense_mlps else "model.ffn_hidden", model.expert_width),
                    *("etp" if self.etp else "tp", self.expert_tp),
                ),
                ("model.shared_expert_hidden", model.shared_expert_hidden, "tp", self.tp),
                ("model.experts", model.experts, "ep", self.ep),
                (
                    ("tp·cp·dp", self.tp * self.cp * self.dp, "etp·ep", self.etp * self.ep)
                    if self.etp
                    else ("dp·cp", self.dp * self.cp, "ep", self.ep)
                ),
            ]
        if self.cp > 1:
            divisions.append(("model.seq_len", model.seq_len, "2·cp", 2 * self.cp))
        if self.sequence_parallel:
            own = ("tp", self.tp) if self.cp == 1 else ("tp·cp", self.tp * self.cp)
            divisions.append(("model.seq_len", model.seq_len, *own))
        for what, amount, by, degree in divisions:
            if amount % degree:
                raise ValueError(f"{what}({amount}) ÷ {by}({degree}) is not whole: {amount / degree:g}")
        self._check_stages(model.layers)

    def _check_stages(self, layers: int) -> None:
        """Raise ValueError if a pipeline stage would have no layers."""
        from profiles.pipeline_split import split_layers  # numpy, which reading a log does not need

        if split_layers(layers, self.pp, self.vp).possible:
            return
        if self.vp > 1:
            raise ValueError(
                f"model.layers({layers}) ÷ pp·vp({self.pp * self.vp}) is not whole: {layers / (self.pp * self.vp):g}; "
                f"nor is it with 2 layers more, for the embedding and the output layer"
            )
        fullest = -(-layers // self.pp)
        raise ValueError(
            f"model.layers({layers}) ÷ pp({self.pp}) is not whole, and with {fullest} on every other stage "
            f"{max(layers - fullest * (self.pp - 2), 0)} are left for the first and the last one"
        )
