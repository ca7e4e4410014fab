"""Megatron-core behind `copus.backends.base.Backend`."""

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.adamw import adamw_options
from copus.backends.base import Batches, Moved, StepRequest, StepResult
from copus.backends.megatron import checkpoint, cpu, groups, step, upstream
from copus.backends.megatron.fingerprint import fingerprint
from copus.backends.megatron.limits import check_layout
from copus.backends.megatron.move_plan import plan_move
from copus.collectives import RankError, run_on_all_ranks
from copus.hardware import PhaseClock, peak_memory_bytes, reset_peak_memory
from copus.job import JobConfig
from copus.oom_recovery import World
from copus.reshard.execute import Fields, Place, reshard
from copus.reshard.plan import Plan
from planner.sampling import executed_configuration
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint

cpu.before_import()
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from copus.backends.megatron.built import BuiltModel  # noqa: E402
from copus.backends.megatron.live_state import LiveState, live_state  # noqa: E402
from copus.backends.megatron.model import build_model, transformer_config  # noqa: E402
from copus.backends.megatron.part_norms import PartNorms  # noqa: E402
from copus.backends.megatron.samples import SampleReader  # noqa: E402

cpu.adapt()
upstream.patch_optimizer_loading()
upstream.save_in_this_process()
upstream.use_torch_adam()


