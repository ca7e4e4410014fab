"""The transformer, as far as throughput and memory depend on it."""

import hashlib

from pydantic import Field, model_validator

from profiles.record import Record

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, whatever the layout, so that embeddings keep their shape in a
move."""


class ModelShape(Record):
    """A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention."""

    layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    hidden: int = Field(gt=0, le=2**20)
    """Width of the residual stream."""
    ffn_hidden: int = Field(gt=0, le=2**24)
    """Width inside the MLP (of each of gate and up, when gated)."""
    heads: int = Field(gt=0, le=2**16)
    """Attention heads; the head width is hidden ÷ heads."""
    kv_heads: int = Field(gt=0, le=2**16)
    """Key/value heads (grouped-query attention); equal to `heads` for multi-head attention."""
    seq_len: int = Field(gt=0, le=2**30)
    """Tokens in a sequence."""
    vocab: int = Field(gt=0, le=2**24)
    """Tokens in the vocabulary, before padding."""
    gated_mlp: bool = True
    """SwiGLU (True) or GELU (False)."""
    tied_embeddings: bool = False
    """Whether the output layer shares the input embedding."""
    experts: int = Field(default=0, ge=0, le=2**20)
    """Experts of each MLP, every one `ffn_hidden` wide; 0 for a dense model. The MLPs of all layers are alike."""
    experts_per_token: int = Field(default=1, gt=0, le=2**20)
    """Experts that the router sends a token to; 1 for a dense model."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""

    @model_validator(mode="after")
    def _check_arithmetic(self) -> "ModelShape":
        if self.hidden % self.heads:
            raise ValueError(f"hidden({self.hidden}) ÷ heads({self.heads}) is not whole: {self.hidden / self.heads:g}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads({self.heads}) ÷ kv_heads({self.kv_heads}) is not whole: {self.heads / self.kv_heads:g}"
            )
        if (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden({self.hidden}) ÷ heads({self.heads}) = {self.hidden // self.heads}, "
                "but rotary positions need an even head width"
            )
        if self.experts_per_token > max(self.experts, 1):
            raise ValueError(f"experts_per_token({self.experts_per_token}) is larger than experts({self.experts})")
        return self

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab` rounded up to a multiple of 128."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def layer_matrices(self, experts: int) -> int:
        """Weights of a layer's matrices with so many experts (1 for a dense model), the router's included."""
        head_width = self.hidden // self.heads
        attention = self.hidden * head_width * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.hidden * self.ffn_hidden * (3 if self.gated_mlp else 2) * experts
        return attention + mlp + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        """Number of weights, padded vocabulary and every expert included."""
        embeddings = self.padded_vocab * self.hidden * (1 if self.tied_embeddings else 2)
        layer = self.layer_matrices(max(self.experts, 1)) + 2 * self.hidden
        return self.layers * layer + self.hidden + embeddings

    @property
    def digest(self) -> str:
        """A short name that shapes share whose steps take the same work: the key of a model in throughput tables."""
        # Without defaults: a field that is added later does not make every table forget its models.
        said = self.model_dump_json(exclude_defaults=True, exclude={"norm_epsilon", "rope_base"})
        return hashlib.sha256(said.encode()).hexdigest()[:12]
