"""`copus advise`: what batch and layout another trainer should take now, from what it measured itself."""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copus.job import JobConfig, JobError, load_job
from copus.meter_log import MeterStep
from copus.planning import Planner
from launch.emit import check_tool, print_run
from launch.explain import at_stake, print_candidates, shown_candidates, trade
from launch.fixed_run import at_configuration
from launch.json_output import as_json_line
from launch.recommendation import flow
from launch.tables import PASTED, page
from launch.trainer_logs import read_trainer_log
from planner.outlook import QUANTILE_50
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision
from profiles.formatting import count, duration, noise_interval, percent, three_digits
from profiles.noise_scale import NoiseScale

LOOKS = 24
"""Places of the log at which the planner looks at the noise scale, so that it knows where it is going."""
RECENT = 50
"""Steps whose median is shown."""
WATCH_SECONDS = 10.0
"""Time between two looks at the log."""


@dataclass(frozen=True)
class Advice:
    """What to do, and what it rests on."""

    job: JobConfig
    """The job, beginning in what runs."""
    step: MeterStep
    """The last step of the log."""
    decision: Decision
    """What the planner would do."""
    step_seconds: float | None
    """Median of the last steps in the configuration that runs; None if none was timed."""

    @property
    def advised(self) -> Configuration:
        """What to run from now on."""
        return self.decision.advised or self.decision.chosen

    @property
    def moves(self) -> bool:
        """Whether that is another configuration."""
        return self.advised != self.decision.current

    @property
    def score(self) -> CandidateScore | None:
        """What is expected of it."""
        return next(
            (candidate for candidate in self.decision.candidates if candidate.configuration == self.advised), None
        )

    @property
    def sure(self) -> float | None:
        """Probability that moving to it saves time, from the interval of what it saves; None if nothing moves."""
        score = self.score
        if not self.moves or score is None or score.saved_expected_seconds is None:
            return None
        low, high = score.saved_low_seconds, score.saved_high_seconds
        if low is None or high is None or high <= low:
            return None
        error = (high - low) / (2 * QUANTILE_50)
        return 0.5 * (1 + math.erf(score.saved_expected_seconds / error / math.sqrt(2)))


def advise(
    job_file: Path,
    log: Path,
    overrides: list[str],
    restart_seconds: float,
    tool: str | None,
    *,
    watch: bool = False,
    as_json: bool = False,
    all_candidates: bool = False,
) -> int:
    """Print the advice for the job that a trainer is in the middle of; with `watch`, again whenever it changes.

    `restart_seconds` is what going on in another layout costs. Raises JobError for a job file that is wrong, and for a
    log that cannot be read or does not fit the job.
    """
    if tool is not None:
        check_tool(tool, {"--json": as_json, "--all": all_candidates})
    if not 0 <= restart_seconds < math.inf:
        raise JobError(f"--restart-seconds({restart_seconds}): expected a time, at least 0")
    job = load_job(job_file, overrides, notice=lambda line: print(line, file=sys.stderr), planned_only=True)
    job = _advisory(job, restart_seconds)
    shown: tuple[Configuration, bool] | None = None
    seen = None
    while True:
        state = _state(log)
        if state != seen:
            seen = state
            advice = advice_of(job, read_trainer_log(log, job))
            if (advice.advised, advice.moves) != shown:
                shown = advice.advised, advice.moves
                _show(advice, log, tool, as_json, all_candidates)
        if not watch:
            return 0
        time.sleep(WATCH_SECONDS)


def advice_of(job: JobConfig, steps: list[MeterStep]) -> Advice:
    """The advice after some steps of a trainer. Raises JobError if a step does not fit the job."""
    configurations = [_configuration(job, step) for step in steps]
    current = configurations[-1]
    settings = {"layout": current.layout, "micro_batch": current.micro_batch, "global_batch": current.global_batch}
    reference = job.reference_batch  # the learning rate stays the one of the job file's batch
    training = job.training.model_copy(update={**settings, "reference_batch": reference})
    job = job.model_copy(update={"training": training})
    planner = Planner(job)
    measured = [index for index, step in enumerate(steps) if step.noise is not None and step.noise.value is not None]
    looks = {measured[round(place * (len(measured) - 1) / LOOKS)] for place in range(LOOKS)} if measured else set()
    noise = NoiseScale(grad_sq=0.0, noise_trace=0.0, value=None, low=None, high=None, samples=0)
    for index, (step, configuration) in enumerate(zip(steps, configurations, strict=True)):
        noise = step.noise or noise
        settled = index > 0 and configurations[index - 1] == configuration
        if step.step_seconds is not None:
            planner.observe_step(configuration, step.step_seconds, settled)
        if step.loss is not None:
            planner.observe_loss(step.samples, step.global_batch, step.loss)
        if index in looks and index < len(steps) - 1:
            planner.decide(noise, configuration, step.samples)
    decision = planner.decide(noise, current, steps[-1].samples)
    recent = [
        step.step_seconds
        for step, configuration in zip(steps, configurations, strict=True)
        if configuration == current and step.step_seconds is not None
    ][-RECENT:]
    return Advice(job, steps[-1], decision, statistics.median(recent) if recent else None)


