"""The noise scale under DistributedDataParallel, FSDP2 or DeepSpeed:

    torchrun --nproc-per-node 2 examples/meter/ranks.py ddp        (or fsdp, or deepspeed)

The meter takes the wrapped model, or the engine, and needs nothing else.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

import copus

MICRO_BATCH, MICRO_BATCHES, STEPS, VOCAB = 4, 2, 30, 64


def wrapped(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The model as the framework trains it."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def main(kind: str) -> copus.NoiseMeter:
    """One rank."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Embedding(VOCAB, 32), nn.LayerNorm(32), nn.Linear(32, VOCAB))
    if kind == "fsdp":
        model = torch.distributed.fsdp.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if kind != "fsdp":
        model = wrapped(kind, model, optimizer)
    meter = copus.NoiseMeter(model, None if kind == "deepspeed" else optimizer)
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            tokens = (VOCAB * torch.rand(MICRO_BATCH, 16) ** 2).long()
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (3 * tokens + 1).flatten() % VOCAB)
            if kind == "deepspeed":
                model.backward(loss)
                model.step()
            else:
                (loss / MICRO_BATCHES).backward()
        if kind != "deepspeed":
            optimizer.step()
            optimizer.zero_grad()
    if meter.leads:
        print(f"{kind}: noise scale {meter.noise.value:.1f} of batches of {meter.global_batch}")
    return meter


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1])
    dist.destroy_process_group()
