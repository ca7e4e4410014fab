"""Squared norms of the gradients of the parts of a step, under every kind of parallelism, without changing Megatron's
source.

A part is a micro-batch of one replica (`microbatch`), the whole step of one replica (`replica`), or one sequence in the
coordinates of the norm layers (`normlayer`). Every parameter of the whole model counts once:

- a tensor-parallel duplicate (norm weights) counts on tensor rank 0, a pipeline-shared embedding on the first stage;
- if every rank holds a partial sum of a gradient (norm weights with sequence parallelism, those of queries and keys
  with tensor parallelism; the two ends of a tied embedding with pipelining), the partial gradients of a part are kept
  and summed over their group before they are squared;
- with context parallelism every rank has the gradient of its own tokens of a part, and the gradients are summed over
  the group as soon as a backward pass has made them;
- with expert parallelism an expert's gradient is the sum over the tokens of all ranks that share the experts out, and
  none of them has that of its own tokens. A part is then what the replicas of these ranks do together: the k-th
  micro-batch of each. All other gradients are summed over those of the ranks that have the same weights.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.description import replicas_of_part
from copus.backends.megatron.experts import is_shared_out
from copus.backends.megatron.groups import part_group, replica_number
from copus.backends.megatron.main_params import main_params
from copus.backends.megatron.modules import is_norm_of_heads
from copus.backends.megatron.norm_layers import MegatronNormLayers
from copus.backends.megatron.preconditioner import Preconditioner
from copus.backends.squared_norms import norms, sum_of_squares
from copus.backends.step_contract import Parts
from planner.noise_sources import split
from profiles.configuration import Configuration
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate  # noqa: E402
from megatron.core.transformer.module import param_is_not_shared  # noqa: E402

_LARGE = 2**20
"""Elements of a tensor that is reduced by itself."""


class PartNorms:
    """Collects the squared norms of the parts of a step. Created once for a built model, and closed with it.

    Call `start` before the forward-backward pass, `contribution` when the optimizer has its gradients, and `parts` with
    the sum of all ranks' contributions.
    """

    def __init__(
        self, chunks: list[Any], optimizer: Any, layout: Layout, tied_embeddings: bool, adam_epsilon: float | None
    ) -> None:
        """With `adam_epsilon` every gradient is divided by Adam's √v̂ + ε before it is squared."""
        self._layout = layout
        self._config = chunks[0].config
        self._optimizer = optimizer
        self._full: str | None = None
        self._norm_layers_on = False
        self._weights: dict[torch.nn.Parameter, torch.Tensor] | None = None
        self._main_weights: dict[torch.nn.Parameter, torch.Tensor] | None = None
        self._counted: set[torch.nn.Parameter] = set()
        self._partial: dict[torch.nn.Parameter, dist.ProcessGroup] = {}
        self._summed_at_once: set[torch.nn.Parameter] = set()
        """Parameters whose gradients are summed over the ranks of a part in the backward pass."""
        self._part_group = part_group(layout)
        self._replicas_of_part = replicas_of_part(layout)
        self._norm_layers = MegatronNormLayers(chunks, layout)
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        params = [param for _, param in named]
        self._preconditioner = None if adam_epsilon is None else Preconditioner(params, optimizer, adam_epsilon)
        self._hooks = []
        self._reductions: list[tuple[Any, Any]] = []
        """Groups of buckets whose reductions are watched, and how they begin these by themselves."""
        for name, param in named:
            self._classify(name, param, layout, tied_embeddings)
            self._hooks.append(param.register_post_accumulate_grad_hook(self._after_backward))
        for chunk in chunks:
            for bucket_group in chunk.bucket_groups:
                self._watch_reduction(bucket_group)
        self._reset()

    def close(self) -> None:
        """Remove the hooks. The garbage collector does not see through them: parameter, hook and optimizer would keep
        each other alive."""
        for hook in self._hooks:
            hook.remove()
        for bucket_group, reduce in self._reductions:
            bucket_group.start_grad_sync = reduce
        self._reductions.clear()

    def _classify(self, name: str, param: torch.nn.Parameter, layout: Layout, tied_embeddings: bool) -> None:
        shared_embedding = getattr(param, "shared_embedding", False) or not param_is_not_shared(param)
        if self._part_group.size() > 1 and not is_shared_out(param):
            self._summed_at_once.add(param)
        if tied_embeddings and layout.pp > 1 and shared_embedding:
            self._partial[param] = parallel_state.get_embedding_group()
            if parallel_state.is_pipeline_first_stage():
                self._counted.add(param)
            return
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param):
            self._counted.add(param)
        over_tokens = layout.sequence_parallel and getattr(param, "sequence_parallel", False)
        if over_tokens or (layout.tp > 1 and is_norm_of_heads(name, self._config)):
            self._partial[param] = part_group(layout, with_tensor_parallel=True)
            self._summed_at_once.discard(param)

    def _watch_reduction(self, bucket_group: Any) -> None:
        """Read the local gradients right before data-parallel ranks reduce them: at the end of the pass or, if the
        reduction overlaps with it, when the last gradient of the bucket group is complete."""
        reduce = bucket_group.start_grad_sync

        def start_grad_sync(*args: Any, **kwargs: Any) -> Any:
            if self._full == "replica":
                params = [param for bucket in bucket_group.buckets for param in bucket.params_list]
                self._see(params, [param.main_grad for param in params], part=0)
            return reduce(*args, **kwargs)

        bucket_group.start_grad_sync = start_grad_sync
        self._reductions.append((bucket_group, reduce))

    def _reset(self) -> None:
        self._norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._kept: dict[tuple[torch.nn.Parameter, int], torch.Tensor] = {}
        self._passes: dict[torch.nn.Parameter, int] = defaultdict(int)

    def start(self, source: str | None, configuration: Configuration, adam_correction: float) -> None:
        """Begin a step that is measured from `source` (as in `planner.noise_sources`; None measures nothing).
        `adam_correction` is 1 − Π β2 over the optimizer steps so far.

        A source with fewer than two parts is not measured, and with Adam's metric nothing is before its first step.
        """
        self._reset()
        self._full, norm_layers = split(source)
        self._configuration = configuration
        if self._full == "replica" and configuration.layout.ep > 1:
            self._full = None
        if self._full_parts() < 2:
            self._full = None
        self._norm_layers_on = norm_layers and configuration.global_batch > 1
        self._weights = self._main_weights = None
        if self._preconditioner is not None and (self._full or self._norm_layers_on):
            weights = self._preconditioner.weights(adam_correction)
            if weights is None:
                self._full, self._norm_layers_on = None, False
            else:
                self._weights, self._main_weights = weights
        self._norm_layers.start(self._norm_layers_on, self._weights)

    def _parts_of_replica(self) -> int:
        return {"replica": 1, "microbatch": self._configuration.num_microbatches}.get(self._full or "", 0)

    def _full_parts(self) -> int:
        return self._parts_of_replica() * (self._layout.dp // self._replicas_of_part)

    @torch.no_grad()
    def _after_backward(self, param: torch.nn.Parameter) -> None:
        """Runs when autograd has put a micro-batch's gradient into `param.grad`, before Megatron adds it to
        `main_grad`."""
        if self._full != "microbatch":
            return
        if param.grad is None:  # silence would make the noise scale wrong
            raise RuntimeError(
                f"planner.noise_source(microbatch) needs gradients in param.grad, and a parameter of shape "
                f"{tuple(param.shape)} has none after its backward pass: its layer adds to main_grad itself (fused "
                "weight-gradient accumulation)"
            )
        part = self._passes[param]
        self._passes[param] = part + 1
        self._see([param], [param.grad], part)

    @torch.no_grad()
    def _see(self, params: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor], part: int) -> None:
        whole = []
        for param, gradient in zip(params, gradients, strict=True):
            if param in self._summed_at_once and (param in self._partial or param in self._counted):
                gradient = gradient.to(torch.float32, copy=True)
                dist.all_reduce(gradient, group=self._part_group)
            if param in self._partial:
                self._kept[param, part] = gradient.detach().clone()  # half of fp32's memory in bf16
            elif self._counts(param):
                whole.append(self._weighted(param, gradient))
        self._norms[part] += norms(whole)

    def _counts(self, param: torch.nn.Parameter) -> bool:
        """Whether this rank counts the gradient of a part. Of what all ranks of a part have, the first does."""
        return param in self._counted and (is_shared_out(param) or self._part_group.rank() == 0)

    def _weighted(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self._weights is None else gradient * self._weights[param]

    @torch.no_grad()
    def contribution(self, device: torch.device) -> torch.Tensor:
        """This rank's summands, a float64 vector of the same length on all ranks.

        |g|² of the mean gradient in the coordinates of the full source and in those of the norm layers, then |g_j|² of
        every part of the full source, then of every sequence. Collective over tensor-parallel ranks (with sequence
        parallelism), over context parallel ranks, and over the first and last stage (with tied embeddings).
        """
        configuration = self._configuration
        rank, replicas = parallel_state.get_data_parallel_rank(), configuration.layout.dp
        full_parts, group = self._parts_of_replica(), rank // self._replicas_of_part
        sequences = configuration.global_batch // replicas if self._norm_layers_on else 0
        all_parts = self._full_parts()
        vector = torch.zeros(2 + all_parts + replicas * sequences, dtype=torch.float64, device=device)
        if full_parts and self._weights is not None:
            vector[0] = self._mean_sq(None, device)
        if full_parts:
            vector[2 + group * full_parts :][:full_parts] = self._collect(full_parts, device)
        if sequences:
            vector[1] = self._mean_sq(set(self._norm_layers.params), device)
            start = 2 + all_parts + rank * sequences
            vector[start:][:sequences] = self._norm_layers.collect(
                configuration.num_microbatches, configuration.micro_batch, device
            )
        self._reset()
        return vector

    def _collect(self, parts: int, device: torch.device) -> torch.Tensor:
        self._add_up_partial_gradients(parts)
        sums = torch.stack([sum_of_squares(self._norms[part], device) for part in range(parts)])
        # The gradient of a part is the mean over the ranks that were added up. megatron divides every micro-batch's
        # loss by their number (schedules.py:269).
        of_microbatch = 1 if self._full == "replica" else self._configuration.num_microbatches
        return sums * (of_microbatch / self._part_group.size()) ** 2

    def _add_up_partial_gradients(self, parts: int) -> None:
        """Sum the partial gradients over their group, in fp32, and count them: large tensors one by one, so that there
        is one fp32 copy at a time, and all small tensors and parts of a group in one all-reduce."""
        small: dict[dist.ProcessGroup, list[tuple[torch.nn.Parameter, int]]] = defaultdict(list)
        for param, group in self._partial.items():
            for part in range(parts):
                if param.numel() > _LARGE:
                    gradient = self._kept.pop((param, part)).float()
                    dist.all_reduce(gradient, group=group)
                    self._count_whole(param, part, gradient)
                else:
                    small[group].append((param, part))
        for group, keys in small.items():
            flat = torch.cat([self._kept.pop(key).float().view(-1) for key in keys])
            dist.all_reduce(flat, group=group)
            for (param, part), total in zip(keys, flat.split([param.numel() for param, _ in keys]), strict=True):
                self._count_whole(param, part, total.view(param.shape))

    def _count_whole(self, param: torch.nn.Parameter, part: int, gradient: torch.Tensor) -> None:
        if self._counts(param):
            self._norms[part] += norms([self._weighted(param, gradient)])

    def _mean_sq(self, only: set[torch.nn.Parameter] | None, device: torch.device) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient, weighted, of all parameters or of some."""
        gradients = []
        for param, main, *_ in main_params(self._optimizer):
            # Without the distributed optimizer replicas have the same gradients: those of the first count.
            counts = param in self._counted and (self._layout.zero or replica_number(is_shared_out(param)) == 0)
            if counts and (only is None or param in only) and main.grad is not None:
                weights = self._main_weights
                gradients.append(main.grad if weights is None else main.grad * weights[main])
        return sum_of_squares(norms(gradients), device)

    def parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the full source and those of the norm layers, from the sum of all ranks' contributions and |g|²
        of the step."""
        configuration = self._configuration
        count = self._full_parts()
        full = norm_layers = None
        if count:
            mean_sq = grad_sq if self._weights is None else float(totals[0])
            full = Parts(totals[2 : 2 + count], configuration.global_batch // count, mean_sq)
        if self._norm_layers_on:
            norm_layers = Parts(totals[2 + count :], 1, float(totals[1]))
        return full, norm_layers
