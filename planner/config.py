"""The `planner` section of a job file."""

import contextlib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)

from profiles.calibration import read_factor
from profiles.layout import Layout, Recompute
from profiles.record import NonNegativeInt, PositiveInt, Record


class PlannerConfig(Record):
    """What may be chosen, how it is scored, and when the job moves."""

    policy: Literal[
        "goodput",
        "copus",
        "static",
        "smallest-saturating",
        "norm-test",
        "cbs",
        "cbs-doubling",
        "ramp",
        "seesaw",
        "late-switch",
    ] = "goodput"
    """goodput: move when that is sure to finish the job sooner, the cost of moving included. copus: move when Goodput
    improves by `min_gain`. static: keep the configuration of the job file. smallest-saturating: the smallest batch that
    reaches 95 % of the best throughput, whatever the noise. The others keep a layout. norm-test: grow
    the batch until the gradient's noise is at most `norm_test_eta` times the gradient. cbs: follow the critical batch.
    cbs-doubling: double the batch when the critical batch reaches twice the present one. ramp: grow the batch by equal
    increments. seesaw: grow it as the learning rate decays. late-switch: the largest batch at the end."""
    start: Literal["plan", "job"] = "plan"
    """plan: begin in the configuration that the policy picks, from known step times and published laws of critical
    batches; `static` and `norm-test` begin as the job file says nevertheless. job: begin in the layout, micro-batch and
    global batch of the job file."""
    objective: Literal["plain", "lr-aware"] = "plain"
    """plain: throughput × efficiency. lr-aware: × √B too (COPUS with Adam and a √B learning rate)."""
    every_samples: PositiveInt = 256
    """Sequences between two decisions."""
    min_gain: float = Field(default=0.10, ge=0)
    """Goodput has to improve by this share before the job moves (COPUS's rule: 0.10)."""
    critical_batch_factor: PositiveFloat = 2.0
    """c in φ = c · B_simple: ratio of the critical batch to the simple noise scale (COPUS: 2.0, set by hand). Or the
    file that `copus calibrate` wrote, RUN/calibration.json: then the measured c, with its interval. `goodput` refines
    it from the run's own changes of batch, and corrects it by published laws of the critical batch of a job."""
    critical_batch_factor_range: float = Field(default=2.6, ge=1)
    """Distance of the ends of the 90 % interval of c from it at the start of the run, as a factor; 1 means that c is
    exact. A calibration file has its own."""
    noise_source: Literal["auto", "microbatch", "replica", "normlayer"] = "auto"
    """Parts that the noise is measured from. auto: micro-batches on every `noise_every_steps`-th step, replicas on the
    others (if dp > 1); if a step is one micro-batch, the norm layers on every `noise_every_steps`-th step, calibrated
    by halving some; and for the paper's norm test replicas alone (if dp > 1). normlayer: the norm layers always,
    sampled and calibrated likewise. microbatch: every micro-batch of every step, a lone one always halved. replica:
    replicas on every step (needs dp > 1)."""
    noise_every_steps: PositiveInt = 4
    """How often micro-batches, or norm layers, are measured."""
    noise_halve_every_steps: PositiveInt = 32
    """How often a lone micro-batch is run as two halves, to calibrate the norm layers; 1 measures halves always."""
    noise_metric: Literal["plain", "adam"] = "plain"
    """What is squared. plain: gradients. adam: gradients divided by Adam's √v̂ + ε in every coordinate (Pollux)."""
    noise_half_life_tokens: PositiveInt | None = None
    """Half-life, in tokens, of the averages of |G|² and tr Σ, but at least 20 steps. null: 2 % of the job, but at least
    100 steps. In the beginning of a run it is shorter: 0.3 of the steps so far."""
    norm_test_form: Literal["unbiased", "paper"] = "unbiased"
    """unbiased: batch = noise scale / η². paper: DDP-Norm and FSDP-Norm (2412.21124), with the step's own gradient in
    the place of the true one, which asks for too little by the factor 1 / (1 + noise scale / batch)."""
    norm_test_eta: float = Field(default=0.5, gt=0)
    """η of the norm test; the authors use 0.1 to 0.5. A smaller one asks for larger batches: with 1 the unbiased form
    asks for the noise scale, with 0.5 for four times as much. The paper's form settles at noise scale · (1/η² − 1), and
    never grows the batch if η is 1 or more."""
    norm_test_every: PositiveInt = 1
    """Test interval: decisions from one norm test to the next."""
    cbs_layout: Literal["present", "pessimistic", "optimistic"] = "present"
    """Layout that `cbs` keeps: the one that runs, or the fastest at the smallest or at the largest batch."""
    ramp_start: PositiveInt = 1
    """First batch of `ramp`, in sequences (Megatron's `--rampup-batch-size START increment samples`)."""
    ramp_increment: PositiveInt = 1
    """How much larger each next batch of `ramp` is, in sequences."""
    ramp_samples: PositiveInt | None = None
    """Length of the ramp, in sequences; None means half of the job."""
    late_switch_at: float = Field(default=0.7, gt=0, lt=1)
    """Share of the sequences after which `late-switch` runs the largest batch."""
    min_noise_samples: PositiveInt = 20
    """Optimizer steps to see before the first decision; the first so many steps are all measured in full."""
    min_global_batch: PositiveInt = 1
    """Smallest global batch that may be chosen, in sequences."""
    max_global_batch: PositiveInt = 1024
    """Largest global batch that may be chosen, in sequences. Batches are powers of two times `batch_multiple`."""
    batch_multiple: PositiveInt = 1
    """Every global batch is a multiple of this."""
    max_micro_batch: PositiveInt = 16
    """Largest micro-batch that may be chosen; micro-batches are powers of two."""
    tp: PositiveInt | None = None
    """Only layouts with this tensor parallel degree may be chosen."""
    max_pp: PositiveInt | None = None
    """Only layouts with at most so many pipeline stages may be chosen; 1 forbids pipelines."""
    max_vp: PositiveInt | None = None
    """Only layouts with at most so many model chunks per pipeline stage may be chosen; 1 forbids interleaving."""
    max_cp: PositiveInt | None = Field(
        default=None, json_schema_extra={"default_in_words": "as many as leave each rank 4,096 tokens of a sequence"}
    )
    """Only layouts with at most this context parallel degree may be chosen; 1 leaves sequences whole."""
    max_ep: PositiveInt | None = Field(
        default=None, json_schema_extra={"default_in_words": "no more than a node has, unless memory asks for it"}
    )
    """Only layouts with at most this expert parallel degree may be chosen; 1 leaves all experts on every replica."""
    recompute: Recompute | None = None
    """Only layouts with this recomputation may be chosen: none, selective or full. None means all three where the
    accelerator's memory is known, and otherwise that of the job's own layout."""
    max_layout_moves_per_hour: NonNegativeInt | None = None
    """Moves to another layout in any hour; batches are not counted."""
    layout_move_seconds: NonNegativeFloat | None = None
    """What a move to another layout is expected to cost `goodput` before the first has been measured. null: an estimate
    from the model's size and the links of the cluster."""
    trial_budget: float = Field(default=0.02, ge=0, le=1)
    """Share of the elapsed time that `goodput` may spend on trials: a few steps in a configuration that never ran, to
    see how fast it is. Training goes on in them. 0 for none."""
    advisory: bool = False
    """Decide, and write every decision, but never move."""
    layouts: list[Layout] | None = None
    """Layouts that may be chosen, as they are listed; None means every split of the cluster into tp, pp, cp and dp that
    the model and the backend allow, with tensor parallel ranks within a node, every recomputation, every number of
    chunks a stage, and on fsdp every ZeRO stage and one copy of the state on each node."""

    @property
    def needs_noise_scale(self) -> bool:
        """Whether the policy decides from noise that steps measure."""
        return self.policy not in ("static", "smallest-saturating", "ramp", "seesaw", "late-switch")

    @property
    def waits_for_noise_scale(self) -> bool:
        """Whether nothing is decided before the noise scale is known; the paper's norm test is made on single steps."""
        return self.needs_noise_scale and not (self.policy == "norm-test" and self.norm_test_form == "paper")

    @property
    def compares_workers(self) -> bool:
        """Whether replicas are compared whenever there are several: the norm test of the paper is one of workers."""
        return self.policy == "norm-test" and self.norm_test_form == "paper" and self.noise_source == "auto"

    @property
    def keeps_layout(self) -> bool:
        """Whether the policy never leaves the layout that the job starts with."""
        if self.policy == "cbs":
            return self.cbs_layout == "present"
        return self.policy not in ("goodput", "copus", "smallest-saturating")

    @model_validator(mode="before")
    @classmethod
    def _read_calibrated_range(cls, values: Any) -> Any:
        """A calibration file brings the interval of c too, unless the job file has one."""
        if isinstance(values, dict) and isinstance(given := values.get("critical_batch_factor"), str):
            with contextlib.suppress(ValueError):  # a number, or what the field's own validator refuses
                spread = read_factor(Path(given))[1]
                return values if spread is None else {"critical_batch_factor_range": spread} | values
        return values

    @field_validator("critical_batch_factor", mode="before")
    @classmethod
    def _read_calibration(cls, value: Any) -> Any:
        """A string that is no number names a calibration file: c is read now, so that the resolved job has a number."""
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return read_factor(Path(value))[0]
        return value

    @model_validator(mode="after")
    def _check_range(self) -> "PlannerConfig":
        if self.min_global_batch > self.max_global_batch:
            raise ValueError(
                f"min_global_batch({self.min_global_batch}) is larger than max_global_batch({self.max_global_batch})"
            )
        return self