class MegatronBackend:
    """One rank of a Megatron-core job."""

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        """`torch.distributed` must be initialised on all the ranks of the job's cluster."""
        gc.freeze()  # modules stay for good: without them the collection of an old layout is 20 times faster
        self.device = device
        self._job = job
        self._configuration: Configuration | None = None
        self._built: BuiltModel | None = None
        self._optimizer_steps = 0
        self._world = World(device, job.launch.timeout_seconds)

    @property
    def is_built(self) -> bool:
        """Whether there is a model."""
        return self._configuration is not None

    @property
    def configuration(self) -> Configuration:
        """What is built."""
        assert self._configuration is not None, "build() comes first"
        return self._configuration

    @property
    def built(self) -> BuiltModel:
        """What that consists of on this rank."""
        assert self._built is not None, "build() comes first"
        return self._built

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that were not skipped."""
        return self._optimizer_steps

    def open_data(self, prepared: Path) -> tuple[Batches, Batches]:
        """Training and held-out sequences of a prepared folder, in an order that depends on the job's seed alone.

        The held-out ones are the same in every job.
        """
        seq_len = self._job.model.seq_len
        train = SampleReader(prepared, "train", seq_len, self._job.total_samples, self._job.training.seed)
        valid = SampleReader(prepared, "valid", seq_len, self._job.evaluate_sequences, seed=0)
        return train.batch, valid.batch

    def fingerprint(self) -> Fingerprint:
        """What measurements made here are about."""
        return fingerprint(self._job)

    def build(self, configuration: Configuration) -> None:
        """Make groups, model and optimizer from nothing; what was built before is torn down. Raises ValueError for a
        layout that this backend cannot run, and RankError, on every rank, where one could not build it."""
        self._check(configuration.layout)
        self._tear_down()
        run_on_all_ranks(lambda: self._make(configuration, initial_weights=True))

    def _check(self, layout: Layout) -> None:
        check_layout(layout)
        layout.check(self._job.model, self._job.cluster)

    def _make(self, configuration: Configuration, initial_weights: bool) -> None:
        layout, training = configuration.layout, self._job.training
        groups.make_groups(layout, self._job.launch.timeout_seconds)
        tensor_parallel.model_parallel_cuda_manual_seed(training.seed)
        config = transformer_config(self._job.model, layout, training.precision, training.dropout)
        seed = training.seed if initial_weights else None
        overlap = training.overlap_grad_reduce
        # Megatron's optimizer begins with a collective: a rank without memory for the model must not miss it alone.
        chunks = run_on_all_ranks(lambda: build_model(self._job.model, layout, config, seed, overlap))
        self._built = built = BuiltModel(self.device, chunks)
        built.optimizer = self._make_optimizer(layout, chunks)
        epsilon = training.optimizer.epsilon if self._job.planner.noise_metric == "adam" else None
        built.part_norms = PartNorms(chunks, built.optimizer, layout, self._job.model.tied_embeddings, epsilon)
        self._optimizer_steps = 0
        self._configuration = configuration

    def _make_optimizer(self, layout: Layout, chunks: list[Any]) -> Any:
        training = self._job.training
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=training.lr,
                clip_grad=0.0,  # the step clips, by the norm that it has anyway
                bf16=training.precision == "bf16",
                params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
                use_distributed_optimizer=layout.zero > 0,
            ),
            chunks,
            use_gloo_process_groups=False,
        )
        _fuse(optimizer)
        return optimizer

    def _tear_down(self) -> None:
        """Let go of everything that belongs to a layout, so that a job can move for days without growing."""
        if self._built is not None:
            self._built.release()
        self._built, self._configuration = None, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        groups.leave_groups()

    def close(self) -> None:
        """Let go of model and groups; what is built next makes its own. Collective."""
        self._tear_down()
        groups.destroy_groups()

    def train_step(self, batches: Batches, request: StepRequest) -> StepResult:
        """One optimizer step.

        A step `on_trial` for which any rank has too little memory raises RankError on all; `recover` has to follow.

        Where the configuration has one micro-batch only, and micro-batches are to be measured, the step is run as two
        of half the size: the same gradient, and parts to measure. An odd number of sequences cannot be halved: then
        `parts` is None.
        """
        configuration = executed_configuration(self.configuration, request.noise_source)
        with self._world.trial() if request.on_trial else contextlib.nullcontext() as trial:
            self._seed_dropout(request.first_sample)
            result = step.compute_gradients(self.built, configuration, batches, request, self._optimizer_steps)
            if trial is not None:
                trial.commit()
            if not result.skipped:
                options = adamw_options(self._job.training.optimizer, request.rules, self._optimizer_steps)
                step.update_weights(self.built, options, self._job.training.clip_grad, result.grad_sq)
        self._optimizer_steps += not result.skipped
        return result

    def _seed_dropout(self, first_sample: int) -> None:
        """Dropout is a function of seed, samples and rank, so that a resumed run needs no random state to be saved.

        Replicas and stages drop different things, as in megatron's own launcher; tensor parallel ranks get their offset
        inside of megatron.
        """
        if self._job.training.dropout:
            place = (
                100 * parallel_state.get_pipeline_model_parallel_rank()
                + 10_000 * parallel_state.get_data_parallel_rank()
            )
            seed = self._job.training.seed + 7919 * first_sample + place
            tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31)

    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats a token."""
        return step.evaluate(self.built, self.configuration, batches, sequences)

    def live_state(self) -> LiveState:
        """The tensors of this rank, by their place in the whole model."""
        return live_state(self.built, self._job.model, self.configuration.layout)

    def move(self, configuration: Configuration) -> Moved:
        """Go on in another configuration, with the same weights and optimizer state.

        A new batch or micro-batch costs nothing. For a new layout the state goes straight from the ranks that have it
        to the ranks that need it, in these very processes. All ranks move, or none: where the new layout cannot be
        built on any rank, the old one is made again from the tensors that are still there, and RankError raised
        on all. Raises ValueError for a layout that cannot run. Either way the job goes on as before.
        """
        if configuration.layout == self.configuration.layout:
            self._configuration = configuration
            return Moved()
        self._check(configuration.layout)
        before, steps = self.configuration, self._optimizer_steps
        reset_peak_memory()
        clock = PhaseClock()
        plan = self._plan(before.layout, configuration.layout)
        clock.end("plan")
        held = self._take_state()
        clock.end("tear_down")
        try:
            run_on_all_ranks(lambda: self._make_empty(configuration))
        except RankError:
            self._tear_down()
            self._make_empty(before)
            self._fill(self._plan(before.layout, before.layout), held, steps)
            raise
        clock.end("build")
        self._fill(plan, held, steps)  # from here on there is no way back: what fails now ends in a restart
        clock.end("transfer")
        return Moved(plan.bytes_moved, most_of(peak_memory_bytes(), self.device), clock.seconds)

    def recover(self, configuration: Configuration) -> Moved:
        """Go on in another configuration after a step on trial raised RankError, from the weights before that step.

        Weights and optimizer state are where they were: it is the move back, but for the process groups, which the
        step broke: all are made anew. What fails now ends in a restart.
        """
        before, steps = self.configuration, self._optimizer_steps
        reset_peak_memory()
        clock = PhaseClock()
        plan = self._plan(before.layout, configuration.layout)
        held = self._take_state()
        clock.end("tear_down")
        groups.forget_groups()
        self._world.reform()
        clock.end("groups")
        self._make_empty(configuration)
        clock.end("build")
        self._fill(plan, held, steps)
        clock.end("transfer")
        return Moved(plan.bytes_moved, most_of(peak_memory_bytes(), self.device), clock.seconds)

    def _plan(self, before: Layout, after: Layout) -> Plan:
        nodes = self._job.cluster.accelerators_per_node
        return plan_move(self._job.model, before, after, self._job.training.precision, nodes)

    def _make_empty(self, configuration: Configuration) -> None:
        """Build a configuration with room for weights and optimizer state, and nothing in it yet."""
        self._make(configuration, initial_weights=False)

    def _take_state(self) -> dict[Place, Fields]:
        """Tear down, but for the tensors of the state."""
        upstream.prime_adam(self.built.optimizer)  # a job that moves before its first step has no moments yet
        held = {place: fields() for place, fields in self.live_state().items()}
        self._tear_down()
        return held

    def _fill(self, plan: Plan, held: dict[Place, Fields], steps: int) -> None:
        """Fill what was built with the state that ranks hold, and let go of that."""
        reshard(plan, held, self.live_state(), self._job.training.staging_bytes, self.device)
        upstream.set_adam_step(self.built.optimizer, steps)
        self._optimizer_steps = steps

    def begin_save(self, folder: Path, copy: bool) -> checkpoint.Save:
        """Prepare to write weights and optimizer state into an existing, empty folder, in a format that every layout
        can read. With `copy` the job may train on, and move, before they are written."""
        return checkpoint.Save(folder, self.built, copy)

    def load(self, folder: Path, optimizer_steps: int) -> None:
        """Read them into what is built."""
        checkpoint.load(folder, self.built, optimizer_steps)
        _fuse(self.built.optimizer)
        self._optimizer_steps = optimizer_steps


def _fuse(optimizer: Any) -> None:
    """Update in one pass over the memory instead of ten, also after a checkpoint has brought the options that it was
    saved with. All others are set at every step."""
    for inner in upstream.inner_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False


def most_of(amount: int | None, device: torch.device) -> int | None:
    """The largest amount of any rank; None where no rank knows. Collective."""
    most = torch.tensor([-1 if amount is None else amount], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return None if most.item() < 0 else int(most.item())
