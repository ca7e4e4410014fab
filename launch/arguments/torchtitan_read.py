"""torchtitan's TOML (up to 0.2.2), or its arguments `--section.field value`, as a job file."""

from typing import Any

from copus.job import JobError
from launch.arguments.command_line import CommandLine
from launch.arguments.imported_job import ImportedJob
from profiles.preset import presets

_SPEED = "it is about speed, and the same is computed"
_SPEED_FIELDS = (
    *("parallelism.enable_async_tensor_parallel", "parallelism.pipeline_parallel_schedule", "optimizer.implementation"),
    *("parallelism.context_parallel_rotate_method", "activation_checkpoint.selective_ac_option", "training.gc_freq"),
    *("parallelism.expert_tensor_parallel_degree", "optimizer.early_step_in_backward"),
)
_NOT_NEEDED = ("compile", "profiling", "comm", "dataloader")
_LOST = ("metrics", "experimental", "fault_tolerance", "validation", "job", "debug", "checkpoint")


def job_of_torchtitan(values: dict[str, Any], command: CommandLine) -> ImportedJob:
    """The job file for sections of torchtitan's configuration.

    Raises JobError for a value that is not of its field's type.
    """
    return _Translation(values, command).job


class _Translation:
    def __init__(self, values: dict[str, Any], command: CommandLine) -> None:
        self._fields = {
            f"{section}.{name}": value
            for section, inner in values.items()
            if isinstance(inner, dict)
            for name, value in inner.items()
        }
        self._taken: set[str] = set()
        self.job = ImportedJob(notes=list(command.notes))
        self.job.put("name", "torchtitan")
        self._model()
        dp = self._layout(command)
        self._training(dp)
        self._rest()

    def _check_name(self) -> None:
        if (name := self._get("optimizer.name", str, "AdamW")) != "AdamW":
            self.job.leave(f"optimizer.name = {name!r}", "changes the training", "AdamW in its place")

    def _get(self, name: str, kind: type, default: Any) -> Any:
        """A field's value, which counts as mapped from now on."""
        if name not in self._fields:
            return default
        self._taken.add(name)
        value = self._fields[name]
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise JobError(f"{name} = {value!r}: expected {kind.__name__}") from None

    def _model(self) -> None:
        family, flavor = self._get("model.name", str, "llama3"), self._get("model.flavor", str, "debugmodel")
        name = {"llama3": "llama-3.1", "qwen3": "qwen3"}.get(family, family) + f"-{flavor.lower()}"
        if name in presets():
            self.job.put("model.from", name, f"{family} {flavor}")
            self.job.put("model.seq_len", self._get("training.seq_len", int, 2048))
        else:
            self._get("training.seq_len", int, 2048)
            self.job.notes.append(f"no model is known as {name}: --set model.from=NAME")

    def _layout(self, command: CommandLine) -> int:
        get = self._get
        tp, pp = (get(f"parallelism.{name}_parallel_degree", int, 1) for name in ("tensor", "pipeline"))
        cp = get("parallelism.context_parallel_degree", int, 1)
        replicas = get("parallelism.data_parallel_replicate_degree", int, 1)
        shards = get("parallelism.data_parallel_shard_degree", int, -1)
        if command.per_node is None:
            per_node = max(tp * pp * cp * replicas * max(shards, 1), 8 if shards == -1 else 1)
            self.job.put("cluster.nodes", 1)
            self.job.assume("cluster.accelerators_per_node", per_node, "nothing tells")
        else:
            self.job.put("cluster.nodes", command.nodes or 1)
            self.job.put("cluster.accelerators_per_node", command.per_node)
            per_node = command.per_node
        self.job.assume("cluster.accelerator", "h100-sxm", "no argument names it")
        world = per_node * (command.nodes or 1)
        if shards == -1:
            shards = world // (tp * pp * cp * replicas)
        dp = replicas * shards
        layout: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp}
        if cp > 1:
            layout["cp"] = cp
        if tp > 1 and pp > 1:
            layout["sequence_parallel"] = True
        if shards > 1:
            layout["zero"] = 1 if pp > 1 else 3 if self._reshards() else 2
            if replicas > 1:
                layout["dp_replicate"] = replicas
        mode = get("activation_checkpoint.mode", str, "selective")
        if mode in ("selective", "full"):
            layout["recompute"] = mode
        if pp == 1:
            self.job.put("training.backend", "fsdp", "FSDP2")
        else:
            self.job.leave(
                "parallelism.pipeline_parallel_degree", "is lost", "fsdp has no pipelines: Megatron's instead"
            )
        self.job.put("training.layout", layout)
        return dp

    def _reshards(self) -> bool:
        return bool(self._get("parallelism.fsdp_reshard_after_forward", str, "default") != "never")

    def _training(self, dp: int) -> None:
        put, get = self.job.put, self._get
        seq_len = int(get("training.seq_len", int, 2048))
        local = get("training.local_batch_size", int, 8)
        batch = get("training.global_batch_size", int, -1)
        batch = local * dp if batch < 0 else batch
        steps = get("training.steps", int, 10_000)
        tokens = steps * batch * seq_len
        pipeline = self.job.values["training"]["layout"]["pp"] > 1
        put("training.micro_batch", get("parallelism.pipeline_parallel_microbatch_size", int, 1) if pipeline else local)
        put("training.global_batch", batch)
        put("training.tokens", tokens, f"{steps} steps × {batch} × {seq_len}")
        put("training.seed", get("debug.seed", int, get("training.seed", int, 1234)))
        put("training.clip_grad", get("training.max_norm", float, 1.0))
        put(
            "training.precision",
            "fp32" if get("training.mixed_precision_param", str, "bfloat16") == "float32" else "bf16",
        )
        self._check_name()
        lr = get("optimizer.lr", float, 8e-4)
        put("training.lr", lr)
        least = float(f"{lr * get('lr_scheduler.min_lr_factor', float, 0.0):.12g}")
        put("training.min_lr", least, "lr × min_lr_factor")
        betas = [get("optimizer.beta1", float, 0.9), get("optimizer.beta2", float, 0.95)]
        epsilon, decay = get("optimizer.eps", float, 1e-8), get("optimizer.weight_decay", float, 0.1)
        put("training.optimizer", {"betas": betas, "epsilon": epsilon, "weight_decay": decay})
        warmup = min(get("lr_scheduler.warmup_steps", int, 200), steps)
        put("training.warmup_tokens", warmup * batch * seq_len, f"{warmup} steps × {batch} × {seq_len}")
        self._decay(steps, warmup, batch * seq_len)
        if get("checkpoint.enable", bool, False):
            interval = get("checkpoint.interval", int, 500)
            put("training.checkpoint_every_tokens", interval * batch * seq_len, f"{interval} × {batch} × {seq_len}")
        self.job.assume("data.source", "shakespeare", "the texts of training.dataset are not here")

    def _decay(self, steps: int, warmup: int, tokens: int) -> None:
        """Warm-up, a plateau, and a decay over the end of the run: wsd, unless there is no plateau. A step has so many
        tokens."""
        put, shape = self.job.put, self._get("lr_scheduler.decay_type", str, "linear")
        ratio = self._get("lr_scheduler.decay_ratio", float, None)
        length = steps - warmup if ratio is None else min(round(ratio * steps), steps - warmup)
        if length <= 0:
            put("training.decay", "constant")
        elif length == steps - warmup and shape in ("linear", "cosine"):
            put("training.decay", shape)
        else:
            put("training.decay", "wsd", "a plateau, and a decay at the end")
            put("training.decay_shape", "1-sqrt" if shape == "sqrt" else shape)
            put("training.decay_tokens", length * tokens, f"{length} steps × {tokens}")

    def _rest(self) -> None:
        """Fields that nothing has asked for."""
        for name, value in self._fields.items():
            section = name.partition(".")[0]
            if name in self._taken:
                self.job.mapped += 1
            elif section in _NOT_NEEDED or value in (False, None, ""):
                self.job.leave(f"{name} = {value!r}", "is not needed", _SPEED if section == "compile" else "it is off")
            elif section == "quantize" and not self._fields.get("model.converters"):
                self.job.leave(f"{name} = {value!r}", "is not needed", "model.converters does not name it")
            elif section == "quantize" or name == "model.converters":
                self.job.leave(f"{name} = {value!r}", "changes the training", "the arithmetic is bf16")
            elif name in _SPEED_FIELDS:
                self.job.leave(f"{name} = {value!r}", "is not needed", _SPEED)
            elif section in _LOST or name.startswith(("training.dataset", "model.")):
                self.job.leave(f"{name} = {value!r}", "is lost", "no setting of a job")
            else:
                self.job.leave(f"{name} = {value!r}", "is unknown", "no field of torchtitan that is known here")
