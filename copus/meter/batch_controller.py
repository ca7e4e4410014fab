"""The batch by itself: accumulation that follows the critical batch, with the values of AdamW that belong to it."""

from dataclasses import asdict
from typing import Any

import torch

from copus.backends.adamw import adamw_options
from copus.backends.step_contract import StepRules
from copus.meter.noise_meter import NoiseMeter
from copus.optimizers import AdamW
from copus.schedule import capped_ratio


class BatchController:
    """Doubles the gradient accumulation of a training loop while the critical batch is surely at least twice the batch,
    and halves it while it is surely less than half of the batch.

    "Surely" is the 90 % interval of the noise scale. A change is made between two steps, and on all ranks alike. In
    every step of the optimizer the learning rate, β2 and weight decay follow the batch by the rules of a job
    (`copus.optimizers.AdamW`, κ capped at the critical batch), with the right bias correction; after it they are again
    what the schedule had set. The schedule is of the reference batch: let it follow `reference_steps`, or the samples,
    and not the optimizer's steps, which become fewer.
    """

    def __init__(
        self,
        meter: NoiseMeter,
        optimizer: torch.optim.Optimizer,
        *,
        most_micro_batches: int,
        fewest_micro_batches: int = 1,
        every_steps: int = 20,
        rules: AdamW | None = None,
        by_itself: bool = True,
    ) -> None:
        """`meter` knows its batch (`micro_batch` and `micro_batches` were given): that one is the reference, which the
        optimizer's values are for. `rules` say how they follow the batch; None takes those of a job, with the values of
        the optimizer's first group. With `by_itself=False` changes wait for `apply`.

        Raises TypeError for an optimizer other than torch's Adam and AdamW, ValueError for a meter without a batch and
        for limits that leave nothing.
        """
        if not isinstance(optimizer, torch.optim.Adam):  # of which AdamW is one
            raise TypeError(f"optimizer: the rules are AdamW's, and this is {type(optimizer).__name__}")
        batch = meter.batch
        if batch is None:
            raise ValueError("meter: say micro_batch and micro_batches, which the controller starts from")
        if not 1 <= fewest_micro_batches <= batch.num_microbatches <= most_micro_batches:
            raise ValueError(
                f"fewest_micro_batches({fewest_micro_batches}) ≤ micro_batches({batch.num_microbatches}) ≤ "
                f"most_micro_batches({most_micro_batches}) does not hold"
            )
        self._meter, self._optimizer = meter, optimizer
        self._micro_batch, self.micro_batches = batch.micro_batch, batch.num_microbatches
        """Backward passes of a replica in the next step."""
        self._reference = batch.global_batch
        self._limits = fewest_micro_batches, most_micro_batches
        self._every_steps = every_steps
        group = optimizer.param_groups[0]
        self._rules = rules or AdamW(betas=group["betas"], epsilon=group["eps"], weight_decay=group["weight_decay"])
        self._by_itself = by_itself
        self._updates = 0
        self._beta2_product = 1.0
        self._samples = 0
        self._kept: list[dict[str, Any]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]

    @property
    def global_batch(self) -> int:
        """Sequences in the next step, over all replicas."""
        return self._micro_batch * self.micro_batches * self._meter.replicas

    @property
    def reference_steps(self) -> int:
        """Steps of the reference batch that the sequences so far would have made: where a schedule is."""
        return self._samples // self._reference

    @property
    def wanted(self) -> int:
        """The micro-batches that the noise scale asks for now: as many as there are, twice, or half as many."""
        noise, factor, batch = self._meter.noise, self._meter.critical_batch_factor, self.global_batch
        fewest, most = self._limits
        if noise.low is not None and factor * noise.low >= 2 * batch and 2 * self.micro_batches <= most:
            return 2 * self.micro_batches
        can_halve = self.micro_batches % 2 == 0 and self.micro_batches // 2 >= fewest
        if noise.high is not None and factor * noise.high < batch / 2 and can_halve:
            half = self.micro_batches // 2
            return half if half * self._meter.replicas > 1 else self.micro_batches  # one part would show no noise
        return self.micro_batches

    def apply(self) -> bool:
        """Change to what is wanted, between two steps; whether anything changed."""
        if self.wanted == self.micro_batches:
            return False
        self.micro_batches = self.wanted
        self._meter.set_batch(self._micro_batch, self.micro_batches)
        return True

    def close(self) -> None:
        """Leave the optimizer as it is."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the meter has its own."""
        return {
            "micro_batches": self.micro_batches,
            "samples": self._samples,
            "updates": self._updates,
            "beta2_product": self._beta2_product,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.micro_batches, self._samples = state["micro_batches"], state["samples"]
        self._updates, self._beta2_product = state["updates"], state["beta2_product"]
        self._meter.set_batch(self._micro_batch, self.micro_batches)

    def _before_update(self, *_: Any) -> None:
        kappa = capped_ratio(self.global_batch, self._reference, self._meter.critical_batch)
        betas = self._rules.betas_at(kappa)
        self._kept = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in self._groups]
        for group, kept in zip(self._groups, self._kept, strict=True):
            of_group = self._rules.model_copy(update={"weight_decay": kept["weight_decay"], "epsilon": kept["eps"]})
            rules = StepRules(
                lr=kept["lr"] * self._rules.lr_factor(kappa),
                betas=betas,
                weight_decay=of_group.weight_decay_at(kappa),
                beta2_product=self._beta2_product,
            )
            group.update(asdict(adamw_options(of_group, rules, self._updates)))
        self._beta2_product *= betas[1]

    def _after_update(self, *_: Any) -> None:
        for group, kept in zip(self._groups, self._kept, strict=True):
            group.update(kept)
        self._updates += 1
        self._samples += self.global_batch
        if self._by_itself and self._updates % self._every_steps == 0:
            self.apply()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups
