"""The class that a training framework implements. The loop and the profiler use this class and nothing else."""

import contextlib
import functools
import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.registry import find_backend
from copus.backends.step_contract import NOT_COUNTED, Batches, Parts, StepRequest, StepResult, StepRules, StepShares
from copus.checkpoints import sharded
from copus.checkpoints.sharded import SavedState
from copus.collectives import RankError, run_on_all_ranks
from copus.expert_load import expert_load
from copus.fingerprint import fingerprint_of
from copus.hardware import PhaseClock, peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig, JobError
from copus.oom_recovery import World
from copus.reshard.execute import LiveState, misfit, reshard
from copus.reshard.plan import Plan, make_plan, owned_parts
from copus.reshard.table import MASTER, Field, Place, ShardTable
from planner.sampling import executed_configuration
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint


@dataclass(frozen=True)
class Moved:
    """The cost of a move, over all ranks."""

    bytes_moved: int = 0
    """Bytes that changed rank."""
    peak_bytes: int | None = None
    """The most memory that any rank used during the move; None if nothing moved or the system does not report it."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase on this rank, in order."""


class Backend(ABC):
    """A model in training on one rank.

    The abstract methods are a framework's own: how to build a layout, which rank holds which part of the state
    (`shard_table`), the live tensors under the same names, and the three parts of a step. Moves, undoing a failed
    move, recovery and checkpoints follow from those; they are written here, once for all frameworks. Call `build`
    first. Every method is collective over all ranks unless it says otherwise.
    """

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        """`torch.distributed` must be initialised on all the ranks of the job's cluster."""
        self.device = device
        self.description = find_backend(job.training.backend).for_training(job.training)
        """The torch-free description of this backend."""
        self._job = job
        self._configuration: Configuration | None = None
        self._optimizer_steps = 0
        self._was_built = False
        self._world = World(device, job.launch.timeout_seconds)
        self._table = functools.lru_cache(maxsize=8)(self.shard_table)
        self._owned = functools.lru_cache(maxsize=2)(lambda layout: owned_parts(self._table(layout)))
        self._plan = functools.lru_cache(maxsize=8)(self._make_plan)

    @property
    def is_built(self) -> bool:
        """Whether a model is built."""
        return self._configuration is not None

    @property
    def configuration(self) -> Configuration:
        """The configuration that is built."""
        assert self._configuration is not None, "build() comes first"
        return self._configuration

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps so far, without the skipped ones."""
        return self._optimizer_steps

    def executed_configuration(self, noise_source: str | None) -> Configuration:
        """The configuration that a step with this noise source executes. A lone micro-batch is run as two halves if
        micro-batches are to be compared: the gradient is the same, and has two parts."""
        return executed_configuration(self.description, self.configuration, noise_source)

    def fingerprint(self) -> Fingerprint:
        """Identifies the model, the machine and the software that were measured."""
        return fingerprint_of(self._job)

    @abstractmethod
    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        """Make groups, model and optimizer. The weights are a function of the seed alone; without `initial_weights`
        they are uninitialized, and the caller fills them through `live_state`."""

    @abstractmethod
    def release(self) -> None:
        """Free the model and the optimizer, however far they were built. Process groups may stay for later use."""

    @abstractmethod
    def drop_groups(self, broken: bool) -> None:
        """Destroy all process groups that were made. Collective, unless a step has broken them."""

    @abstractmethod
    def shard_table(self, layout: Layout) -> ShardTable:
        """Which rank of a layout holds which part of which field of the state. Not collective."""

    @abstractmethod
    def live_state(self) -> LiveState:
        """This rank's shards of the layout that is built. Optimizer statistics that do not exist yet are created as
        zeros when they are read."""

    @abstractmethod
    def count_optimizer_steps(self, steps: int) -> None:
        """Set the optimizer's step count."""

    @abstractmethod
    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        """Run the forward and backward passes, reduce the gradients, and return this rank's shares of the step's
        figures.

        Changes no weight, so that a step on trial can be undone until every rank has finished it; but with
        `training.optimizer_in_backward`.
        """

    @abstractmethod
    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the full source and those of the norm layers, computed from the sum of all ranks'
        `StepShares.parts` and |g|² of the step. Not collective."""

    @abstractmethod
    def update_weights(self, rules: StepRules, scale: float) -> None:
        """Multiply the gradients by `scale`, which clips them, and run the optimizer."""

    @abstractmethod
    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over all labels of the first `sequences` held-out sequences, nats per token. `held_out_loss` makes
        the mean over those that count of it."""

    # From here on everything follows from the methods above, for every framework.

    def train_step(self, batches: Batches, request: StepRequest) -> StepResult:
        """Run one optimizer step: gradients, then one all-reduce of every figure of the step, then the update.

        The update is skipped if the gradient is not finite. If any rank runs out of memory in a step `on_trial`
        before a weight has changed, RankError is raised on all ranks; call `recover` or `abandon` next.
        """
        with self._world.trial() if request.on_trial else contextlib.nullcontext() as trial:
            shares = self.compute_gradients(batches, request)
            share = self._counted_share(batches, request)
            votes = request.stop, request.writing, request.save
            own = torch.tensor([*votes, share], dtype=torch.float64, device=self.device)
            figures = [shares.loss.view(1), shares.grad_sq.view(1), own, shares.parts]
            if shares.expert_tokens is not None:
                figures.append(shares.expert_tokens.view(-1))
            message = torch.cat(figures)
            dist.all_reduce(message)
            loss, grad_sq, stop, writing, save, counted, *totals = message.tolist()
            if trial is not None:
                trial.commit()
            factor = self._label_factor(counted)
            skipped = not math.isfinite(grad_sq * factor**2)
            if not skipped:
                self.update_weights(request.rules, self._clipping(grad_sq * factor**2) * factor)
        self._optimizer_steps += not skipped
        count = len(shares.parts)
        full, norm_layers = (_scaled(parts, factor) for parts in self.read_parts(np.array(totals[:count]), grad_sq))
        load = None
        if shares.expert_tokens is not None:
            tokens = np.array(totals[count:]).reshape(shares.expert_tokens.shape)
            load = expert_load(tokens, self._job.model, self.configuration.global_batch)
        asked = {"stop": stop > 0, "writing": writing > 0, "save": save > 0}
        return StepResult(loss * factor, grad_sq * factor**2, full, norm_layers, skipped, expert_load=load, **asked)

    def held_out_loss(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the labels that count in the first `sequences` held-out sequences, nats per token. Raises
        JobError if none counts."""
        if not self._job.data.masks_labels:
            return self.evaluate(batches, sequences)
        counted = torch.tensor(self._count_labels(batches, 0, sequences), dtype=torch.float64, device=self.device)
        dist.all_reduce(counted)
        if not counted:
            raise JobError(f"data: no token of the first {sequences} held-out sequences counts: hold out more")
        return self.evaluate(batches, sequences) / float(counted)

    def _counted_share(self, batches: Batches, request: StepRequest) -> float:
        """`_count_labels` of a step; 0 in a job in which all labels count, where nobody needs it."""
        if not self._job.data.masks_labels:
            return 0.0
        return self._count_labels(batches, request.first_sample, self.configuration.global_batch)

    def _count_labels(self, batches: Batches, first_sample: int, sequences: int) -> float:
        """This rank's share of the labels that count, over all labels of the sequences. Not collective.

        The ranks share the sequences for this as they are, whichever replica trains on them.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        first, last = (sequences * place // world for place in (rank, rank + 1))
        if first == last:
            return 0.0
        labels = batches(first_sample + first, last - first)[1]
        return int((labels != NOT_COUNTED).sum()) / (sequences * labels.shape[1])

    def _label_factor(self, counted: float) -> float:
        """Backends divide by all labels, whether they count or not. This factor makes losses and gradients means over
        those that count, which are the share `counted` of all."""
        if not self._job.data.masks_labels:
            return 1.0
        return 1 / counted if counted else math.nan

    def _clipping(self, grad_sq: float) -> float:
        """The factor that makes the norm of the gradient at most `training.clip_grad`."""
        limit, norm = self._job.training.clip_grad, grad_sq**0.5
        return limit / (norm + 1e-6) if 0 < limit < norm else 1.0

    def build(self, configuration: Configuration, initial_weights: bool = True) -> None:
        """Make groups, model and optimizer anew, after tearing down what was built before. Without `initial_weights`
        the weights are uninitialized: `load` or `load_weights` comes next.

        Raises ValueError for a layout that cannot run, and RankError on every rank if any rank could not build it.
        """
        self._check(configuration.layout)
        self._tear_down()
        if not self._was_built:
            gc.freeze()  # modules stay for good: without them the collection of an old layout is 20 times faster
            self._was_built = True
        run_on_all_ranks(lambda: self.make(configuration, initial_weights))
        self._configuration, self._optimizer_steps = configuration, 0

    def move(self, configuration: Configuration) -> Moved:
        """Continue in another configuration with the same weights and optimizer state.

        A new batch or micro-batch costs nothing. For a new layout the state goes directly from the ranks that hold it
        to the ranks that need it, in the same processes. All ranks move, or none: if any rank cannot build the new
        layout, the old one is rebuilt from the tensors that are still there, and RankError is raised on all ranks.
        Raises ValueError for a layout that cannot run. After either error the job can train on as before; after a
        MidCollectiveError, which only this rank may meet, it has to restart.
        """
        if configuration.layout == self.configuration.layout:
            self._configuration = configuration
            return Moved()
        self._check(configuration.layout)
        before = self.configuration
        reset_peak_memory()
        clock = PhaseClock()
        plan = self._plan(before.layout, configuration.layout)
        run_on_all_ranks(lambda: self._check_shards("held", plan.held), ValueError)
        clock.end("plan")
        held = self._take_state()
        clock.end("tear_down")

        def make() -> None:
            self.make(configuration, initial_weights=False)
            self._check_shards("needed", plan.needed)

        try:
            run_on_all_ranks(make)
        except RankError:
            self._tear_down()
            self.make(before, initial_weights=False)
            self._fill(self._plan(before.layout, before.layout), held, before)
            raise
        clock.end("build")
        self._fill(plan, held, configuration)  # an error from here on cannot be undone and ends in a restart
        clock.end("transfer")
        return Moved(plan.bytes_moved, _most(peak_memory_bytes(), self.device), clock.seconds)

    def recover(self, configuration: Configuration) -> Moved:
        """Continue in another configuration after a step on trial raised RankError, from the weights before that step.

        This is a move back, except that the failed step has broken all process groups, so they are made anew. An
        error in here ends in a restart.
        """
        reset_peak_memory()
        clock = PhaseClock()
        plan = self._plan(self.configuration.layout, configuration.layout)
        held = self._take_state()
        clock.end("tear_down")
        self.drop_groups(broken=True)
        self._world.reform()
        clock.end("groups")
        self.make(configuration, initial_weights=False)
        clock.end("build")
        self._fill(plan, held, configuration)
        clock.end("transfer")
        return Moved(plan.bytes_moved, _most(peak_memory_bytes(), self.device), clock.seconds)

    def close(self) -> None:
        """Free the model and destroy the groups; the next `build` makes its own."""
        self._tear_down()
        self.drop_groups(broken=False)

    def abandon(self) -> None:
        """Free the model after a step on trial raised RankError, and make anew the process groups that the step broke.
        Call `build` next."""
        self.leave()
        self._world.reform()

    def leave(self) -> None:
        """Free the model, and forget all process groups, which other ranks may have left already. Not collective."""
        self._tear_down()
        self.drop_groups(broken=True)

    def begin_save(self, folder: Path, copy: bool) -> sharded.Save:
        """Prepare to write weights and optimizer state into an existing, empty folder, in a format that every layout
        can read. With `copy`, later steps do not change the data to be written. Raises RankError if any rank failed."""
        owned, staging_bytes = self._owned(self.configuration.layout), self._job.training.staging_bytes
        return sharded.Save(folder, owned, self.live_state(), staging_bytes, copy)

    def load(self, folder: Path, optimizer_steps: int) -> None:
        """Read weights and optimizer state into the layout that is built; no code in the files is executed. Raises
        JobError if the checkpoint is not of this job's model and optimizer."""
        self.load_state(folder, self.translate_saved(sharded.read_index(folder)), optimizer_steps)

    def load_state(self, folder: Path, saved: SavedState, optimizer_steps: int) -> None:
        """The same where `saved` says what is where in the files of the folder."""
        self._read(folder, saved, lambda field: True, begins_anew=False)
        self.count_optimizer_steps(optimizer_steps)
        self._optimizer_steps = optimizer_steps

    def load_weights(self, folder: Path, weights: SavedState) -> None:
        """Read weights alone into the layout that is built, whose optimizer has not made a step. `weights` says where
        each of them is in the files of the folder, in whatever precision. Raises JobError if they are not those of
        this job's model."""
        self._read(folder, weights, lambda field: field.name.partition("/")[2] in ("", MASTER), begins_anew=True)
        self.count_optimizer_steps(0)

    def _read(self, folder: Path, saved: SavedState, wanted: Callable[[Field], bool], begins_anew: bool) -> None:
        """Read the wanted fields from files into the live state of the layout that is built."""
        layout = self.configuration.layout
        table, owned = (table.with_fields(wanted) for table in (self._table(layout), self._owned(layout)))
        try:
            sources = sharded.find_sources(saved, table, begins_anew=begins_anew)
        except ValueError as error:
            raise JobError(f"{folder.name}: {error}") from None
        staging_bytes = self._job.training.staging_bytes
        sharded.load(folder, sources, owned, table, self.live_state(), staging_bytes, self.device)

    def translate_saved(self, saved: SavedState) -> SavedState:
        """The fields of a checkpoint from an earlier version, renamed to the names that `shard_table` uses."""
        return saved

    def _check(self, layout: Layout) -> None:
        self.description.check_layout(layout)
        self.description.check_optimizer_in(layout)
        self.description.check_model_in(layout, self._job.model)
        layout.check(self._job.model, self._job.cluster)

    def _make_plan(self, before: Layout, after: Layout) -> Plan:
        return make_plan(self._table(before), self._table(after), self._job.cluster.accelerators_per_node)

    def _check_shards(self, side: str, table: ShardTable) -> None:
        """Raise ValueError if this rank's live shards differ from the table."""
        problem = misfit(side, table, dist.get_rank(), self.live_state().keys())
        if problem:
            raise ValueError(problem)

    def _take_state(self) -> dict[Place, torch.Tensor]:
        """Tear down everything except the tensors of the state, which are returned."""
        held = {place: tensor() for place, tensor in self.live_state().items()}
        self._tear_down()
        return held

    def _tear_down(self) -> None:
        self.release()
        self._configuration = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fill(self, plan: Plan, held: dict[Place, torch.Tensor], configuration: Configuration) -> None:
        """Fill the new layout with the state that the ranks hold, and free the old tensors."""
        reshard(plan, held, self.live_state(), self._job.training.staging_bytes, self.device)
        self.count_optimizer_steps(self._optimizer_steps)
        self._configuration = configuration


def _scaled(parts: Parts | None, factor: float) -> Parts | None:
    """The parts of a gradient that is `factor` times as large."""
    if parts is None or factor == 1:
        return parts
    return replace(parts, squared_norms=parts.squared_norms * factor**2, grad_sq=parts.grad_sq * factor**2)


def _most(amount: int | None, device: torch.device) -> int | None:
    """The largest amount of any rank; None if no rank has one. Collective."""
    most = torch.tensor([-1 if amount is None else amount], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return None if most.item() < 0 else int(most.item())
