"""The noise scale in a loop of megatron-core, with its own schedule and its own optimizer:

    torchrun --nproc-per-node 2 examples/meter/megatron.py

The two lines of the meter are those that go into Megatron-LM or Megatron-Bridge, where model and optimizer are at hand.
On GPUs begin with NCCL instead of gloo, and with `torch.cuda.set_device`.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

import copus
from copus.backends.megatron import cpu

cpu.before_import()  # for machines without CUDA: elsewhere this and `adapt` below do nothing
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

cpu.adapt()

MICRO_BATCH, MICRO_BATCHES, STEPS, TOKENS, VOCAB = 4, 2, 30, 16, 64
CLIP = 1.0 if torch.cuda.is_available() else 0.0  # megatron-core clips on GPUs alone


def forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module):
    """What megatron-core's schedule calls for each micro-batch: losses, and what makes one number of them."""
    tokens = next(batches)
    positions = torch.arange(TOKENS, device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=(3 * tokens + 1) % VOCAB)
    return losses, lambda losses: (losses.float().mean(), {})


def build() -> tuple[list[DistributedDataParallel], object]:
    """A small GPT, data parallel over all ranks, and its optimizer."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(),
        finalize_model_grads_func=finalize_model_grads,
    )
    torch.manual_seed(0)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=VOCAB, max_sequence_length=TOKENS)
    if torch.cuda.is_available():
        model = model.cuda()
    else:  # `cpu.adapt` leaves matrices as they lie in memory
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.02)
    chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=CLIP), chunks, use_gloo_process_groups=False
    )
    return chunks, optimizer


def main() -> copus.NoiseMeter:
    """One rank."""
    chunks, optimizer = build()
    meter = copus.NoiseMeter(chunks, optimizer, micro_batch=MICRO_BATCH, micro_batches=MICRO_BATCHES)
    torch.manual_seed(parallel_state.get_data_parallel_rank())
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [
            (VOCAB * torch.rand(MICRO_BATCH, TOKENS, device=next(chunks[0].parameters()).device) ** 2).long()
            for _ in range(MICRO_BATCHES)
        ]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=chunks[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=TOKENS,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
    if meter.leads:
        print(f"megatron-core: noise scale {meter.noise.value:.1f} of batches of {meter.global_batch}")
    return meter


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
