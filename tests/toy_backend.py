"""A whole backend in plain torch: a table of logits by the token before, its rows cut over tensor parallel ranks.

Trains with Adam's two moments; with ZeRO 1 each replica owns some columns of them. It says nothing of moving, saving,
loading, clipping, skipping or voting: those are `copus.backends.base`'s.
"""

from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.description import BackendDescription
from copus.backends.step_contract import Batches, Parts, StepRequest, StepRules, StepShares
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState
from copus.reshard.table import Field, Row, ShardTable
from planner.backend_traits import PartCount
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape


class ToyDescription(BackendDescription):
    """What it runs: tensor and data parallelism, ZeRO 1."""

    framework = "torch"
    largest_zero = 1

    def check_model(self, model: ModelShape) -> None:
        if model.experts:
            raise ValueError("model.experts: the toy has none")

    def check_layout(self, layout: Layout) -> None:
        super().check_layout(layout)
        if layout.pp > 1:
            raise ValueError(f"pp({layout.pp}) is not supported by the toy: at most 1")

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        return {}  # it measures no noise

    def load(self) -> type[Backend]:
        return ToyBackend


class ToyBackend(Backend):
    """One rank of it: tensor rank = rank mod tp, replica = rank ÷ tp."""

    MOMENTS: ClassVar = ("exp_avg", "exp_avg_sq")

    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        self._layout = layout = configuration.layout
        self._making = configuration
        self._tp_rank, self._replica = dist.get_rank() % layout.tp, dist.get_rank() // layout.tp
        ranks = [[tp_rank + layout.tp * replica for replica in range(layout.dp)] for tp_rank in range(layout.tp)]
        self._replicas = [dist.new_group(of_tp_rank) for of_tp_rank in ranks][self._tp_rank]
        rows = self._job.model.vocab // layout.tp
        self._weight = torch.empty(rows, self._job.model.vocab)
        if initial_weights:
            generator = torch.Generator().manual_seed(self._job.training.seed)
            whole = 0.02 * torch.randn(self._job.model.vocab, self._job.model.vocab, generator=generator)
            self._weight.copy_(whole[self._tp_rank * rows :][:rows])
        self._gradient = torch.zeros_like(self._weight)
        self._moments = {name: torch.zeros_like(self._weight[:, self._own]) for name in self.MOMENTS}
        self._step = 0

    def release(self) -> None:
        if hasattr(self, "_weight"):
            del self._weight, self._gradient, self._moments

    def drop_groups(self, broken: bool) -> None:
        if not broken and hasattr(self, "_replicas"):
            dist.destroy_process_group(self._replicas)

    def shard_table(self, layout: Layout) -> ShardTable:
        vocab = self._job.model.vocab
        weight = (Field("logits", "float32", (vocab, vocab)),)
        moments = tuple(Field(f"logits/{name}", "float32", (vocab, vocab)) for name in self.MOMENTS)
        rows: list[Row] = []
        for rank in range(layout.accelerators):
            top, height = rank % layout.tp * (vocab // layout.tp), vocab // layout.tp
            left, right = self._columns(layout, rank // layout.tp)
            rows.append((rank, weight, Box((top, 0), (height, vocab))))
            rows.append((rank, moments, Box((top, left), (height, right - left))))
        return ShardTable.of(rows)

    def live_state(self) -> LiveState:
        top = self._tp_rank * len(self._weight)
        state: LiveState = {("logits", (top, 0)): lambda: self._weight}
        for name in self.MOMENTS:
            state[f"logits/{name}", (top, self._own.start)] = lambda name=name: self._moments[name]  # type: ignore[misc]
        return state

    def count_optimizer_steps(self, steps: int) -> None:
        self._step = steps

    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        batch = self._making.global_batch // self._layout.dp
        losses = self._forward(*batches(request.first_sample + self._replica * batch, batch), with_gradient=True)
        dist.all_reduce(self._gradient, group=self._replicas)
        self._gradient /= self._layout.dp
        square = self._gradient.double().square().sum() / self._layout.dp  # replicas have the same
        return StepShares(losses / self._layout.dp, square, torch.zeros(0, dtype=torch.float64))

    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        return None, None

    def update_weights(self, rules: StepRules, scale: float) -> None:
        self._step += 1
        gradient = scale * self._gradient[:, self._own]
        (beta1, beta2), (first, second) = rules.betas, (self._moments[name] for name in self.MOMENTS)
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        scaled = (second / (1 - beta2**self._step)).sqrt() + 1e-8
        self._weight[:, self._own] -= rules.lr * first / (1 - beta1**self._step) / scaled
        if self._layout.zero:
            for replica in range(self._layout.dp):
                left, right = self._columns(self._layout, replica)
                columns = self._weight[:, left:right].contiguous()
                dist.broadcast(columns, self._tp_rank + self._layout.tp * replica, group=self._replicas)
                self._weight[:, left:right] = columns

    def evaluate(self, batches: Batches, sequences: int) -> float:
        batch = sequences // self._layout.dp
        loss = self._forward(*batches(self._replica * batch, batch), with_gradient=False) / self._layout.dp
        dist.all_reduce(loss)
        return float(loss)

    def _forward(self, tokens: torch.Tensor, labels: torch.Tensor, with_gradient: bool) -> torch.Tensor:
        """This rank's share of its replica's mean loss: of the tokens whose rows it has."""
        local = tokens.flatten() - self._tp_rank * len(self._weight)
        mine = (local >= 0) & (local < len(self._weight))
        weight = self._weight.requires_grad_(with_gradient)
        logits = torch.nn.functional.embedding(local[mine], weight)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten()[mine], reduction="sum") / tokens.numel()
        if with_gradient:
            (self._gradient,) = torch.autograd.grad(loss, [weight])
        self._weight.requires_grad_(False)
        return loss.detach().double()

    @property
    def _own(self) -> slice:
        return slice(*self._columns(self._layout, self._replica))

    def _columns(self, layout: Layout, replica: int) -> tuple[int, int]:
        """The columns of the moments that a replica owns."""
        vocab = self._job.model.vocab
        return (vocab * replica // layout.dp, vocab * (replica + 1) // layout.dp) if layout.zero else (0, vocab)
