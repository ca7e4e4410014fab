"""The noise scale in a Lightning Trainer: python examples/meter/lightning.py

The callback logs with the module's own figures, to whatever loggers the trainer has.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from copus.meter.lightning import NoiseCallback

VOCAB = 64


class Model(pl.LightningModule):
    """Predicts the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(VOCAB, 32), nn.LayerNorm(32), nn.Linear(32, VOCAB))

    def configure_model(self) -> None:
        """Shard with FSDP2 if the strategy is `ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1)`."""
        if self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        """Mean cross entropy."""
        labels = (3 * tokens + 1) % VOCAB
        return nn.functional.cross_entropy(self.network(tokens).flatten(0, 1), labels.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(log: Path | None = None, steps: int = 30, **options: Any) -> pl.Trainer:
    """Train for a few steps of four micro-batches; `options` are further arguments of the trainer."""
    torch.manual_seed(0)
    rows = (VOCAB * torch.rand(8 * steps, 16) ** 2).long()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=4,
        callbacks=[NoiseCallback(log=log)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    trainer.fit(Model(), DataLoader(rows, batch_size=2))
    print(f"noise scale {trainer.callback_metrics['noise_scale']:.1f}")
    return trainer


if __name__ == "__main__":
    main()
