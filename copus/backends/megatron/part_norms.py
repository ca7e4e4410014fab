"""Squared norms of the gradients of the parts of a step, under every kind of parallelism, without touching megatron's
source.

A part is a micro-batch of one replica (`microbatch`) or all that one replica does in the step (`replica`). Every
parameter of the whole model is counted once:

- a tensor parallel duplicate (norm weights) counts on tensor rank 0, a pipeline-shared embedding on the first stage;
- where each rank holds a partial sum of one gradient (norm weights under sequence parallel; the two ends of a tied
  embedding under
  pipelining), the partial gradients of a part are kept and added up over their group before they are squared.

Long sums are in float64: in fp32 a CPU norm is off by some 1e-5, by another amount on every layout.
"""

from collections import defaultdict
from typing import Any, Literal

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate  # noqa: E402
from megatron.core.transformer.module import param_is_not_shared  # noqa: E402

PartSource = Literal["microbatch", "replica"]


_ROW = 1024
"""Elements added up in fp32 before float64 takes over: exact to 1e-8, and 25 times faster on a CPU than float64."""


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares as a 0-d float64 tensor on the tensor's device, to some 1e-8 relative."""
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32).double()
    rest = flat[whole:].double()
    return rows.dot(rows) + rest.dot(rest)


class PartNorms:
    """Collects the squared norms of the parts of each step. Made once for a built model; hooks live as long as the
    model.

    Use: `start(source)` before the forward-backward pass, `collect()` after it.
    """

    def __init__(self, chunks: list[Any], layout: Layout, tied_embeddings: bool) -> None:
        self._source: PartSource | None = None
        self._counted: set[torch.nn.Parameter] = set()
        self._partial: dict[torch.nn.Parameter, dist.ProcessGroup] = {}
        self._partial_order: list[torch.nn.Parameter] = []
        for chunk in chunks:
            for param in chunk.parameters():
                self._classify(param, layout, tied_embeddings)
                param.register_post_accumulate_grad_hook(self._after_backward)
            for bucket_group in chunk.bucket_groups:
                self._watch_reduction(bucket_group)
        self._reset()

    def _classify(self, param: torch.nn.Parameter, layout: Layout, tied_embeddings: bool) -> None:
        shared_embedding = getattr(param, "shared_embedding", False) or not param_is_not_shared(param)
        if tied_embeddings and layout.pp > 1 and shared_embedding:
            self._partial[param] = parallel_state.get_embedding_group()
            self._partial_order.append(param)
            if parallel_state.is_pipeline_first_stage():
                self._counted.add(param)
            return
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param):
            self._counted.add(param)
        if layout.sequence_parallel and getattr(param, "sequence_parallel", False):
            self._partial[param] = parallel_state.get_tensor_model_parallel_group()
            self._partial_order.append(param)

    def _watch_reduction(self, bucket_group: Any) -> None:
        """See the local gradients right before data parallel ranks reduce them."""
        reduce = bucket_group.start_grad_sync

        def start_grad_sync(*args: Any, **kwargs: Any) -> Any:
            if self._source == "replica":
                for bucket in bucket_group.buckets:
                    for param in bucket.params_list:
                        self._see(param, param.main_grad, part=0)
            return reduce(*args, **kwargs)

        bucket_group.start_grad_sync = start_grad_sync

    def _reset(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._kept: dict[tuple[torch.nn.Parameter, int], torch.Tensor] = {}
        self._passes: dict[torch.nn.Parameter, int] = defaultdict(int)

    def start(self, source: PartSource | None) -> None:
        """Begin a step; None measures nothing."""
        self._source = source
        self._reset()

    @torch.no_grad()
    def _after_backward(self, param: torch.nn.Parameter) -> None:
        """Runs when autograd has one micro-batch's gradient in `param.grad`, before megatron adds it to `main_grad`."""
        if self._source != "microbatch" or param.grad is None:
            return
        part = self._passes[param]
        self._passes[param] = part + 1
        self._see(param, param.grad, part)

    def _see(self, param: torch.nn.Parameter, gradient: torch.Tensor, part: int) -> None:
        if param in self._partial:
            self._kept[param, part] = gradient.detach().float().clone()
        elif param in self._counted:
            square = squared_norm(gradient)
            self._sums[part] = self._sums[part] + square if part in self._sums else square

    @torch.no_grad()
    def collect(self, parts: int, device: torch.device) -> torch.Tensor:
        """This rank's contribution to Σ|g_j|² for each of its `parts` parts: float64 of shape (parts,).

        Sum it over the model parallel ranks to get the norms. The gradients are as megatron has them: already divided
        by the number of micro-batches. Collective over tensor parallel ranks (sequence parallel) and over the first and
        last stage (tied embeddings).
        """
        sums = torch.zeros(parts, dtype=torch.float64, device=device)
        for part, square in self._sums.items():
            sums[part] += square
        for param in self._partial_order:
            for part in range(parts):
                gradient = self._kept[param, part]
                dist.all_reduce(gradient, group=self._partial[param])
                if param in self._counted:
                    sums[part] += squared_norm(gradient)
        self.start(None)
        return sums
