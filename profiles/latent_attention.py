"""Multi-head latent attention, a section of the `model` section of its own."""

from profiles.record import PositiveInt, Record


class LatentAttention(Record):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values of all heads are projections
    of one narrow vector a token, and so may the queries be."""

    kv_rank: PositiveInt
    """Width of the vector that keys and values are made of."""
    query_rank: PositiveInt | None = None
    """Width of the vector that queries are made of; none if it is left out."""
    rope_dim: PositiveInt
    """Dimensions of each head of the queries that are rotated; those of the keys are one vector for all heads."""
    value_dim: PositiveInt
    """Width of a head of the values; `head_dim` is that of queries and keys, the rotated dimensions included."""

    def down_matrices(self, hidden: int) -> int:
        """Weights of the projections into narrow vectors, of which every tensor parallel rank has all."""
        return hidden * ((self.query_rank or 0) + self.kv_rank + self.rope_dim)

    def matrices(self, hidden: int, heads: int, head_width: int) -> int:
        """Weights of the matrices of a layer's attention."""
        queries = heads * head_width
        into_queries = self.query_rank * (hidden + queries) if self.query_rank else hidden * queries
        into_keys_and_values = hidden * (self.kv_rank + self.rope_dim)
        into_keys_and_values += self.kv_rank * heads * (head_width - self.rope_dim + self.value_dim)
        return into_queries + into_keys_and_values + heads * self.value_dim * hidden

    @property
    def norms(self) -> int:
        """Weights of the norms of the narrow vectors."""
        return self.kv_rank + (self.query_rank or 0)
