"""Where workers run. An engine starts them, or queues them; nothing else in `launch` knows how."""

from pathlib import Path

import yaml

from copus.engines import load_engine
from copus.job import JobConfig, JobError
from launch.engines.agent import check_environment
from launch.engines.base import AttendedEngine, Engine, EngineState, QueuedEngine, Workers
from launch.engines.local import LocalEngine
from launch.engines.ticket import FILE, Ticket, read_ticket
from launch.run_directory import shown, typed


def engine_of(job: JobConfig) -> Engine:
    """The engine that `launch.engine` of a job names. Raises JobError if it cannot run this job."""
    engine = _engine(job.launch.engine, job.launch.options)
    engine.check(job)
    check_environment(job, getattr(engine.options, "env", {}))  # engines of this machine have its own
    return engine


def attended_engine_of(job: JobConfig, command: str) -> AttendedEngine:
    """The same for a command that stands by its workers. Raises JobError for an engine with a queue."""
    engine = engine_of(job)
    if not isinstance(engine, AttendedEngine):
        raise JobError(
            f"launch.engine({job.launch.engine}): {command} stands by its workers and cannot queue them: "
            "--engine local or hosts, or, in a Slurm allocation, srun"
        )
    return engine


def engine_of_run(run: Path, name: str | None = None) -> Engine:
    """The engine that a run was given to last, as its job file says; with `name` that one.

    It gets the file's options if they are its own. Raises JobError if the job file no longer says which, or it
    does not take the options.
    """
    try:
        values = yaml.safe_load((run / "job.yaml").read_text(encoding="utf-8"))
        launch = values.get("launch", {})
        named = launch.get("engine", "local")
        return _engine(name or named, launch.get("options", {}) if name in (None, named) else {})
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise JobError(f"{shown(run)}/job.yaml: launch: {' '.join(str(error).split())}") from None


def engine_state(run: Path, name: str | None = None) -> EngineState:
    """Queued, running, ended or unknown, in words too. Quick, and raises nothing: it is for lists of runs.

    Asks the engine of `engine_of_run`.
    """
    try:
        return engine_of_run(run, name).state(run)
    except (JobError, OSError) as error:
        return EngineState("unknown", str(error))


def check_not_queued(run: Path) -> None:
    """Make sure that no queued job can start workers in a run. Hold the run's lock.

    Raises JobError if one waits, or runs, or nobody can say.
    """
    ticket = read_ticket(run)
    if ticket is None:
        return
    state = engine_state(run, ticket.engine)  # the job file may name another one since
    if state.phase == "unknown":
        raise JobError(f"{shown(run)}: {state.words}; where its job is surely gone, remove {shown(run)}/{FILE}")
    if state.phase != "ended":
        raise JobError(f"{shown(run)}: {state.words}; `copus cancel {typed(run)}` stops it")


def _engine(name: str, options: dict[str, object]) -> Engine:
    kind = load_engine(name)
    engine: Engine = kind(kind.Options.model_validate(options))
    return engine


__all__ = [
    "AttendedEngine",
    "Engine",
    "EngineState",
    "LocalEngine",
    "QueuedEngine",
    "Ticket",
    "Workers",
    "attended_engine_of",
    "check_not_queued",
    "engine_of",
    "engine_of_run",
    "engine_state",
]
