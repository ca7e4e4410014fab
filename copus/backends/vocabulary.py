"""The rows that pad the vocabulary, the same on every backend."""

import math

import torch


def hide_padding(logits: torch.Tensor, vocab: int, first: int = 0) -> None:
    """Take the padding out of the softmax: the logits of tokens from `vocab` on become −∞, in place.

    `logits` has the tokens from `first` on along its last axis. Autograd need not know: where the softmax is 0, so is
    the gradient.
    """
    with torch.no_grad():
        logits[..., max(0, vocab - first) :] = -math.inf
