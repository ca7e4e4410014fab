"""DeepSpeed behind `copus.backends.base.Backend`."""

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.adamw import adam_state, adamw_options
from copus.backends.base import Backend
from copus.backends.deepspeed import step
from copus.backends.deepspeed.built import BuiltModel, build, parameter_shapes
from copus.backends.deepspeed.live_state import live_state
from copus.backends.deepspeed.part_norms import DeepSpeedPartNorms
from copus.backends.deepspeed.partitions import shard_table
from copus.backends.deepspeed.upstream import drop_groups
from copus.backends.initial_weights import initial_weight
from copus.backends.step_contract import Batches, Parts, StepRequest, StepRules, StepShares
from copus.optimizers import AdamW
from copus.reshard.execute import LiveState
from copus.reshard.table import MASTER, ShardTable
from profiles.configuration import Configuration
from profiles.layout import Layout


class DeepSpeedBackend(Backend):
    """One rank of a DeepSpeed job."""

    _built: BuiltModel | None = None

    @property
    def built(self) -> BuiltModel:
        """What that consists of on this rank."""
        assert self._built is not None, "build() comes first"
        return self._built

    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        """Make model, optimizer and engine."""
        self._built = built = BuiltModel(self.device, configuration.layout)
        build(built, self._job, configuration)
        built.part_norms = DeepSpeedPartNorms(built)
        if initial_weights:
            self._fill_initial_weights(configuration.layout)
            self.count_optimizer_steps(0)

    @torch.no_grad()
    def _fill_initial_weights(self, layout: Layout) -> None:
        """Draw each whole parameter and keep what this rank holds of it. Masters are rounded to bf16 first."""
        live = self.live_state()
        shape, seed, dtype = self._job.model, self._job.training.seed, self.built.model.dtype
        drawn, whole = "", torch.empty(0)
        for place, (field, box) in self._table(layout).of_rank(dist.get_rank()).items():
            name, _, statistic = field.name.partition("/")
            if statistic not in ("", MASTER):
                continue
            if name != drawn:
                drawn, whole = name, initial_weight(name, field.shape, shape.layers, seed, self.device).to(dtype)
            live[place]().copy_(whole[tuple(map(slice, box.offset, box.stop))])

    def release(self) -> None:
        """Let go of everything that belongs to a layout, so that a job can move for days without growing."""
        if self._built is not None:
            self._built.release()
        self._built = None

    def drop_groups(self, broken: bool) -> None:
        """Let go of the group that DeepSpeed makes for all layouts."""
        drop_groups(broken)

    def shard_table(self, layout: Layout) -> ShardTable:
        """Weights and optimizer state of every rank of a layout."""
        return shard_table(parameter_shapes(self._job.model), self._job.training.precision, layout)

    def live_state(self) -> LiveState:
        """The tensors of this rank, by their place in the whole model."""
        return live_state(self.built, parameter_shapes(self._job.model), self._job.training.precision)

    @torch.no_grad()
    def count_optimizer_steps(self, steps: int) -> None:
        """Give every tensor Adam's step count, and DeepSpeed's copies of fp32 weights the weights' values."""
        built = self.built
        assert built.adam is not None, "it is built"
        for tensor in built.optimized:
            adam_state(built.adam, tensor)["step"].fill_(steps)
        if built.layout.zero and self._job.training.precision == "fp32":
            for master, weight in zip(built.flat_masters, built.flat_weights, strict=True):
                master.copy_(weight)

    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        """Forward and backward pass, and this rank's shares of the step's figures."""
        configuration = self.executed_configuration(request.noise_source)
        return step.compute_gradients(self.built, configuration, batches, request)

    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the step, from the sum of all ranks' shares."""
        parts: tuple[Parts | None, Parts | None] = self.built.part_norms.parts(totals, grad_sq)
        return parts

    def update_weights(self, rules: StepRules, scale: float) -> None:
        """Clip the gradients and let Adam make its step."""
        optimizer = self._job.training.optimizer
        assert isinstance(optimizer, AdamW), "the description has no other"
        step.update_weights(self.built, adamw_options(optimizer, rules, self._optimizer_steps), scale)

    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats per token."""
        return step.evaluate(self.built, self.configuration, batches, sequences)
