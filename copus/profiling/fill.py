"""Drives a profiler: what is measured next, into which table, and when it is enough."""

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from copus.backends.registry import find_backend
from copus.estimate import predictor_of
from copus.events import NOTHING_TO_SAY, Profile, has_checkpoint
from copus.job import JobConfig, JobError
from copus.profilers import TRIED, find_profiler
from planner.last_measurement import last_measurement
from planner.memory_check import LIKELY
from planner.pruning import worthwhile
from planner.ranking import next_round
from profiles.configuration import Configuration
from profiles.measurement import Measurement
from profiles.profiler import ProfilerType, Task
from profiles.table import ThroughputTable

DIED = "the workers died"
DEATHS = 2
"""Attempts that end at the same configuration before it is taken for the cause. One may have been killed by the user, a
scheduler or a failing node; workers that their agent saw die, and restarted, were alone with it."""


def fill_table(
    job: JobConfig,
    run: Path,
    kind: ProfilerType,
    task: Task,
    report: Callable[[Profile], object],
    stop_requested: Callable[[], bool],
    leads: bool = True,
    share: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Measure until the table says which configuration is the fastest at every global batch, or the time is up.

    Called on every rank where the profiler runs on all of them: the one that `leads` decides, and writes; `share` gives
    its value to the others. Every measurement is in the table as soon as it is made, so that an interrupted profile
    goes on where it was. Ends after `profile.budget_seconds`, or when asked to. A run that has trained already measures
    nothing, unless no row is of this machine, this software and this many ranks. Raises JobError for options that the
    profiler cannot take.
    """
    try:
        profiler = kind(task)
    except ValueError as error:
        raise JobError(f"profile.options: {error}") from None
    lead = _Lead(job, run, kind, task, report, stop_requested) if leads else None
    while (configuration := share(lead.next() if lead else None)) is not None:
        measurement = profiler.measure(configuration)
        if lead and not isinstance(measurement, Measurement | None):
            raise JobError(
                f"profile.profiler({job.profile.profiler}): measure returned {type(measurement).__name__}, expected a "
                "Measurement or None"
            )
        if lead:
            lead.take(configuration, measurement)


def load_profiler(job: JobConfig) -> ProfilerType:
    """What the job's profiler is made by. Raises JobError if it cannot be imported."""
    try:
        return find_profiler(job.profile.profiler).load()
    except ValueError as error:
        raise JobError(f"profile.profiler: {error}") from None


class _Lead:
    """What the first rank, or the only process, does besides measuring."""

    def __init__(
        self,
        job: JobConfig,
        run: Path,
        kind: ProfilerType,
        task: Task,
        report: Callable[[Profile], object],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._job, self._task, self._report, self._stop_requested = job, task, report, stop_requested
        self._table = ThroughputTable(job.profile.table)
        self._shards = kind.shards
        self._rounds = 1 if kind.shards else job.profile.rounds  # shards alone are not ranked
        self._space = _space(job)
        self._since = (run / "job.yaml").stat().st_mtime if job.profile.when == "always" else 0.0
        self._deadline = time.monotonic() + job.profile.budget_seconds
        self._tried = run / TRIED
        self._deaths: Counter[Configuration] = Counter()
        self._queue: list[Configuration] = []
        self._done = 0
        self._began = time.monotonic()
        self._took: list[float] = []
        self._measured: Counter[Configuration] = Counter()
        self._note_death()
        ranks = job.cluster.accelerators
        self._measured_before = has_checkpoint(run) and any(
            row.configuration.layout.accelerators == ranks for row in self._rows()
        )

    def next(self) -> Configuration | None:
        """What to measure; None if that is all."""
        never = self._job.profile.when == "never" or self._measured_before
        if never or time.monotonic() > self._deadline or self._stop_requested():
            self._queue = []
        elif not self._queue:
            self._queue = self._plan()
        if not self._queue:
            self._tried.unlink(missing_ok=True)  # nothing is measured any more: no later death is of what was
            return None
        configuration = self._last() or self._queue[0]
        self._queue = [queued for queued in self._queue if queued != configuration]
        trying = {
            "configuration": configuration.model_dump(),
            "time": time.time(),
            "deaths": self._deaths[configuration],
            "session": _session(),
        }
        self._began = time.monotonic()
        self._tried.write_text(json.dumps(trying), encoding="utf-8")
        return configuration

    def take(self, configuration: Configuration, measurement: Measurement | None) -> None:
        """Keep what was measured, and say so."""
        self._done += 1
        self._took.append(time.monotonic() - self._began)
        self._measured[configuration] += 1
        if measurement is None:  # the profiler has nothing to say of it: do not ask again
            self._measured[configuration] = self._rounds
        else:
            self._table.add(measurement)
        self._tried.unlink(missing_ok=True)
        self._queue = self._plan()  # what needs more memory than a failure, or is settled now, need not be measured
        self._report(
            Profile(
                step=0,
                samples_consumed=0,
                configuration=configuration,
                done=self._done,
                total=self._done + len(self._queue),
                step_seconds=measurement.step_seconds if measurement else None,
                seconds=time.monotonic() - self._began,
                failure=measurement.failure if measurement else NOTHING_TO_SAY,
            )
        )

    def _plan(self) -> list[Configuration]:
        """The next round. Nothing is measured more than `rounds` times by one profiler, whatever it returns."""
        rows, start, within = self._rows(), self._job.training.configuration, self._job.profile.settled_within
        possible = predictor_of(self._job, rows, use_cost_model=False).memory.possible(self._space, start)
        queue = next_round(possible, rows, start, self._rounds, within, self._enough())
        # What died once comes first: another death would be taken for the first one of whatever ran then.
        return sorted(queue, key=lambda configuration: -self._deaths[configuration])

    def _last(self) -> Configuration | None:
        """What to measure when no time will be left afterwards, if there is something better than the next in the
        queue: what looks fastest is then verified. Where all is measured the queue does so by itself."""
        usual = statistics.median(self._took or [0.0])  # the first may have taken long for reasons of its own
        if self._shards or time.monotonic() + usual <= self._deadline:
            return None
        predictor = predictor_of(self._job, self._rows())
        unsure = predictor.memory.refusals(self._space, LIKELY)
        return last_measurement(predictor, {*unsure, *self._enough()} | ({*predictor.candidates} - {*self._space}))

    def _rows(self) -> list[Measurement]:
        """This fingerprint's rows; with `when: always`, only this run's."""
        rows = (self._table.shards if self._shards else self._table.rows)(self._task.fingerprint)
        return [row for row in rows if row.time >= self._since]

    def _enough(self) -> set[Configuration]:
        """Configurations that were measured `profile.rounds` times."""
        return {configuration for configuration, times in self._measured.items() if times >= self._rounds}

    def _note_death(self) -> None:
        """What was being measured when an earlier attempt of this run died may be the cause (`DEATHS`), unless the
        table says already how it ended: a rank may have had the time to."""
        if not self._tried.exists():
            return
        try:
            trying = json.loads(self._tried.read_text(encoding="utf-8"))
            configuration = Configuration.model_validate(trying["configuration"])
            deaths = int(trying.get("deaths", 0)) + 1
        except (ValueError, KeyError, TypeError):  # the write itself was cut off
            self._tried.unlink()
            return
        rows = self._table.everything(self._task.fingerprint)
        if any(row.configuration == configuration and row.time >= trying["time"] for row in rows):
            self._tried.unlink()
            return
        if deaths < DEATHS and not _restarted(trying.get("session")):
            self._deaths[configuration] = deaths
            return
        self._table.add(
            Measurement(
                fingerprint=self._task.fingerprint,
                model=self._task.model,
                configuration=configuration,
                failure=DIED,
                shard=self._shards,
                time=time.time(),
            )
        )
        self._tried.unlink()


def _session() -> str:
    """What all attempts under one agent have in common; empty without an agent."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _restarted(session: Any) -> bool:
    """Whether the agent that saw the workers of that session die has started this process in their place."""
    return session == _session() != "" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _space(job: JobConfig) -> list[Configuration]:
    """What the planner will ask the throughput of."""
    start = job.training.configuration
    if job.planner.policy == "static":
        return [start]
    training = job.training
    backend = find_backend(training.backend).for_training(training)
    implementation = training.implementation
    space = worthwhile(job.planner, job.model, job.cluster, training.precision, start, implementation, backend)
    if job.planner.keeps_layout:
        return [candidate for candidate in space if candidate.layout == start.layout]
    return space
