"""The decoder that a job trains: the `model` section of a job file, its arithmetic and its numbers of weights."""

import hashlib
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from profiles.latent_attention import LatentAttention
from profiles.record import PositiveInt, Record
from profiles.rope import RopeScaling
from profiles.router import Router

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, whatever the layout, so that embeddings keep their shape in a
move."""

_SAME_WORK = {
    *("norm_epsilon", "rope_base", "rope_local_base", "rope_scaling", "attention_scale", "embedding_scale"),
    "router",
}
"""Fields that change the numbers of a step and not its work."""


class ModelShape(Record):
    """A decoder. With its defaults that of Llama: RMSNorm before attention and MLP, SwiGLU, rotary positions,
    grouped-query attention, no biases."""

    layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    hidden: int = Field(gt=0, le=2**20)
    """Width of the residual stream."""
    ffn_hidden: int = Field(gt=0, le=2**24)
    """Width inside the MLP (of each of gate and up, when gated)."""
    heads: int = Field(gt=0, le=2**16)
    """Attention heads."""
    kv_heads: int = Field(gt=0, le=2**16)
    """Key/value heads (grouped-query attention); equal to `heads` for multi-head attention."""
    seq_len: int = Field(gt=0, le=2**30)
    """Tokens in a sequence."""
    vocab: int = Field(gt=0, le=2**24)
    """Tokens in the vocabulary, before padding."""
    gated_mlp: bool = True
    """Whether the MLP has a gate: SwiGLU or GeGLU, by `activation`."""
    tied_embeddings: bool = False
    """Whether the output layer shares the input embedding."""
    experts: int = Field(default=0, ge=0, le=2**20)
    """Experts of each MLP, every one `ffn_hidden` wide unless `expert_hidden` says otherwise; 0 for a dense model."""
    experts_per_token: int = Field(default=1, gt=0, le=2**20)
    """Experts that the router sends a token to; 1 for a dense model."""
    expert_hidden: int | None = Field(
        default=None, gt=0, le=2**24, json_schema_extra={"default_in_words": "ffn_hidden"}
    )
    """Width of an expert in a model that has `dense_layers` too; these are `ffn_hidden` wide."""
    shared_expert_hidden: int = Field(default=0, ge=0, le=2**24)
    """Width of the MLP beside the experts that every token goes through; 0: none. Several shared experts are one MLP of
    their joint width."""
    dense_layers: int = Field(default=0, ge=0, le=10_000)
    """First layers whose MLP is dense, in a model with experts."""
    capacity_factor: PositiveFloat | None = None
    """An expert takes at most this times its equal share of the tokens that a rank sends in a micro-batch, those with
    the highest scores, and the others pass by it. What is dropped depends on the layout and the micro-batch. No token
    is dropped if it is left out."""
    router: Router = Router()
    """How experts are chosen and weighed."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    head_dim: PositiveInt | None = Field(default=None, json_schema_extra={"default_in_words": "hidden ÷ heads"})
    """Width of an attention head."""
    latent_attention: LatentAttention | None = None
    """Multi-head latent attention (DeepSeek-V2 and V3), if it is given; needs `head_dim`."""
    activation: Literal["silu", "gelu", "gelu_tanh", "squared_relu"] | None = Field(
        default=None, json_schema_extra={"default_in_words": "`silu` with a gate, `gelu` without"}
    )
    """Activation function of the MLP. gelu_tanh: the approximation of GELU by tanh, as in GPT-2 and Gemma."""
    bias: Literal["none", "qkv", "attention", "all"] = "none"
    """Linear layers that have biases: qkv, the projections of queries, keys and values (Qwen 2); attention, the output
    projection too; all, the MLP too (GPT-2)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of all norms. LayerNorm has biases."""
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Where attention and MLP have their norms: pre, at their inputs; post, at their outputs, before these are added to
    the residual stream (OLMo 2); both (Gemma 2 and 3)."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Norms of queries and keys: head, over the width of a head (Qwen 3, Gemma 3); projection, over that of all heads
    (OLMo 2)."""
    positions: Literal["rope", "learned"] = "rope"
    """rope: rotary. learned: an embedding for each of `seq_len` positions (GPT-2)."""
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of a head's dimensions that are rotated, the first ones."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are scaled for long sequences; none if it is left out."""
    rope_local_base: float | None = Field(
        default=None, gt=0, json_schema_extra={"default_in_words": "as in all layers"}
    )
    """Base of the rotary frequencies, which are not scaled, in the layers that attend to a window (Gemma 3)."""
    sliding_window: PositiveInt | None = None
    """Tokens that a token attends to, itself included; all before it if it is left out."""
    full_attention_every: int = Field(default=0, ge=0, le=10_000)
    """n: layers n, 2n, … attend to all tokens before, the others to `sliding_window`; 0: all layers attend to that."""
    attention_scale: PositiveFloat | None = Field(default=None, json_schema_extra={"default_in_words": "1 / √head_dim"})
    """Factor of the products of queries and keys."""
    embedding_scale: PositiveFloat = 1.0
    """Factor of the input embeddings; Gemma has √hidden."""
    attention_softcap: PositiveFloat | None = None
    """c: scores x become c · tanh(x / c) (Gemma 2)."""
    logit_softcap: PositiveFloat | None = None
    """The same of the logits."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_usual(cls, values: Any) -> Any:
        """A width or an activation that is the usual one names the same model as none."""
        if not isinstance(values, dict):
            return values
        hidden, heads, gated = values.get("hidden"), values.get("heads"), values.get("gated_mlp", True)
        activation = "silu" if gated is True else "gelu" if gated is False else None
        usual = {"activation": activation, "expert_hidden": values.get("ffn_hidden")}
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
            usual["head_dim"] = hidden // heads
        return {name: value for name, value in values.items() if name not in usual or usual[name] != value}

    @model_validator(mode="after")
    def _check_arithmetic(self) -> "ModelShape":
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"hidden({self.hidden}) ÷ heads({self.heads}) is not whole: {self.hidden / self.heads:g}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads({self.heads}) ÷ kv_heads({self.kv_heads}) is not whole: {self.heads / self.kv_heads:g}"
            )
        if self.latent_attention is not None:
            self._check_latent_attention(self.latent_attention)
        if self.positions == "rope" and self.rotary_width % 2:
            of_head = (
                f"head_dim({self.head_width})" if self.head_dim else f"hidden({self.hidden}) ÷ heads({self.heads})"
            )
            of_head += "" if self.rope_fraction == 1 else f" × rope_fraction({self.rope_fraction:g})"
            raise ValueError(f"{of_head} = {self.rotary_width}, but rotary positions need an even head width")
        if self.positions == "rope" and not self.rotary_width:
            raise ValueError(
                f"head_dim({self.head_width}) × rope_fraction({self.rope_fraction:g}) is less than 2: none is rotated"
            )
        if self.experts_per_token > max(self.experts, 1):
            raise ValueError(f"experts_per_token({self.experts_per_token}) is larger than experts({self.experts})")
        if self.dense_layers >= self.layers:
            raise ValueError(f"dense_layers({self.dense_layers}) of layers({self.layers}) leave none with experts")
        if self.experts and self.bias == "all":
            raise ValueError("bias(all): experts have no biases")
        needs = (
            *((name, self.experts, "experts") for name in ("shared_expert_hidden", "dense_layers", "capacity_factor")),
            ("router", self.experts, "experts"),
            ("expert_hidden", self.dense_layers, "dense_layers; without them ffn_hidden is the width of the experts"),
            ("rope_fraction", self.positions == "rope", "positions(rope)"),
            ("rope_scaling", self.positions == "rope", "positions(rope)"),
            ("rope_local_base", self.positions == "rope" and self.sliding_window, "positions(rope) and sliding_window"),
            ("full_attention_every", self.sliding_window, "sliding_window"),
        )
        for name, there, what in needs:
            if getattr(self, name) != type(self).model_fields[name].default and not there:
                raise ValueError(f"{name} needs {what}")
        if self.experts:
            self.router.check(self)
        if self.full_attention_every == 1:
            raise ValueError("full_attention_every(1): every layer attends to all tokens; leave sliding_window out")
        return self

    def _check_latent_attention(self, latent: LatentAttention) -> None:
        if self.head_width <= latent.rope_dim:
            raise ValueError(
                f"latent_attention.rope_dim({latent.rope_dim}) leaves nothing of head_dim({self.head_width})"
            )
        if self.kv_heads != self.heads:
            raise ValueError(f"latent_attention needs as many kv_heads({self.kv_heads}) as heads({self.heads})")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab` rounded up to a multiple of 128."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.latent_attention.rope_dim if self.latent_attention else int(self.head_width * self.rope_fraction)

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.kv_heads * self.head_width

    @property
    def attention_width(self) -> float:
        """Mean width of queries and of the results of all heads: a score takes so many multiplications, twice."""
        if self.latent_attention is None:
            return self.query_width
        return self.heads * (self.head_width + self.latent_attention.value_dim) / 2

    @property
    def mlp_activation(self) -> str:
        """Activation function of the MLP."""
        return self.activation or ("silu" if self.gated_mlp else "gelu")

    @property
    def full_attention_layers(self) -> int:
        """Number of layers that attend to all tokens before."""
        if self.sliding_window is None:
            return self.layers
        return self.layers // self.full_attention_every if self.full_attention_every else 0

    @property
    def attention_matrices(self) -> int:
        """Weights of the matrices of a layer's attention."""
        if self.latent_attention is not None:
            return self.latent_attention.matrices(self.hidden, self.heads, self.head_width)
        return self.hidden * (2 * self.query_width + 2 * self.kv_width)

    @property
    def whole_attention_matrices(self) -> int:
        """Those of them that every tensor parallel rank has whole."""
        return self.latent_attention.down_matrices(self.hidden) if self.latent_attention else 0

    @property
    def mlp_matrices(self) -> int:
        """Weights of the matrices of one dense MLP."""
        return self._mlp_of_width(self.ffn_hidden)

    @property
    def expert_width(self) -> int:
        """Width of one expert."""
        return self.expert_hidden or self.ffn_hidden

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Widths of all kinds of MLPs that there are."""
        of_experts = (self.expert_width, self.shared_expert_hidden) if self.experts else ()
        return tuple(width for width in (self.ffn_hidden, *of_experts) if width)

    @property
    def expert_matrices(self) -> int:
        """Weights of the matrices of one expert."""
        return self._mlp_of_width(self.expert_width)

    @property
    def shared_expert_matrices(self) -> int:
        """Weights of the matrices of the MLP that every token goes through beside its experts."""
        return self._mlp_of_width(self.shared_expert_hidden)

    def _mlp_of_width(self, width: int) -> int:
        return self.hidden * width * (3 if self.gated_mlp else 2)

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def norms_per_layer(self) -> int:
        """Norms of the width of the residual stream in a layer."""
        return 4 if self.norm_position == "both" else 2

    @property
    def norm_vectors(self) -> int:
        """Vectors of a norm: its weight and, of LayerNorm, its bias."""
        return 2 if self.norm == "layernorm" else 1

    @property
    def column_biases(self) -> int:
        """Biases in a layer that tensor parallel ranks share out: those of the projections into attention and MLP."""
        attention = (self.query_width + 2 * self.kv_width) * (self.bias != "none")
        return attention + self.ffn_hidden * (2 if self.gated_mlp else 1) * (self.bias == "all")

    @property
    def whole_vectors(self) -> int:
        """Weights of a layer's norms and biases that every tensor parallel rank has."""
        biases = self.hidden * (self.bias in ("attention", "all")) + self.hidden * (self.bias == "all")
        of_queries_and_keys = {"none": 0, "head": 2 * self.head_width, "projection": self.query_width + self.kv_width}
        norms = self.norms_per_layer * self.hidden + of_queries_and_keys[self.qk_norm]
        norms += self.latent_attention.norms if self.latent_attention else 0
        return biases + norms * self.norm_vectors

    @property
    def position_embeddings(self) -> int:
        """Weights of the embedding of positions."""
        return self.seq_len * self.hidden if self.positions == "learned" else 0

    def matrices(self, experts: int) -> int:
        """Weights of the matrices of all layers with so many experts in each layer that has any, the router's
        included."""
        moe = self.expert_matrices * experts + self.shared_expert_matrices + self.hidden * self.experts
        dense = (self.layers - self.expert_layers) * self.mlp_matrices
        return self.layers * self.attention_matrices + dense + self.expert_layers * moe

    @property
    def parameters(self) -> int:
        """Number of weights, padded vocabulary and every expert included."""
        embeddings = self.padded_vocab * self.hidden * (1 if self.tied_embeddings else 2) + self.position_embeddings
        vectors = self.layers * (self.column_biases + self.whole_vectors) + self.norm_vectors * self.hidden
        return self.matrices(self.experts) + vectors + embeddings

    @property
    def without_training(self) -> "ModelShape":
        """The same model without what only training has of it: losses and limits that spread tokens over experts."""
        router = {name: getattr(self.router, name) for name in ("scores", "normalized", "scale", "groups")}
        router |= {"groups_per_token": self.router.groups_per_token}
        router |= {"bias_update_rate": 0.001 if self.router.bias_update_rate else 0.0}  # that there are biases, alone
        return self.model_copy(update={"router": Router(**router), "capacity_factor": None})

    @property
    def digest(self) -> str:
        """A short name that shapes share whose steps take the same work: the key of a model in throughput tables."""
        # Without defaults: a field that is added later does not make every table forget its models.
        said = self.model_dump_json(exclude_defaults=True, exclude=_SAME_WORK)
        return hashlib.sha256(said.encode()).hexdigest()[:12]
