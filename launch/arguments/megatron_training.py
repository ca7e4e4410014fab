"""Batch, length, learning rate, optimizer, data and checkpoints that Megatron-LM's arguments describe."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from copus.job import JobError
from launch.arguments.batch_steps import BatchSteps
from launch.arguments.given_arguments import GivenArguments

_DECAYS = {
    "constant": "constant",
    "cosine": "cosine",
    "linear": "linear",
    "WSD": "wsd",
    "inverse-square-root": "inverse-sqrt",
}
_SHAPES = {"minus_sqrt": "1-sqrt"}
"""Shapes of WSD's annealing that have another name here."""
_RAMPS = ("--rampup-batch-size", "--step-batch-size-schedule")


class Training:
    """Fills the sections about the training. What Megatron-LM counts in iterations or samples becomes tokens."""

    def __init__(self, given: GivenArguments, dp: int) -> None:
        """`dp` is the data parallel degree. Fills the batches; raises JobError for a schedule that is none."""
        self._given, self._job = given, given.job
        self._seq_len = int(self._job.values.get("model", {}).get("seq_len") or given.whole("--seq-length") or 1)
        micro = given.whole("--micro-batch-size") or 1
        self._job.put("training.micro_batch", micro)
        self._steps = self._batches(micro * dp)

    def _batches(self, smallest: int) -> BatchSteps:
        given, put = self._given, self._job.put
        largest, ramp = given.whole("--global-batch-size"), given.values("--rampup-batch-size")
        schedule = given.text("--step-batch-size-schedule")
        try:
            if schedule:
                steps = BatchSteps.parse(schedule, self._seq_len)
            elif ramp:
                start, increment, samples = (int(text) for text in " ".join(ramp).split())
                steps = BatchSteps.ramp(start, increment, samples, largest or smallest)
            else:
                steps = BatchSteps.constant(largest or smallest)
        except ValueError as error:
            if str(error).startswith("--"):
                raise JobError(str(error)) from None
            raise JobError(f"--rampup-batch-size {' '.join(ramp or [])}: expected three whole numbers") from None
        comment = "the schedule's last" if schedule else "" if largest else "--global-batch-size's default"
        put("training.global_batch", steps.largest, comment)
        if len(steps.steps) > 1:
            self._ramp(steps, next(name for name in reversed(_RAMPS) if name in given))
        return steps

    def _ramp(self, steps: BatchSteps, name: str) -> None:
        """A batch that grows by equal increments is the policy `ramp`; any other schedule is left to the planner."""
        increments = steps.increments()
        if increments is None:
            reason = "the planner chooses the batch; the only schedule there is has equal increments"
            self._given.leave(name, "changes the training", reason)
            return
        start, increment, samples = increments
        put = self._job.put
        put("planner.policy", "ramp", f"{name}; without this the planner chooses the batch")
        put("planner.ramp_start", start)
        put("planner.ramp_increment", increment)
        put("planner.ramp_samples", samples)
        put("planner.min_global_batch", start)
        put("planner.max_global_batch", steps.largest)

    def _tokens(self, kind: str) -> tuple[int, str] | None:
        """Tokens of `--KIND-samples` or `--KIND-iters`, with how they come about."""
        samples, iterations = self._given.whole(f"--{kind}-samples"), self._given.whole(f"--{kind}-iters")
        if samples:
            return samples * self._seq_len, f"--{kind}-samples {samples} × {self._seq_len}"
        if iterations:
            batches = str(self._steps.largest) if len(self._steps.steps) == 1 else "their batches"
            trained = self._steps.samples_after(iterations)
            return trained * self._seq_len, f"--{kind}-iters {iterations} × {batches} × {self._seq_len}"
        return None

    def read_learning_rate(self) -> None:
        """Length of the run, and the learning rate over it."""
        given, put = self._given, self._job.put
        length = self._tokens("train")
        if length is None:
            length = (1_000_000_000, "neither --train-samples nor --train-iters is given")
            self._job.assume("training.tokens", *length)
        else:
            put("training.tokens", *length)
        if (lr := given.real("--lr")) is not None:
            put("training.lr", lr)
        else:
            self._job.assume("training.lr", 1e-3, "--lr is not given")
        given.put("training.min_lr", "--min-lr", given.real("--min-lr"), 0.0)
        self._decay(length[0])
        if (minutes := given.whole("--exit-duration-in-mins")) is not None:
            put("training.max_minutes", minutes)
        if (seed := given.whole("--seed")) is not None:
            put("training.seed", seed)
        bf16, fp16 = given.flag("--bf16"), given.flag("--fp16")
        put("training.precision", "bf16" if bf16 or fp16 else "fp32", "" if bf16 or fp16 else "no --bf16")
        given.leave("--fp16", "changes the training", "bf16 in its place, which needs no loss scale")

    def _decay(self, length: int) -> None:
        """The shape of the learning rate over a run of so many tokens."""
        given, put = self._given, self._job.put
        style = given.text("--lr-decay-style")
        given.put("training.decay", "--lr-decay-style", style and _DECAYS.get(style, "cosine"), "linear")
        if style is not None and style not in _DECAYS:
            given.leave("--lr-decay-style", "changes the training", "cosine in its place")
        decay = (self._tokens("lr-decay") or (length, ""))[0]
        warmup = self._warmup(length, decay)
        if style == "WSD":
            annealing = self._tokens("lr-wsd-decay")
            if annealing:
                put("training.decay_tokens", *annealing)
            shape = given.text("--lr-wsd-decay-style")
            given.put("training.decay_shape", "--lr-wsd-decay-style", _SHAPES.get(shape or "", shape), "exponential")
        for name in ("--lr-wsd-decay-style", "--lr-wsd-decay-samples", "--lr-wsd-decay-iters"):
            if style != "WSD":
                given.leave(name, "is not needed", "the decay is not WSD")
        if abs(decay - length) <= 0.001 * length:
            return
        for name in ("--lr-decay-samples", "--lr-decay-iters"):
            if style in ("constant", "inverse-square-root"):
                given.leave(name, "is not needed", "this decay has no end")
            elif style == "WSD":
                given.leave(name, "changes the training", "the annealing ends with the run")
        if style not in ("constant", "inverse-square-root", "WSD"):
            put("training.decay_tokens", max(decay - warmup, 1), f"{decay} to the end of the decay − the warm-up")

    def _warmup(self, length: int, decay: int) -> int:
        """Tokens of the warm-up; a fraction is one of the decay."""
        given, put = self._given, self._job.put
        warmup, fraction = self._tokens("lr-warmup"), given.real("--lr-warmup-fraction")
        if warmup is None and fraction:
            warmup = (round(fraction * decay), f"--lr-warmup-fraction {fraction:g} × {decay}")
        if warmup is None:
            return 0
        if warmup[0] <= length:
            put("training.warmup_tokens", *warmup)
            return warmup[0]
        put("training.warmup_tokens", length, "all of the run")
        reason = f"the warm-up is no longer than the run, {length:,} tokens and not {warmup[0]:,}"
        for name in ("--lr-warmup-samples", "--lr-warmup-iters", "--lr-warmup-fraction"):
            given.leave(name, "changes the training", reason)
        return length

    def read_optimizer(self) -> None:
        """The optimizer and its values."""
        given, kind = self._given, self._given.text("--optimizer") or "adam"
        decay = given.real("--weight-decay")
        optimizer: dict[str, Any] = {"weight_decay": 0.01 if decay is None else decay}
        usual = ["--weight-decay"] if decay is None else []
        if kind in ("sgd", "muon"):
            momentum = given.real(f"--{kind}-momentum")
            optimizer = {"kind": kind, "momentum": 0.9 if momentum is None else momentum} | optimizer
            usual += [f"--{kind}-momentum"] if momentum is None else []
        elif kind != "adam":
            given.leave("--optimizer", "changes the training", "AdamW in its place")
        if kind == "sgd":
            for name in ("--adam-beta1", "--adam-beta2", "--adam-eps"):
                given.leave(name, "is not needed", "the optimizer is SGD")
        else:
            betas = [given.real("--adam-beta1"), given.real("--adam-beta2")]
            usual += [f"--adam-beta{number}" for number, beta in enumerate(betas, start=1) if beta is None]
            epsilon = given.real("--adam-eps")
            optimizer["betas"] = [
                default if beta is None else beta for beta, default in zip(betas, (0.9, 0.999), strict=True)
            ]
            optimizer["epsilon"] = 1e-8 if epsilon is None else epsilon
        self._job.put("training.optimizer", optimizer, f"{', '.join(usual)}: the defaults" if usual else "")
        given.put("training.clip_grad", "--clip-grad", given.real("--clip-grad"), 1.0)

    def read_data(self) -> None:
        """Where the tokens are, and what of them is held out."""
        given, put = self._given, self._job.put
        training, held_out_words = self._data_words()
        weights, prefixes = _blend(training)
        if prefixes:
            put("data.source", prefixes)
            if weights:
                put("data.weights", weights)
        else:
            self._job.assume("data.source", "shakespeare", "the arguments have no text")
        held_out = _blend(held_out_words)[1]
        shares = [float(share) for share in re.findall(r"[\d.]+", given.text("--split") or "")]
        if held_out and prefixes:
            put("data.held_out_source", held_out)
        elif prefixes and len(shares) > 1 and shares[0] > 0 < shares[1]:
            put("data.held_out_share", shares[1] / (shares[0] + shares[1]), f"--split {given.text('--split')}")
        else:
            given.leave("--split", "is not needed", "there is no dataset to split")
        for name in ("eod_mask_loss", "reset_attention_mask", "reset_position_ids"):
            if given.flag("--" + name.replace("_", "-")):
                put(f"data.{name}", True)
        given.leave("--test-data-path", "is lost", "there is one held-out part")
        given.leave("--mock-data", "is lost", "there is no made-up data")
        if (cache := given.text("--data-cache-path")) and "$" not in cache:
            put("data.cache", cache)

    def _data_words(self) -> tuple[list[str], list[str]]:
        """What is trained on and what is held out, as words of arguments, or of the files that arguments name."""
        given = self._given
        training = [*(given.values("--data-path") or []), *(given.values("--train-data-path") or [])]
        held_out = given.values("--valid-data-path") or []
        for name in ("--data-args-path", "--per-split-data-args-path"):
            words = given.text(name)
            if words is None:
                continue
            try:
                text = Path(words).read_text(encoding="utf-8")
                if name == "--data-args-path":
                    training += shlex.split(text)
                else:
                    by_split = json.loads(text)
                    training += map(str, by_split["train"])
                    held_out = [str(word) for word in by_split.get("valid") or []]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                given.leave(name, "is lost", "it names the data, and is not here or cannot be read")
        return training, held_out

    def read_looking(self) -> None:
        """Evaluations, checkpoints and where figures go."""
        given, put, batch = self._given, self._job.put, self._steps.largest
        for field, name in (
            ("evaluate_every_tokens", "--eval-interval"),
            ("checkpoint_every_tokens", "--save-interval"),
        ):
            if interval := given.whole(name):
                tokens = interval * batch * self._seq_len
                put(f"training.{field}", tokens, f"{name} {interval} × {batch} × {self._seq_len}")
        if iterations := given.whole("--eval-iters"):
            put("training.evaluate_sequences", iterations * batch, f"--eval-iters {iterations} × {batch}")
        given.leave("--save", "is not needed", "checkpoints are in the run's folder: launch.runs")
        if (minutes := given.real("--distributed-timeout-minutes")) is not None:
            put("launch.timeout_seconds", minutes * 60)
        project, entity = given.text("--wandb-project"), given.text("--wandb-entity")
        if project:
            wandb = {"project": project} | ({"entity": entity} if entity else {})
            put("tracking", {"tensorboard": {}, "wandb": wandb})


def _blend(words: list[str]) -> tuple[list[float], list[str]]:
    """Weights and prefixes of a dataset: `0.3 first 0.7 second`, or prefixes alone. A prefix that the script takes from
    a variable that is not set is left out."""
    numbers = words[::2]
    if len(words) % 2 == 0 and numbers and all(re.fullmatch(r"[\d.]+(e-?\d+)?", word) for word in numbers):
        return [float(word) for word in numbers], words[1::2]
    return [], [word for word in words if word]
