"""The noise scale in a Hugging Face `Trainer`, and its batch by itself."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copus.meter.batch_controller import BatchController
from copus.meter.noise_meter import NoiseMeter


class NoiseCallback(TrainerCallback):
    """Measures the noise scale while a `Trainer` trains, alone, under DDP, FSDP2 or DeepSpeed, and logs it wherever the
    trainer logs to: `trainer.add_callback(NoiseCallback(trainer))`.

    With `most_accumulation_steps` it also changes `gradient_accumulation_steps`, as `copus.BatchController` says; only
    upwards, since the trainer counts the steps of an epoch when it begins. The learning rate schedule then follows the
    samples. Give the length of the run in epochs: `max_steps` counts steps of any size.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        log: Path | str | None = None,
        most_accumulation_steps: int | None = None,
        **meter: Any,
    ) -> None:
        """`log` is a file for the lines of `NoiseMeter.log`; everything else goes to the `NoiseMeter`."""
        self._trainer = trainer
        self._log = log
        self._most = most_accumulation_steps
        self._options = meter
        self.meter: NoiseMeter | None = None
        """The meter, from the beginning of the training on."""
        self.controller: BatchController | None = None
        """What changes the batch, if it is to be changed."""
        self._micro_batches_of_epoch = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the meter, on the model as the trainer has wrapped it."""
        self.meter = NoiseMeter(
            self._trainer.model_wrapped,
            micro_batch=args.per_device_train_batch_size,
            micro_batches=args.gradient_accumulation_steps,
            **{"grad_scaler": getattr(self._trainer.accelerator, "scaler", None), **self._options},
        )
        if self._log is not None:
            self.meter.log(self._log)
        if self._most is not None:
            optimizer: Any = self._trainer.optimizer
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self.controller = BatchController(
                self.meter,
                optimizer,
                most_micro_batches=self._most,
                fewest_micro_batches=args.gradient_accumulation_steps,
                by_itself=False,
            )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The trainer counts micro-batches anew."""
        self._micro_batches_of_epoch = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log with the trainer's own figures, and change the batch where its count of micro-batches allows it."""
        assert self.meter is not None, "training has begun"
        self.meter.finish_step()
        self._micro_batches_of_epoch += args.gradient_accumulation_steps
        if self.controller is not None:
            self._follow(args, self.controller)
        if control.should_log:
            self._trainer.log(self.meter.figures())

    def _follow(self, args: TrainingArguments, controller: BatchController) -> None:
        schedule = self._trainer.lr_scheduler
        while schedule is not None and schedule.last_epoch < controller.reference_steps:
            schedule.step()
        # The trainer updates when the micro-batches of the epoch are a multiple of the accumulation.
        if self._micro_batches_of_epoch % controller.wanted == 0 and controller.apply():
            args.gradient_accumulation_steps = controller.micro_batches

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the hooks; the figures can still be read."""
        assert self.meter is not None, "training has begun"
        self.meter.close()
        if self.controller is not None:
            self.controller.close()
