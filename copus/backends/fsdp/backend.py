"""torch FSDP2 behind `copus.backends.base.Backend`."""

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.base import Backend
from copus.backends.fsdp import step
from copus.backends.fsdp.built import BuiltModel, ShardedParameter, sharded_parameters
from copus.backends.fsdp.in_backward import BackwardUpdates
from copus.backends.fsdp.mesh import Meshes
from copus.backends.fsdp.model import build_model, initialize, parameter_shapes
from copus.backends.fsdp.part_norms import FsdpPartNorms
from copus.backends.fsdp.shards import fields_of, shard_table
from copus.backends.optimizers.build import count_steps, make_optimizer, step_options
from copus.backends.regions import optimizer_state
from copus.backends.step_contract import Batches, Parts, StepRequest, StepRules, StepShares
from copus.job import JobConfig, JobError
from copus.reshard.execute import LiveState
from copus.reshard.table import MASTER, ShardTable
from profiles.configuration import Configuration
from profiles.layout import Layout


class FsdpBackend(Backend):
    """One rank of an FSDP job."""

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        super().__init__(job, device)
        try:
            self.description.check_node(job.training)
        except ValueError as error:
            raise JobError(f"training.{error}") from None
        self._meshes = Meshes(device, job.launch.timeout_seconds)
        self._shapes = parameter_shapes(job.model)
        self._built: BuiltModel | None = None

    @property
    def built(self) -> BuiltModel:
        """What that consists of on this rank."""
        assert self._built is not None, "build() comes first"
        return self._built

    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        """Make groups, model and optimizer."""
        layout, rank = configuration.layout, dist.get_rank()
        mesh, training = self._meshes.mesh(layout), self._job.training
        model = build_model(self._job, layout, mesh, self.device)
        self._built = built = BuiltModel(self.device, layout, rank, model)
        every = sharded_parameters(model, self._shapes, layout, rank, mesh)
        built.parameters = [sharded for sharded in every if sharded.box.elements]
        if not training.optimizer.elementwise:
            built.empty = [sharded for sharded in every if not sharded.box.elements]
        if initial_weights:
            for sharded in built.parameters:
                initialize(sharded, self._job)
        updated = built.parameters if training.optimizer.elementwise else every
        groups: list[dict[str, Any]] = [
            {"params": [sharded.main for sharded in updated if sharded.decays is decays], "decays": decays}
            for decays in (True, False)
        ]
        held = {sharded.main: sharded.held for sharded in updated}
        built.optimizer = make_optimizer(training, groups, held)
        built.part_norms = FsdpPartNorms(built)
        if training.optimizer_in_backward:
            built.backward_updates = BackwardUpdates(built)

    def release(self) -> None:
        """Let go of model and optimizer; the groups stay for later."""
        if self._built is not None:
            self._built.release()
        self._built = None

    def drop_groups(self, broken: bool) -> None:
        """Let go of the groups of all layouts."""
        if broken:
            self._meshes.forget()
        else:
            self._meshes.destroy()

    def shard_table(self, layout: Layout) -> ShardTable:
        """Weights and optimizer state of every rank of a layout."""
        return shard_table(self._shapes, self._job.training, layout)

    def live_state(self) -> LiveState:
        """The tensors of this rank, by their place in the whole model."""
        state: LiveState = {}
        for sharded in self.built.parameters:
            for fields, axes in fields_of(sharded.name, sharded.whole_shape, self._job.training):
                for field in fields:
                    offset = tuple(sharded.box.offset[axis] for axis in axes)
                    state[field.name, offset] = functools.partial(self._tensor, sharded, field.name, axes)
        return state

    def _tensor(self, sharded: ShardedParameter, field: str, axes: tuple[int, ...]) -> torch.Tensor:
        """What this rank holds of a field of the state."""
        statistic = field.removeprefix(sharded.name).removeprefix("/")
        if statistic in ("", MASTER):
            return sharded.main.data
        assert self.built.optimizer is not None, "it is built"
        shapes = sharded.held.statistic_shapes(self._job.training.optimizer)
        kept = optimizer_state(self.built.optimizer, sharded.main, shapes)[statistic]
        return sharded.held.part_of(kept, axes, sharded.held.regions[0])

    def count_optimizer_steps(self, steps: int) -> None:
        """Give every parameter the step count."""
        assert self.built.optimizer is not None, "it is built"
        count_steps(self.built.optimizer, steps)

    @property
    def _updates_in_backward(self) -> bool:
        """Whether steps update weights in the backward pass. Larger batches are only ever measured in such a job."""
        return self.built.backward_updates is not None and self.configuration.global_batch == 1

    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        """Run the forward and backward passes, and return this rank's shares of the step's figures."""
        configuration = self.executed_configuration(request.noise_source)
        if self._updates_in_backward:
            options = step_options(self._job.training, request.rules, self._optimizer_steps)
            counted = self._counted_share(batches, request)  # of the only rank: all of it
            self.built.backward_updates.start(options, self._label_factor(counted))
        return step.compute_gradients(self.built, configuration, batches, request)

    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the step, from the sum of all ranks' shares."""
        parts: tuple[Parts | None, Parts | None] = self.built.part_norms.parts(totals, grad_sq)
        return parts

    def update_weights(self, rules: StepRules, scale: float) -> None:
        """Clip the gradients and let the optimizer make its step, unless the backward pass has."""
        if self._updates_in_backward:
            return
        options = step_options(self._job.training, rules, self._optimizer_steps)
        step.update_weights(self.built, options, scale)

    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats per token."""
        return step.evaluate(self.built, self.configuration, batches, sequences)
