"""The noise scale in a Lightning `Trainer`."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from copus.meter.noise_meter import NoiseMeter


class NoiseCallback(Callback):
    """Measures the noise scale of a module with automatic optimization, alone, under DDP, FSDP2 or DeepSpeed, and logs
    it with the module's own figures: `Trainer(callbacks=[NoiseCallback()])`."""

    def __init__(self, *, log: Path | str | None = None, **meter: Any) -> None:
        """`log` is a file for the lines of `NoiseMeter.log`; everything else goes to the `NoiseMeter`."""
        self._log = log
        self._options = meter
        self.meter: NoiseMeter | None = None
        """The meter, from the beginning of the training on."""
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the meter, on the model as the strategy has wrapped it. Raises ValueError for manual optimization, whose
        steps Lightning does not know."""
        if not pl_module.automatic_optimization:
            raise ValueError("NoiseCallback: the module optimizes by hand; use copus.NoiseMeter in its training_step")
        micro_batch = getattr(trainer.train_dataloader, "batch_size", None)
        options: dict[str, Any] = {"micro_batch": micro_batch, "micro_batches": trainer.accumulate_grad_batches}
        self.meter = NoiseMeter(_sharded_root(trainer.strategy.model), **{**options, **self._options})
        self._updates = trainer.global_step
        if self._log is not None:
            self.meter.log(self._log)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log after every update of the weights."""
        if trainer.global_step == self._updates:
            return
        assert self.meter is not None, "training has begun"
        self._updates = trainer.global_step
        self.meter.finish_step()
        pl_module.log_dict(self.meter.figures(), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks; the figures can still be read."""
        if self.meter is not None:
            self.meter.close()

    def state_dict(self) -> dict[str, Any]:
        """Lightning puts it into its checkpoints."""
        return {} if self.meter is None else self.meter.state_dict()


def _sharded_root(model: Any) -> Any:
    """The part of a Lightning module that `fully_shard` made the root of FSDP2, if all that is trained is in it:
    Lightning runs the training step without calling the module itself. Else the model."""
    root = next((module for module in model.modules() if hasattr(module, "_get_fsdp_state")), model)
    inside = set(root.parameters())
    return root if all(param in inside for param in model.parameters() if param.requires_grad) else model
