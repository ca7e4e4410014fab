"""The noise scale in a plain training loop, with the batch by itself: python examples/meter/plain.py

Gradients are accumulated over micro-batches, which is what the noise scale is told from. Under DistributedDataParallel
nothing changes but that the model is wrapped (and `no_sync` saves the reductions in between).
"""

import torch
from torch import nn

import copus

MICRO_BATCH, SEQUENCES, VOCAB = 4, 4_000, 64


def main() -> copus.NoiseMeter:
    """Train a small model, and print the noise scale now and then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, VOCAB))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    meter = copus.NoiseMeter(model, optimizer, micro_batch=MICRO_BATCH, micro_batches=2)
    controller = copus.BatchController(meter, optimizer, most_micro_batches=16)
    while meter.samples < SEQUENCES:
        for _ in range(controller.micro_batches):
            tokens = (VOCAB * torch.rand(MICRO_BATCH, 16) ** 2).long()
            surprises = (torch.rand(tokens.shape) < 0.5) * torch.randint(VOCAB, tokens.shape)
            labels = (3 * tokens + surprises) % VOCAB
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
            (loss / controller.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        if meter.steps % 40 == 0 and meter.noise.value is not None:
            noise, twice = meter.noise, meter.doubling()
            print(
                f"{meter.samples} sequences, batch {meter.global_batch}: noise scale {noise.value:.0f} "
                f"({noise.low:.0f} to {noise.high or float('inf'):.0f}); twice the batch would take "
                f"{1 - twice.steps_ratio:.0%} fewer steps and {twice.samples_ratio - 1:.0%} more sequences"
            )
    return meter


if __name__ == "__main__":
    main()
