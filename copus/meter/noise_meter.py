"""The gradient noise scale of somebody's own training loop."""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.step_contract import Parts, StepResult
from copus.meter.loss_check import LossCheck
from copus.meter.measured import MeasuredModel, measured_model
from copus.meter_log import MeterLog, MeterStep
from copus.noise.run_noise import RunNoise
from planner.config import PlannerConfig
from planner.efficiency import Doubling, doubling
from planner.noise_sources import NORMLAYER
from planner.sampling import SHARE_OF_JOB, STEPS, HalfLife, is_sampled, source_of_step
from profiles.configuration import Configuration
from profiles.noise_scale import NoiseScale

SCALED = 0.02
"""Share by which a reduced gradient may differ from the mean of what was seen: half precision rounds sums."""
NOTHING = StepResult(math.nan, math.nan, None, None, skipped=False, stop=False)
"""Result of a step that was not measured."""


class MeterWarning(UserWarning):
    """Something about a training loop makes the noise scale wrong, or leaves it unknown."""


class NoiseMeter:
    """Measures the gradient noise scale B_simple = tr Σ / |G|² (McCandlish et al. 2018, 1812.06162) of a model in a
    training loop, without changing what is trained.

    Hooks compare the gradients of the parts of a step: every micro-batch of every data parallel replica, or the
    replicas as wholes, and single sequences in the coordinates of the norm layers (docs/noise.md). The loop may be
    plain torch, DistributedDataParallel, FSDP2 (`fully_shard`), DeepSpeed or megatron-core. A step is over

    - when `optimizer` makes its step, if one was given (and for DeepSpeed and megatron-core always);
    - at the end of `with meter.step():` around its backward passes;
    - else after `micro_batches` backward passes.

    Gradients are read at the end of the last backward pass (for DeepSpeed and megatron-core at the beginning of their
    step), so clipping and unscaling come too late to change the figure. Without `micro_batches` the first step is only
    counted, and later steps are expected to be like it. What is wrong with a loop is warned of, once, as a
    `MeterWarning`, and stands in `problems`.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        micro_batch: int | None = None,
        micro_batches: int | None = None,
        source: str = "auto",
        every_steps: int = 4,
        critical_batch_factor: float = 2.0,
        total_samples: int | None = None,
        grad_scaler: Any = None,
    ) -> None:
        """`model` is a module, plain or wrapped, an engine of DeepSpeed, or the list of megatron-core's model chunks.

        `micro_batch` is the sequences in one backward pass of a replica; None takes the first dimension of what the
        model is called with. `micro_batches` is the backward passes of a replica in a step (gradient accumulation).
        `source` and `every_steps` are `planner.noise_source` and `noise_every_steps` of a job file. The critical batch
        is `critical_batch_factor` times the noise scale. `total_samples`, the length of the run in sequences, sets the
        half-life of the averages as in a job: 2 % of it, and at least 100 steps. `grad_scaler` is the
        `torch.amp.GradScaler` of fp16.

        Raises TypeError for a model that cannot be measured, ValueError for settings under which nothing can.
        """
        self._settings = PlannerConfig.model_validate({"noise_source": source, "noise_every_steps": every_steps})
        self._model = measured_model(model, optimizer)
        self._factor = critical_batch_factor
        self._noise = RunNoise(HalfLife(SHARE_OF_JOB * (total_samples or 0), STEPS))
        self._estimate = self._noise.estimate()
        self._grad_scaler = grad_scaler
        self._micro_batch, self._passes = micro_batch, micro_batches
        self._passes_are_given = micro_batches is not None
        self._waits = optimizer is not None
        """Whether an update of the weights, and not the number of backward passes alone, ends a step."""
        self._passes_made = 0
        self._rows: int | None = None
        """First dimension of what the model is called with."""
        self._called_with: set[int] = set()
        self._configuration: Configuration | None = None
        self._source: str | None = None
        self._was_read = False
        self._result = NOTHING
        self._read_probe: torch.Tensor | None = None
        self._problems: dict[str, str] = {}
        self._steps = self._samples = 0
        self._log: MeterLog | None = None
        self._finished_at: float | None = None
        self._step_seconds: float | None = None
        self._hooks: list[Any] = []
        called, returns_loss = self._model.called, self._model.returns_loss or self._model.called
        self._loss_check = None if returns_loss is None else LossCheck(returns_loss)
        if called is not None:
            self._hooks.append(called.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        if isinstance(optimizer, torch.optim.Optimizer):
            self._hooks.append(optimizer.register_step_pre_hook(self._before_update))
        self._model.watch(self._after_pass, self._at_step)
        if refused := self._refused():
            self.close()
            raise ValueError(refused)
        self._begin()

    def _refused(self) -> str | None:
        """Why what was said of the batch cannot be measured, after it was noted."""
        if self._micro_batch is not None and self._passes is not None:
            self._set(self._micro_batch, self._passes)
            return None if self._can_compare() else self._one_part()
        if self._model.called is None:
            return f"micro_batch and micro_batches: {self._model.name} does not show them; say both"
        return None

    @property
    def noise(self) -> NoiseScale:
        """The noise scale now, in sequences, with its 90 % interval; `value` is None while there is too little to
        tell."""
        return self._estimate

    @property
    def critical_batch(self) -> float | None:
        """φ = critical_batch_factor · noise scale, in sequences: at a batch of φ a sequence makes half of the progress
        that it makes at a small one. None while the noise scale is unknown."""
        return None if self._estimate.value is None else self._factor * self._estimate.value

    @property
    def critical_batch_factor(self) -> float:
        """c in φ = c · noise scale."""
        return self._factor

    @property
    def batch(self) -> Configuration | None:
        """`micro_batch`, `num_microbatches` and `global_batch`; None before the first step, unless they were given."""
        return self._configuration

    @property
    def global_batch(self) -> int | None:
        """Sequences in a step, over all replicas; None before the first step, unless they were given."""
        return None if self._configuration is None else self._configuration.global_batch

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._steps

    @property
    def samples(self) -> int:
        """Sequences so far, over all replicas."""
        return self._samples

    @property
    def replicas(self) -> int:
        """Data parallel replicas that share a step."""
        return self._model.layout.dp

    @property
    def leads(self) -> bool:
        """Whether this rank is the one to report; all know the same."""
        return self._model.leads

    @property
    def problems(self) -> list[str]:
        """What was found wrong with the loop, each thing once."""
        return list(self._problems.values())

    def doubling(self) -> Doubling | None:
        """What twice the batch would bring, for the same progress; None while the noise scale is unknown."""
        if self.critical_batch is None or self.global_batch is None:
            return None
        return doubling(self.global_batch, self.critical_batch)

    def figures(self) -> dict[str, float]:
        """Everything that is known now, as numbers by name, for a logger: `noise_scale` with `noise_scale_low` and
        `noise_scale_high`, `critical_batch`, and the ratios of `doubling`; of the last step `step_seconds`, `samples`
        so far, and of the next `global_batch` and `micro_batch`. `copus advise` finds them by these names."""
        noise, twice, batch = self._estimate, self.doubling(), self._configuration
        figures = {
            "noise_scale": noise.value,
            "noise_scale_low": noise.low,
            "noise_scale_high": noise.high,
            "critical_batch": self.critical_batch,
            "doubling_steps_ratio": None if twice is None else twice.steps_ratio,
            "doubling_samples_ratio": None if twice is None else twice.samples_ratio,
            "step_seconds": self._step_seconds,
            "samples": self._samples or None,
            "global_batch": None if batch is None else batch.global_batch,
            "micro_batch": None if batch is None else batch.micro_batch,
        }
        return {name: float(value) for name, value in figures.items() if value is not None}

    def finish_step(self) -> None:
        """The step is over: for a loop that knows it and has neither an optimizer to show nor a place for `step`.
        Nothing happens if it was over anyway."""
        self._at_step()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The backward passes of one step run inside. The figure is taken before this returns."""
        yield
        self._at_step()

    def set_batch(self, micro_batch: int, micro_batches: int) -> None:
        """The next step has so many sequences in a backward pass, and so many passes on each replica. Call it between
        two steps, on all ranks, before a change that would otherwise cost a step to notice."""
        if self._was_read:
            self._finish()
        if micro_batch != self._micro_batch:
            self._rows = None
        self._passes_are_given = True
        self._set(micro_batch, micro_batches)
        self._tell_of_one_part()
        self._begin()

    def log(self, path: Path | str) -> None:
        """Append a JSON line for every step from now on (`copus.meter_log.MeterStep`), on the leading rank."""
        if self.leads:
            self._log = MeterLog(Path(path))

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, as plain values for a checkpoint."""
        return {"noise": self._noise.state(), "steps": self._steps, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on any number of ranks."""
        self._noise.restore(state["noise"])
        self._steps, self._samples = state["steps"], state["samples"]
        self._estimate = self._noise.estimate()
        self._begin()

    def close(self) -> None:
        """Remove all hooks, and close the log."""
        for hook in self._hooks:
            hook.remove()
        if self._loss_check is not None:
            self._loss_check.close()
        self._model.close()
        if self._log is not None:
            self._log.close()

    def _before_forward(self, module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # an evaluation
            return
        if self._was_read:  # the step is over although nobody updated the weights, or said so
            self._finish()
        tensors = (value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor) and value.dim())
        if (first := next(tensors, None)) is not None:
            self._called_with.add(len(first))

    def _after_pass(self) -> None:
        if self._model.passes == self._passes:
            self._read()
            if not self._waits:
                self._finish()

    def _before_update(self, *_: Any) -> None:
        if self._was_read or self._model.passes:
            self._check_unscaled()
        self._at_step()

    def _at_step(self) -> None:
        if not self._was_read and self._model.passes:
            self._read()
        if self._was_read:
            self._finish()

    def _begin(self) -> None:
        """Expect a step."""
        self._was_read, self._passes_made = False, 0
        self._result, self._read_probe = NOTHING, None
        self._called_with.clear()
        self._source = None
        # A trainer of copus has the sums of every replica at hand; here, to compare them takes a copy of the gradients.
        if self._configuration is not None and is_sampled(self._settings, self._steps):
            self._source = source_of_step(self._settings, self._model.traits, self._configuration, self._steps)
        self._model.start(self._source, self._configuration or _placeholder(self._model))

    def _finish(self) -> None:
        """Count the step, and begin the next."""
        configuration = self._configuration
        if configuration is not None:
            batch = configuration.micro_batch * self._passes_made * configuration.layout.dp
            self._steps += 1
            self._samples += batch
            if self._noise.update(self._result, self._samples, batch):
                self._estimate = self._noise.estimate()
            now = time.perf_counter()
            self._step_seconds = None if self._finished_at is None else now - self._finished_at
            if self._log is not None:
                self._log.write(
                    MeterStep(
                        step=self._steps,
                        samples=self._samples,
                        global_batch=batch,
                        micro_batch=configuration.micro_batch,
                        layout=configuration.layout,
                        step_seconds=self._step_seconds,
                        noise=self._estimate if self._estimate.samples else None,
                    )
                )
            self._finished_at = now
        self._begin()

    @torch.no_grad()
    def _read(self) -> None:
        """Take the figures of the step, whose gradients are ready. Collective on steps that are measured."""
        self._was_read = True
        self._passes_made = passes = self._model.passes
        if self._loss_check is not None:
            for kind, sentence in self._loss_check.complaints(self._loss_scale()):
                self._complain(kind, sentence, tells=self.leads or self._model.returns_loss is not None)
        if self._configuration is not None and passes != self._passes and self._passes_are_given:
            self._complain(
                "another number of passes",
                f"a step had {passes} backward passes instead of micro_batches({self._passes}): it is not measured",
            )
        elif self._configuration is None or passes != self._passes:
            self._learn(passes)
        elif self._source is not None:
            self._measure()

    def _learn(self, passes: int) -> None:
        """Expect all further steps to be like this one, which was only counted."""
        rows = max(self._called_with, default=0)
        figures = [float(len(self._called_with) != 1), float(rows), float(rows**2)]
        uneven, total, squares = self._add_up(torch.tensor(figures, dtype=torch.float64, device=self._model.device))
        ranks = 1 if self._model.group is None else self._model.group.size()
        if not self._passes_are_given:
            self._configuration, self._passes = None, None
        if rows == 0 and self._micro_batch is None:
            self._complain("micro-batch unseen", "the sequences of a micro-batch cannot be seen: pass micro_batch")
        elif rows and (uneven or ranks * squares != total**2):
            self._complain(
                "uneven micro-batches",
                f"micro-batches of a step differ in their sequences (this rank has {sorted(self._called_with)}): it is "
                "not measured. Drop the last, smaller batch (drop_last)",
            )
        else:
            self._rows = rows or None
            self._set(self._micro_batch or rows, passes)
            self._tell_of_one_part()

    def _set(self, micro_batch: int, passes: int) -> None:
        layout = self._model.layout
        self._micro_batch, self._passes = micro_batch, passes
        batch = micro_batch * passes * layout.dp
        self._configuration = Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)

    def _can_compare(self) -> bool:
        assert self._configuration is not None, "it was set"
        parts = self._model.traits.parts(self._configuration)
        return any(name != NORMLAYER and count.number > 1 for name, count in parts.items())

    def _tell_of_one_part(self) -> None:
        if not self._can_compare():
            self._complain("one part", self._one_part())

    def _one_part(self) -> str:
        return (
            f"micro_batches({self._passes}) × {self.replicas} replica is one part per step, and the noise scale is "
            "told from differences between parts: accumulate gradients over two or more smaller micro-batches"
        )

    def _measure(self) -> None:
        """Add up what all ranks saw of the step."""
        model, probe = self._model, self._model.probe()
        self._rows = self._rows or max(self._called_with, default=None)
        uneven = bool(self._called_with) and self._called_with != {self._rows}
        shares = [
            torch.tensor([float(uneven)], dtype=torch.float64, device=model.device),
            model.grad_sq_share().view(1),
            model.part_norms.contribution(model.device),
            *(probe or ()),
        ]
        self._add_up(message := torch.cat(shares))
        expected = actual = None
        if probe is not None:
            size = len(probe[0])
            expected, actual = message[-2 * size : -size] / self.replicas, message[-size:]
            message = message[: -2 * size]
        some_uneven, grad_sq, *totals = message.tolist()
        if some_uneven:
            self._complain(
                "uneven micro-batches",
                f"micro-batches of a step differ in their sequences (this rank has {sorted(self._called_with)} instead "
                f"of {self._rows}): it is not measured. Drop the last, smaller batch (drop_last)",
            )
            return
        if expected is not None and actual is not None and not self._is_unchanged(expected, actual):
            return
        self._read_probe = actual
        undo = self._loss_scale() ** -2
        full, norm_layers = model.part_norms.parts(np.array(totals), grad_sq)
        self._result = StepResult(
            loss=math.nan,
            grad_sq=grad_sq * undo,
            parts=_scaled(full, undo),
            norm_layer_parts=_scaled(norm_layers, undo),
            skipped=not math.isfinite(grad_sq),
            stop=False,
        )

    def _add_up(self, figures: torch.Tensor) -> list[float]:
        """Sum over the ranks, in place."""
        if self._model.group is not None:
            dist.all_reduce(figures, group=self._model.group)
        return [float(figure) for figure in figures[:3]]

    def _is_unchanged(self, expected: torch.Tensor, actual: torch.Tensor) -> bool:
        """Whether some elements of the reduced gradient are the mean of what the backward passes gave."""
        square = float(expected @ expected)
        if not math.isfinite(square) or square == 0:
            return True
        ratio = float(expected @ actual) / square
        rest = float(torch.linalg.vector_norm(actual - ratio * expected)) / math.sqrt(square)
        if abs(ratio - 1) <= SCALED and rest <= SCALED:
            return True
        if rest <= SCALED * abs(ratio):
            what = f"the gradients are {ratio:.3g} times the mean of what the backward passes gave"
            why = "clipped, scaled, or summed over replicas, before the last backward pass was over"
        else:
            what = "the gradients are not the mean of what the backward passes gave"
            why = "zero_grad() was not called since the last step, or hooks change them"
        self._complain("changed gradients", f"{what}: {why}. Such steps are not measured")
        return False

    def _check_unscaled(self) -> None:
        """Tell of a gradient scaler that the meter does not know: right before the update gradients are smaller by a
        power of two."""
        if self._read_probe is None or self._grad_scaler is not None:
            return
        now, before = self._model.probe(), self._read_probe
        self._read_probe = None
        square = float(before @ before)
        if now is None or square == 0 or not self.leads:
            return
        ratio = float(now[1] @ before) / square
        if ratio > 0 and ratio < 0.9 and abs(math.log2(ratio) - round(math.log2(ratio))) < 1e-6:
            self._complain(
                "scaled loss",
                f"the loss is scaled by {1 / ratio:.0f}, which a GradScaler will change as it goes: pass "
                "grad_scaler=, or averages mix the scales",
            )

    def _loss_scale(self) -> float:
        scaler = self._grad_scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _complain(self, kind: str, sentence: str, tells: bool | None = None) -> None:
        """Warn once, on the leading rank, or where it `tells`."""
        if kind not in self._problems:
            self._problems[kind] = sentence
            if self.leads if tells is None else tells:
                warnings.warn(f"noise meter: {sentence}", MeterWarning, stacklevel=2)


def _scaled(parts: Parts | None, factor: float) -> Parts | None:
    """Squared norms times a factor."""
    if parts is None:
        return None
    return Parts(parts.squared_norms * factor, parts.part_size, parts.grad_sq * factor)


def _placeholder(model: MeasuredModel) -> Configuration:
    """For a step of which only the backward passes are counted."""
    return Configuration(layout=model.layout, micro_batch=1, global_batch=model.layout.dp)
