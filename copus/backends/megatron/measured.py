"""A user's own model and optimizer of megatron-core, as `copus.NoiseMeter` sees them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.local_tensors import unwrap
from copus.backends.megatron.main_params import shares_out_moments
from copus.backends.megatron.part_norms import PartNorms
from copus.backends.megatron.step import local_grad_sq
from copus.meter.measured import MeasuredModel
from profiles.configuration import Configuration
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402


class MegatronModel(MeasuredModel):
    """Model chunks in megatron-core's DistributedDataParallel, and its optimizer, under tensor, pipeline and data
    parallelism. Its norms are not measured."""

    name = "megatron-core"
    called = None

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        super().__init__()
        config = chunks[0].config
        if not hasattr(optimizer, "chained_optimizers"):
            raise TypeError("optimizer: expected the one that megatron-core's get_megatron_optimizer returns")
        degrees = {
            "context": parallel_state.get_context_parallel_world_size(),
            "expert": config.expert_model_parallel_size,
        }
        for kind, degree in degrees.items():
            if degree > 1:
                raise ValueError(f"model: {kind} parallelism ({degree}) cannot be measured in a loop of one's own yet")
        tp, etp = parallel_state.get_tensor_model_parallel_world_size(), config.expert_tensor_parallel_size
        if config.num_moe_experts and etp not in (None, tp):
            raise ValueError(
                f"model: expert_tensor_parallel_size({etp}) beside tensor parallelism ({tp}) cannot be measured in a "
                "loop of one's own yet"
            )
        if config.calculate_per_token_loss:
            raise ValueError(
                "model: calculate_per_token_loss sums the loss and divides it after the reduction; the "
                "meter needs micro-batches that are averaged"
            )
        if config.fp16:
            raise ValueError("model: megatron-core scales the loss of fp16, and changes the scale; use bf16 or fp32")
        self.layout = Layout(
            tp=tp,
            pp=parallel_state.get_pipeline_model_parallel_world_size(),
            vp=len(chunks),
            dp=parallel_state.get_data_parallel_world_size(),
            sequence_parallel=config.sequence_parallel,
            zero=int(shares_out_moments(optimizer)),
        )
        self.device = next(chunks[0].parameters()).device
        self.group = dist.group.WORLD
        tied = bool(getattr(unwrap(chunks[0]), "share_embeddings_and_output_weights", False))
        self.part_norms = PartNorms(chunks, optimizer, self.layout, tied, None)
        self.traits.has_norm_layers = False
        self.traits.shows_microbatches = not config.gradient_accumulation_fusion
        self._built = BuiltModel(self.device, self.layout, chunks, optimizer, part_norms=self.part_norms)
        self._prepare: Callable[..., Any] | None = None
        self._configuration: Configuration | None = None
        self._forward_passes = 0
        self._counting = chunks[0].register_forward_pre_hook(self._before_forward)
        is_first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
        if is_first and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            self.returns_loss = unwrap(chunks[-1])

    def _before_forward(self, *_: Any) -> None:
        self._forward_passes += torch.is_grad_enabled()

    @property
    def passes(self) -> int:
        """Forward passes of the step, of which each has its backward pass; as many as were said if the chunks are not
        called as modules."""
        said = 0 if self._configuration is None else self._configuration.num_microbatches
        return self._forward_passes or said

    def watch(self, after_pass: Callable[[], None], at_step: Callable[[], None]) -> None:
        """When the optimizer has got its gradients, right before it clips them."""
        self._prepare = prepare = self._built.optimizer.prepare_grads

        def prepare_grads(*arguments: Any, **options: Any) -> Any:
            found_inf = prepare(*arguments, **options)
            at_step()
            return found_inf

        self._built.optimizer.prepare_grads = prepare_grads

    def start(self, source: str | None, configuration: Configuration) -> None:
        """Begin a step."""
        self._configuration = configuration
        self._forward_passes = 0
        self.part_norms.start(source, configuration, 1.0)

    def grad_sq_share(self) -> torch.Tensor:
        """This rank's share of |g|² of the step's mean gradient."""
        assert self._configuration is not None, "a step was begun"
        return local_grad_sq(self._built, self._configuration)

    def close(self) -> None:
        """Remove all hooks."""
        if self._configuration is not None:  # a step was begun: nothing of it is of interest
            self.part_norms.start(None, self._configuration, 1.0)
        super().close()
        self._counting.remove()
        if self._prepare is not None:
            del self._built.optimizer.prepare_grads  # the method is there again
