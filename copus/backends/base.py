"""What a training framework has to offer. The loop, the profiler and the planner know this and nothing more."""

import contextlib
import functools
import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus import sharded_checkpoint
from copus.backends.registry import find_backend
from copus.collectives import RankError, run_on_all_ranks
from copus.fingerprint import fingerprint_of
from copus.hardware import PhaseClock, peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig, JobError
from copus.oom_recovery import World
from copus.reshard.execute import LiveState, misfit, reshard
from copus.reshard.plan import Plan, make_plan, owned_parts
from copus.reshard.table import Place, ShardTable
from copus.sharded_checkpoint import SavedState
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint

Batches = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(first sample, how many) → tokens and labels, int64 of shape (how many, seq_len)."""


@dataclass(frozen=True)
class Parts:
    """The parts that a step's gradient is the mean of, as the noise estimate needs them."""

    squared_norms: np.ndarray
    """|g_j|² of each part's mean gradient, float64 of shape (J,)."""
    part_size: int
    """n, sequences in each part."""
    grad_sq: float
    """|g|² of the mean of the parts, in the same coordinates: the step's own, or that of some weights, or divided by
    Adam's √v̂."""


@dataclass(frozen=True)
class StepRules:
    """What holds for one optimizer step; all of it changes with the batch."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float]
    """Adam's β1 and β2."""
    weight_decay: float | None = None
    """Decoupled weight decay; None for that of the job file."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps before this one, 1 before the first; None if β2 was always as it is now."""

    def beta2_product_before(self, optimizer_steps: int) -> float:
        """Π β2 over the `optimizer_steps` steps so far."""
        return self.betas[1] ** optimizer_steps if self.beta2_product is None else self.beta2_product


@dataclass(frozen=True)
class StepRequest:
    """What is asked of one optimizer step."""

    first_sample: int
    """Where its global batch begins."""
    rules: StepRules
    noise_source: str | None = None
    """What parts to show: a name as in `copus.noise.sources`, or None for none."""
    stop: bool = False
    """Whether this rank asks to stop."""
    writing: bool = False
    """Whether this rank still writes a checkpoint."""
    on_trial: bool = False
    """Whether all ranks are to be able to go back where memory runs out on any."""


@dataclass(frozen=True)
class StepShares:
    """What one rank adds to the figures of a step: summed over all ranks they are the figures. float64, on the device
    of the backend."""

    loss: torch.Tensor
    """Of the mean training loss over the global batch, nats a token. One element."""
    grad_sq: torch.Tensor
    """Of |g|², squared norm of the mean gradient before clipping. One element."""
    parts: torch.Tensor
    """Of whatever `Backend.read_parts` makes parts from; a vector of the same length on all ranks, which may be 0."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step showed; equal on every rank."""

    loss: float
    """Mean training loss over the global batch, nats a token."""
    grad_sq: float
    """|g|², squared norm of the mean gradient before clipping."""
    parts: Parts | None
    """Micro-batches or replicas, where they were asked for and there are at least two."""
    norm_layer_parts: Parts | None
    """Sequences seen by the norm layers' weights alone, where they were asked for and there are at least two."""
    skipped: bool
    """True where the gradient was not finite: the optimizer did nothing."""
    stop: bool
    """True where any rank asked to stop."""
    writing: bool = False
    """True where any rank still writes a checkpoint."""


@dataclass
class TrainerState:
    """What goes into a checkpoint beside weights and optimizer state."""

    samples_consumed: int = 0
    step: int = 0
    data: str = ""
    """Digest of the prepared data that it was trained on."""
    optimizer_steps: int = 0
    """Optimizer steps that were not skipped: Adam's own count."""
    next_lr: float | None = None
    """Learning rate that the next step would have had when this was saved; None in older checkpoints."""
    skipped_in_a_row: int = 0
    """Steps up to now, in a row, whose gradients were not finite."""
    proven_samples: int = 0
    """Sequences trained on before the last step whose gradients were finite: a checkpoint with more of them may hold
    weights that are useless."""
    noise: dict[str, Any] = field(default_factory=dict)
    """State of the noise estimate."""
    norms: list[float] = field(default_factory=list)
    """Norms of the steps since the last decision."""
    planner: dict[str, Any] = field(default_factory=dict)
    """What the planner knows of φ and of the cost of moves."""
    decisions: int = 0
    """Decisions taken so far."""
    critical_batch: float | None = None
    """φ of the latest decision, in sequences, on every rank; None while it is unknown."""
    beta2_product: float | None = None
    """Π β2 over the optimizer steps that were not skipped; None before the first one, and in checkpoints of 0.1.0: then
    β2 counts as constant."""

    @property
    def here(self) -> dict[str, int]:
        """Where the run is, as every event says it."""
        return {"step": self.step, "samples_consumed": self.samples_consumed}


