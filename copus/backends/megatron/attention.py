"""torch's fused attention in Megatron's layers, on whole sequences or on a rank's pieces of them.

Context parallelism: the ranks of a group share each sequence out, and gather keys and values for attention; everything
else works on a rank's own tokens. A sequence is cut into 2·cp pieces, and rank r has the pieces r and 2·cp − 1 − r, so
that under a causal mask all ranks have as many scores to compute (Llama 3, 2407.21783, section 3.3.2). Megatron's own
needs Transformer Engine.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention.bias import causal_lower_right

from copus.backends.megatron import cpu

cpu.before_import()
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402


class CausalAttention(torch.nn.Module):
    """Causal attention over the heads of this tensor parallel rank, to all tokens before or to the window of the layer,
    or to what `attention_mask` leaves.

    `query` is [s, b, heads/tp, head width]; `key` and `value` are [s, b, kv_heads/tp, head width], where those of the
    values may have a width of their own; the result is [s, b, heads · width of the values / tp].
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = config.softmax_scale or softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        every = config.window_attn_skip_freq
        all_tokens = config.window_size is None or (every and layer_number % every == 0)
        self.window = None if all_tokens else config.window_size[0] + 1
        """Tokens that a token attends to, itself included."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """`attention_mask` is True for what is hidden, later tokens included."""
        return self.attend(query, key, value, attention_mask)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of the last tokens of those that have keys and values. `hidden` has them as its last two axes."""
        (queries, batch, heads, _), keys = query.shape, len(key)
        window = self.window if self.window is not None and self.window < keys else None
        options: dict[str, Any] = {}
        if hidden is not None:
            mask = ~hidden
            if window is not None:
                mask = mask & (_window_mask(queries, keys, window, query.dtype, query.device) == 0)
            options["attn_mask"] = mask
        elif window is not None:
            options["attn_mask"] = _window_mask(queries, keys, window, query.dtype, query.device)
        elif queries == keys:
            options["is_causal"] = True
        elif query.is_cuda:
            options["attn_mask"] = causal_lower_right(queries, keys)
        else:  # torch would make the mask every time
            options["attn_mask"] = _window_mask(queries, keys, keys, query.dtype, query.device)
        width = value.shape[-1]
        if width < key.shape[-1]:  # torch's kernels that keep no scores take values as wide as keys
            value = functional.pad(value, (0, key.shape[-1] - width))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        options |= {"dropout_p": dropout, "scale": self.scale, "enable_gqa": key.shape[1] != heads}
        if dropout:  # two tensor-parallel ranks must not drop the same scores
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = functional.scaled_dot_product_attention(query, key, value, **options)
        else:
            context = functional.scaled_dot_product_attention(query, key, value, **options)
        return context[..., :width].permute(2, 0, 1, 3).reshape(queries, batch, heads * width)


class ContextParallelAttention(CausalAttention):
    """Causal attention of a rank's own tokens to all tokens before them, whichever rank these are on.

    `query`, `key` and `value` are those of the own tokens, of shape [s/cp, b, …]. `attention_mask` has the own tokens
    as rows, and all tokens in their order as columns.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """Each of the two pieces sees the keys from the first in its first token's window to its last token's own."""
        group = parallel_state.get_context_parallel_group()
        size, rank, piece = group.size(), group.rank(), len(query) // 2
        both = _gather_pieces(torch.cat([key, value], dim=-1), group)
        key, value = both[..., : key.shape[-1]], both[..., key.shape[-1] :]
        masks = (None, None) if attention_mask is None else attention_mask.split(piece, dim=2)
        contexts = []
        for place, own, mask in zip((rank, 2 * size - 1 - rank), query.split(piece), masks, strict=True):
            first = 0 if self.window is None else max(0, place * piece + 1 - self.window)
            seen = slice(first, (place + 1) * piece)
            contexts.append(self.attend(own, key[seen], value[seen], None if mask is None else mask[..., seen]))
        return torch.cat(contexts)


def own_pieces(whole: torch.Tensor) -> torch.Tensor:
    """This rank's two pieces of sequences, of shape (sequences, tokens, …); the whole without context parallelism."""
    group = parallel_state.get_context_parallel_group()
    size, rank = group.size(), group.rank()
    if size == 1:
        return whole
    pieces = whole.chunk(2 * size, dim=1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=1)


def _gather_pieces(own: torch.Tensor, group: Any) -> torch.Tensor:
    """The tokens of all ranks in their order. The backward pass gives each rank the sum of all ranks' gradients of its
    own tokens."""
    size = group.size()
    pieces = gather_from_sequence_parallel_region(own.contiguous(), True, group).chunk(2 * size)
    order = [*range(0, 2 * size, 2), *range(2 * size - 1, 0, -2)]  # rank r has sent the (2r)-th and the (2r + 1)-th
    return torch.cat([pieces[index] for index in order])


@functools.lru_cache(maxsize=8)
def _window_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores of the last `queries` of `keys` tokens (rows): 0 for a token itself and the
    `window` − 1 before it, else −∞.

    One for all layers; of a mask of truth values each layer would keep a copy in `dtype`.
    """
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
