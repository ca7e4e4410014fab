"""Megatron-core behind `copus.backends.base.Backend`."""

from typing import Any

import numpy as np
import torch

from copus.backends.base import Backend
from copus.backends.megatron import cpu, groups, step, upstream
from copus.backends.optimizers.build import count_steps, step_options
from copus.backends.step_contract import Batches, Parts, StepRequest, StepRules, StepShares
from copus.checkpoints.sharded import SavedState
from copus.collectives import run_on_all_ranks
from copus.job import JobConfig, JobError
from copus.optimizers import AdamW
from copus.reshard.execute import LiveState
from copus.reshard.table import ShardTable
from copus.weights import former_checkpoint
from profiles.configuration import Configuration
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from copus.backends.megatron.built import BuiltModel  # noqa: E402
from copus.backends.megatron.experts import ExpertTokens  # noqa: E402
from copus.backends.megatron.inner_optimizer import use_optimizer_of_job  # noqa: E402
from copus.backends.megatron.live_state import live_state  # noqa: E402
from copus.backends.megatron.model import build_model  # noqa: E402
from copus.backends.megatron.part_norms import PartNorms  # noqa: E402
from copus.backends.megatron.shard_table import shard_table  # noqa: E402

cpu.adapt()
upstream.use_torch_adam()
upstream.use_torch_router()


class MegatronBackend(Backend):
    """One rank of a Megatron-core job."""

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        super().__init__(job, device)
        try:
            self.description.check_node(job.training)
        except ValueError as error:
            raise JobError(f"training.{error}") from None
        self._built: BuiltModel | None = None

    @property
    def built(self) -> BuiltModel:
        """Its parts on this rank."""
        assert self._built is not None, "build() comes first"
        return self._built

    def make(self, configuration: Configuration, initial_weights: bool) -> None:
        """Make groups, model and optimizer."""
        layout, training = configuration.layout, self._job.training
        groups.make_groups(layout, self._job.launch.timeout_seconds)
        tensor_parallel.model_parallel_cuda_manual_seed(training.seed)
        seed = training.seed if initial_weights else None
        # Megatron's optimizer begins with a collective, which a rank without memory for the model must not miss alone.
        chunks = run_on_all_ranks(lambda: build_model(self._job, layout, seed))
        self._built = built = BuiltModel(self.device, layout, chunks)
        built.separates_documents = self._job.data.separates_documents
        built.optimizer = self._make_optimizer(layout, chunks)
        built.expert_tokens = ExpertTokens(chunks, self._job.model)
        optimizer = training.optimizer
        adam_epsilon = optimizer.epsilon if isinstance(optimizer, AdamW) else None
        epsilon = adam_epsilon if self._job.planner.noise_metric == "adam" else None
        built.part_norms = PartNorms(chunks, built.optimizer, layout, self._job.model.tied_embeddings, epsilon)

    def _make_optimizer(self, layout: Layout, chunks: list[Any]) -> Any:
        training = self._job.training
        if training.without_masters:
            for chunk in chunks:
                for param in chunk.parameters():
                    param.grad_dtype = None  # Megatron's fp32 sums become gradients of bf16 weights
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=training.lr,
                clip_grad=0.0,  # the step clips, by the norm that it computes anyway
                bf16=not training.without_masters and training.has_bf16_weights,  # whether there are masters
                params_dtype=torch.bfloat16 if training.has_bf16_weights else torch.float32,
                use_distributed_optimizer=layout.zero > 0,
            ),
            chunks,
            use_gloo_process_groups=False,
        )
        use_optimizer_of_job(optimizer, chunks, self._job, layout)
        return optimizer

    def release(self) -> None:
        """Free everything that belongs to a layout, so that a job can move for days without growing."""
        if self._built is not None:
            self._built.release()
        self._built = None
        groups.leave_groups()

    def drop_groups(self, broken: bool) -> None:
        """Let go of the groups of all layouts."""
        if broken:
            groups.forget_groups()
        else:
            groups.destroy_groups()

    def shard_table(self, layout: Layout) -> ShardTable:
        """Weights and optimizer state of every rank of a layout."""
        return shard_table(self._job, layout)

    def live_state(self) -> LiveState:
        """The live tensors of this rank, by their place in the whole model."""
        return live_state(self.built, self._job.model, self._job.training)

    def count_optimizer_steps(self, steps: int) -> None:
        """Give every parameter the step count."""
        for inner in upstream.inner_optimizers(self.built.optimizer):
            count_steps(inner, steps)

    def compute_gradients(self, batches: Batches, request: StepRequest) -> StepShares:
        """Run the forward and backward passes, and return this rank's shares of the step's figures."""
        configuration = self.executed_configuration(request.noise_source)
        self._seed_dropout(request.first_sample)
        return step.compute_gradients(self.built, configuration, batches, request, self._optimizer_steps)

    def read_parts(self, totals: np.ndarray, grad_sq: float) -> tuple[Parts | None, Parts | None]:
        """The parts of the step, from the sum of all ranks' shares."""
        assert self.built.part_norms is not None, "it is built"
        return self.built.part_norms.parts(totals, grad_sq)

    def update_weights(self, rules: StepRules, scale: float) -> None:
        """Clip the gradients and let the optimizer make its step."""
        options = step_options(self._job.training, rules, self._optimizer_steps)
        step.update_weights(self.built, options, scale)

    def _seed_dropout(self, first_sample: int) -> None:
        """Seed dropout by seed, samples and rank, so that no random state has to be saved for a resume.

        Replicas and stages drop different elements, as in Megatron's own launcher. Megatron itself gives
        tensor-parallel ranks their offset.
        """
        if self._job.training.dropout:
            place = (
                100 * parallel_state.get_pipeline_model_parallel_rank()
                + 10_000 * parallel_state.get_data_parallel_rank(with_context_parallel=True)
            )
            seed = self._job.training.seed + 7919 * first_sample + place
            tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31)

    def evaluate(self, batches: Batches, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, nats per token."""
        return step.evaluate(self.built, self.configuration, batches, sequences)

    def translate_saved(self, saved: SavedState) -> SavedState:
        """The fields of a checkpoint of an earlier version under the names of today."""
        return former_checkpoint.translate(saved, self._job.model)