@dataclass(frozen=True)
class Moved:
    """What a move did, over all ranks."""

    bytes_moved: int = 0
    """Bytes that changed rank."""
    peak_bytes: int | None = None
    """Most memory that any rank used meanwhile; None where nothing moved, or the system does not tell."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase on this rank, in order."""


class Backend(ABC):
    """A model in training on one rank.

    A framework says how a layout is built, which rank of it holds which part of the state (`shard_table`), and gives
    its live tensors by the same names. Moves, the way back out of one, recovery and checkpoints follow from that; they
    are written here, once for all frameworks. `build` comes first; every method is collective over all ranks.
    """

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        """`torch.distributed` must be initialised on all the ranks of the job's cluster."""
        self.device = device
        self._job = job
        self._configuration: Configuration | None = None
        self._optimizer_steps = 0
        self._world = World(device, job.launch.timeout_seconds)
        self._table = functools.lru_cache(maxsize=8)(self.shard_table)
        self._owned = functools.lru_cache(maxsize=2)(lambda layout: owned_parts(self._table(layout)))
        self._plan = functools.lru_cache(maxsize=8)(self._make_plan)

    @property
    def is_built(self) -> bool:
        """Whether there is a model."""
        return self._configuration is not None

    @property
    def configuration(self) -> Configuration:
        """The configuration that is built."""
        assert self._configuration is not None, "build() comes first"
        return self._configuration

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that were not skipped."""
        return self._optimizer_steps

    def fingerprint(self) -> Fingerprint:
        """The model, the machine and the software that measurements made here are about."""
        return fingerprint_of(self._job)

    @abstractmethod
    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        """Make groups, model and optimizer. Weights are a function of the seed alone or, without `initial_weights`,
        whatever lies in memory: they are to be filled through `live_state`."""

    @abstractmethod
    def release(self) -> None:
        """Let go of model and optimizer, however far they were built. Process groups may stay for later."""

    @abstractmethod
    def drop_groups(self, broken: bool) -> None:
        """Let go of all process groups that were made. Collective, unless a step has broken them."""

    @abstractmethod
    def shard_table(self, layout: Layout) -> ShardTable:
        """Which rank of a layout holds which part of which field of the state. Needs no other process."""

    @abstractmethod
    def live_state(self) -> LiveState:
        """This rank's shards of the built layout. Statistics of the optimizer that do not exist yet are made, as zeros,
        when they are asked for."""

    @abstractmethod
    def count_optimizer_steps(self, steps: int) -> None:
        """Let the optimizer go on as if it had made this many steps."""

    @abstractmethod
    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        """Forward and backward pass, reduced gradients included, and this rank's shares of the step's figures.

        Changes no weight, so that a step on trial can be taken back until all ranks are through.
        """

    @abstractmethod
    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the full source and those of the norm layers, from the sum of all ranks' `StepShares.parts` and
        |g|² of the step. Not collective."""

    @abstractmethod
    def update_weights(self, rules: StepRules, scale: float) -> None:
        """Multiply the gradients by `scale`, which clips them, and let the optimizer make its step."""

    def train_step(self, batches: Batches, request: StepRequest) -> StepResult:
        """One optimizer step: gradients, then one collective for every figure of it, then the update.

        The update is skipped if the gradient is not finite. If a step `on_trial` finds too little memory on any rank
        before a weight has changed on any, RankError is raised on all, and `recover` or `abandon` has to come
        next.
        """
        with self._world.trial() if request.on_trial else contextlib.nullcontext() as trial:
            shares = self.compute_gradients(batches, request)
            votes = torch.tensor([request.stop, request.writing], dtype=torch.float64, device=self.device)
            message = torch.cat([shares.loss.view(1), shares.grad_sq.view(1), votes, shares.parts])
            dist.all_reduce(message)
            loss, grad_sq, stop, writing, *totals = message.tolist()
            if trial is not None:
                trial.commit()
            skipped = not math.isfinite(grad_sq)
            if not skipped:
                self.update_weights(request.rules, self._clipping(grad_sq))
        self._optimizer_steps += not skipped
        parts, norm_layer_parts = self.read_parts(np.array(totals), grad_sq)
        return StepResult(loss, grad_sq, parts, norm_layer_parts, skipped, stop=stop > 0, writing=writing > 0)

    def _clipping(self, grad_sq: float) -> float:
        """The factor that makes the norm of the gradient at most `training.clip_grad`."""
        limit, norm = self._job.training.clip_grad, grad_sq**0.5
        return limit / (norm + 1e-6) if 0 < limit < norm else 1.0

    @abstractmethod
    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats a token."""

    def build(self, configuration: Configuration) -> None:
        """Make groups, model and optimizer from nothing; what was built before is torn down. Raises ValueError for a
        layout that cannot run, and RankError, on every rank, if one could not build it."""
        self._check(configuration.layout)
        self._tear_down()
        run_on_all_ranks(lambda: self.make(configuration, initial_weights=True))
        self._configuration, self._optimizer_steps = configuration, 0

    def move(self, configuration: Configuration) -> Moved:
        """Go on in another configuration, with the same weights and optimizer state.

        A new batch or micro-batch costs nothing. For a new layout the state goes straight from the ranks that have it
        to the ranks that need it, in these very processes. All ranks move, or none: if the new layout cannot be built
        on any rank, the old one is made again from the tensors that are still there, and RankError raised on all.
        Raises ValueError for a layout that cannot run. Either way the job goes on as before.
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
        self._fill(plan, held, configuration)  # from here on there is no way back: what fails now ends in a restart
        clock.end("transfer")
        return Moved(plan.bytes_moved, _most(peak_memory_bytes(), self.device), clock.seconds)

    def recover(self, configuration: Configuration) -> Moved:
        """Go on in another configuration after a step on trial raised RankError, from the weights before that step.

        Weights and optimizer state are where they were: it is the move back, but for the process groups, which the
        step broke: all are made anew. What fails now ends in a restart.
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
        """Let go of model and groups; what is built next makes its own."""
        self._tear_down()
        self.drop_groups(broken=False)

    def abandon(self) -> None:
        """Let go of the model after a step on trial raised RankError, and make the process groups, which the step
        broke, anew. `build` has to come next."""
        self._tear_down()
        self.drop_groups(broken=True)
        self._world.reform()

    def begin_save(self, folder: Path, copy: bool) -> sharded_checkpoint.Save:
        """Prepare to write weights and optimizer state into an existing, empty folder, in a format that every layout
        can read. With `copy` they are those of now, whatever the job does before they are written. Raises RankError if
        a rank could not."""
        owned, staging_bytes = self._owned(self.configuration.layout), self._job.training.staging_bytes
        return sharded_checkpoint.Save(folder, owned, self.live_state(), staging_bytes, copy)

    def load(self, folder: Path, optimizer_steps: int) -> None:
        """Read them into the layout that is built, without running any code that the files may ask for. Raises JobError
        if the checkpoint is not of this job's model, precision and optimizer."""
        layout = self.configuration.layout
        table, saved = self._table(layout), self.translate_saved(sharded_checkpoint.read_index(folder))
        try:
            sharded_checkpoint.check_saved(saved, table)
        except ValueError as error:
            raise JobError(f"{folder.name}: {error}") from None
        staging_bytes = self._job.training.staging_bytes
        sharded_checkpoint.load(
            folder, saved, self._owned(layout), table, self.live_state(), staging_bytes, self.device
        )
        self.count_optimizer_steps(optimizer_steps)
        self._optimizer_steps = optimizer_steps

    def translate_saved(self, saved: SavedState) -> SavedState:
        """The fields of a checkpoint that an earlier version wrote, under the names that `shard_table` gives them."""
        return saved

    def _check(self, layout: Layout) -> None:
        find_backend(self._job.training.backend).check_layout(layout)
        layout.check(self._job.model, self._job.cluster)

    def _make_plan(self, before: Layout, after: Layout) -> Plan:
        return make_plan(self._table(before), self._table(after), self._job.cluster.accelerators_per_node)

    def _check_shards(self, side: str, table: ShardTable) -> None:
        """Raise ValueError if the live shards of this rank are not those of the table."""
        problem = misfit(side, table, dist.get_rank(), self.live_state().keys())
        if problem:
            raise ValueError(problem)

    def _take_state(self) -> dict[Place, torch.Tensor]:
        """Tear down, but for the tensors of the state."""
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
        """Fill the layout that was made with the state that ranks hold, and let go of that."""
        reshard(plan, held, self.live_state(), self._job.training.staging_bytes, self.device)
        self.count_optimizer_steps(self._optimizer_steps)
        self._configuration = configuration


def _most(amount: int | None, device: torch.device) -> int | None:
    """The largest amount of any rank; None if no rank knows. Collective."""
    most = torch.tensor([-1 if amount is None else amount], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return None if most.item() < 0 else int(most.item())