def _advisory(job: JobConfig, restart_seconds: float) -> JobConfig:
    """The job for a planner that others carry out the decisions of: no trials, and a policy that follows the noise."""
    follows = job.planner.policy in ("goodput", "copus")
    update: dict[str, Any] = {
        "advisory": True,
        "trial_budget": 0.0,
        "policy": job.planner.policy if follows else "goodput",
    }
    if job.planner.layout_move_seconds is None:
        update["layout_move_seconds"] = restart_seconds
    return job.model_copy(update={"planner": job.planner.model_copy(update=update)})


def _configuration(job: JobConfig, step: MeterStep) -> Configuration:
    """What a step ran in; layout and micro-batch are the job's where the log does not say them."""
    layout = step.layout or job.training.layout
    if layout.accelerators != job.cluster.accelerators:
        raise JobError(
            f"step {step.step} of the log ran in {layout.label} on {layout.accelerators} accelerators, and the job has "
            f"cluster.nodes({job.cluster.nodes}) × accelerators_per_node({job.cluster.accelerators_per_node}) = "
            f"{job.cluster.accelerators}"
        )
    micro = step.micro_batch or math.gcd(job.training.micro_batch, max(step.global_batch // layout.dp, 1))
    try:
        return Configuration(layout=layout, micro_batch=micro, global_batch=step.global_batch)
    except ValueError as error:
        message = str(error).partition("Value error, ")[2].partition(" [type")[0]
        raise JobError(f"step {step.step} of the log, in {layout.label}: {message or error}") from None


def _state(log: Path) -> object:
    """Something that changes when the log does."""
    try:
        files = sorted(log.rglob("*")) if log.is_dir() else [log]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise JobError(f"{log}: {error.strerror}") from None


def _show(advice: Advice, log: Path, tool: str | None, as_json: bool, all_candidates: bool) -> None:
    if as_json:
        print(as_json_line(as_values(advice, log)), flush=True)
    elif tool is not None:
        notes = [*_lines(advice, log)[:1], _reason(advice.decision)]
        print_run(advice.job, at_configuration(advice.job, advice.advised, advice.decision.critical_batch, notes), tool)
    else:
        from rich.text import Text

        console = page()
        console.print(Text("\n".join(_lines(advice, log))), soft_wrap=True)
        print_candidates(advice.decision, shown_candidates(advice.decision, all_candidates), console)


def _lines(advice: Advice, log: Path) -> list[str]:
    """The advice for people."""
    job, step, decision, noise = advice.job, advice.step, advice.decision, advice.decision.noise
    done = (
        f"{percent(step.samples / job.total_samples)} of the job" if step.samples < job.total_samples else "all of it"
    )
    interval = (
        "is unknown" if noise.value is None else f"= {noise_interval(noise.value, noise.low, noise.high)} sequences"
    )
    critical = (
        "is unknown" if decision.critical_batch is None else f"= {three_digits(decision.critical_batch)} sequences"
    )
    seconds = "no step was timed" if advice.step_seconds is None else f"{duration(advice.step_seconds)} a step"
    advised = f"take {advice.advised.label}" if advice.moves else f"stay at {advice.advised.label}"
    lines = [
        ("log", f"step {step.step}, {count(step.samples * job.model.seq_len)} tokens, {done}"),
        ("noise", f"B_simple {interval} after {noise.samples} steps; φ {critical}"),
        ("now", f"{decision.current.label}: {seconds}"),
        ("advice", advised),
        *([("trade", line)] if (line := trade(decision)) else []),
        *([("sure", f"{percent(advice.sure)} that it saves time")] if advice.sure is not None else []),
        *([("at stake", line)] if (line := at_stake(decision)) else []),
        ("reason", _reason(decision)),
        *([("but", doubt)] if (doubt := _doubt(advice)) else []),
        *([(PASTED, f"training: {flow(advice.advised)}")] if advice.moves else []),
    ]
    return [f"{job.name}, by {log}", *(f"  {name:<10} {text}" for name, text in lines)]


def _reason(decision: Decision) -> str:
    """Why. That nothing moves by itself goes without saying here."""
    return decision.reason.removesuffix("; advisory, so nothing changes")


def _doubt(advice: Advice) -> str | None:
    """What nobody has measured yet of what is advised."""
    score = advice.score
    if not advice.moves or score is None or score.source in ("measured", "seen") or not score.step_seconds:
        return None
    spread = percent((score.step_seconds_spread or 0.0) / score.step_seconds)
    return f"its step time is {score.source} (±{spread}), not measured: time a few steps of it before you stay in it"


def as_values(advice: Advice, log: Path) -> dict[str, Any]:
    """The advice as plain values, for `--json`."""
    score = advice.score
    return {
        "log": str(log),
        "step": advice.step.step,
        "samples": advice.step.samples,
        "step_seconds": advice.step_seconds,
        "moves": advice.moves,
        "advised": advice.advised.model_dump(mode="json"),
        "label": advice.advised.label,
        "saved_seconds": score.saved_expected_seconds if score is not None and advice.moves else None,
        "saved_low_seconds": score.saved_low_seconds if score is not None and advice.moves else None,
        "saved_high_seconds": score.saved_high_seconds if score is not None and advice.moves else None,
        "sure": advice.sure,
        "decision": advice.decision.model_dump(mode="json"),
    }
