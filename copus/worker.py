"""One rank of a job: `python -m copus.worker RUN`, started by an engine under torch's elastic agent.

Reads `RUN/job.yaml`, goes on from the newest checkpoint that verifies, on as many ranks as there are, and writes
`RUN/events.jsonl` from rank 0.
Stops at the next step, with a checkpoint, when the file `RUN/stop` appears or on SIGTERM or SIGINT; exits 0 then, and
after a finished run. A run directory with a plan of branches (`copus calibrate`) runs these instead. If the engine says
where to meet (`copus.rendezvous`), this process outlives its world, and goes on in the next one.
"""

import errno
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from copus.audit import audit_run
from copus.backends.base import Backend
from copus.backends.registry import find_backend
from copus.branch_runs import run_branches
from copus.branches import read_plan
from copus.checkpoints.files import check_same_data
from copus.checkpoints.store import read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import all_gather, broadcast_from_rank0
from copus.data.prepared import prepared_path
from copus.data.samples import open_data
from copus.devices import check_accelerator, join_world, rank_device
from copus.event_log import EventLog
from copus.events import ATTEMPT, REQUEUED, Audited, End, Event, Restart, Start, Warned, samples_trained
from copus.fencing import TOKEN
from copus.job import JobConfig, JobError, load_job
from copus.loop import Trainer
from copus.network import on_measured_network
from copus.planning import Planner
from copus.profiling.live import profile_missing
from copus.resize import found_cluster, resized
from copus.resume import build_or_resume, newest_that_verifies
from copus.resume_request import read_resume_request, write_resume_request
from copus.step_lines import StepLines
from copus.stop_request import StopRequest
from copus.stores import host_store, is_bindable, join_store
from copus.tracking.fan_out import FanOut
from copus.user_errors import EXIT_CODE, one_line, report_failure
from copus.worlds import Worlds
from profiles.configuration import Configuration
from profiles.measurement import Fingerprint, Measurement
from profiles.mfu import peak_samples_per_second
from profiles.table import ThroughputTable
from profiles.throughput import Throughput


def main(arguments: list[str]) -> int:
    """Run one rank; the exit status of the process."""
    run = Path(arguments[0])
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    stop = StopRequest(run)
    worlds = Worlds(stop.for_good)
    worlds.enter_first(prepare=lambda: find_backend(load_job(run / "job.yaml").training.backend).load())
    while True:
        attempt = _Attempt(run, stop, profile_only="--profile-only" in arguments)
        failure, goes_on = None, False
        try:
            with worlds.watched():
                goes_on = attempt.work()
        except Exception as error:
            failure = error
            goes_on = worlds.may_outlive(error)
        if goes_on:
            with worlds.leaving(failure):
                attempt.leave(failure)
            if worlds.enter_next():
                continue
        if failure is not None:
            if report_failure(failure, EventLog(run), int(os.environ["RANK"])):
                return EXIT_CODE
            raise failure
        if not goes_on:
            dist.destroy_process_group()
        return 0


def _agree_on_token() -> None:
    """Let all ranks have the attempt's token, if only the ranks of one node were given it."""
    tokens = [token for token in all_gather(os.environ.get(TOKEN)) if token]
    if tokens:
        os.environ[TOKEN] = tokens[0]


def _on_these_ranks(job: JobConfig) -> JobConfig:
    """The job for as many ranks as there are: the elastic agent may have found fewer, or more, than were planned."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return resized(job, found_cluster(job.cluster, dist.get_world_size(), ranks_per_node))


class _Attempt:
    """The run in one world of ranks."""

    def __init__(self, run: Path, stop: StopRequest, profile_only: bool) -> None:
        self._run, self._stop, self._profile_only = run, stop, profile_only
        self._backend: Backend | None = None
        self._trainer: Trainer | None = None

    def work(self) -> bool:
        """Join the other ranks, make a backend, and run the branches of a calibration if the run has a plan of them;
        else train. True if all is done only until there are more ranks. Collective."""
        job = load_job(self._run / "job.yaml")
        device = _start_process_group(job)
        _agree_on_token()
        job = on_measured_network(_on_these_ranks(job), device)
        self._backend = find_backend(job.training.backend).load()(job, device)
        with _Reporter(self._run if dist.get_rank() == 0 else None, job) as report:
            branches = read_plan(self._run)
            if branches is None:
                stopped = self._train(job, self._backend, report)
            else:
                stopped = True
                run_branches(
                    job, self._run, branches, self._backend,
                    lambda branch: open_data(branch, prepared_path(branch)), report, self._stop,
                )  # fmt: skip
        return bool(broadcast_from_rank0(stopped and self._stop.is_for_larger_world))

    def leave(self, failure: Exception | None) -> None:
        """Let go of all of it, in a process that goes on. Not collective: other ranks may be gone."""
        if self._trainer is not None:
            self._trainer.abandon()
        if self._backend is not None:
            self._backend.leave()
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # frees the tensors that the frames refer to
        self._trainer = self._backend = None
        gc.collect()

    def _train(self, job: JobConfig, backend: Backend, report: Callable[[Event], None]) -> bool:
        """Go on from the newest checkpoint. True if somebody asked to stop before the end."""
        run, stop = self._run, self._stop
        prepared = prepared_path(job)
        train, valid = open_data(job, prepared)
        request = read_resume_request(run)
        newest = newest_that_verifies(run, request, report)
        if newest is not None:
            check_same_data(newest, prepared.name)
        if self._profile_only or not _is_finished(job, newest):
            profile_missing(job, run, backend, train, report, stop)
        if self._profile_only:
            return False
        fingerprint = backend.fingerprint()
        rows = ThroughputTable(job.profile.table).everything(fingerprint) if dist.get_rank() == 0 else []
        throughput = Throughput(row for row in rows if not row.shard)
        state = build_or_resume(job, newest, backend, throughput, request, report)
        state.data = prepared.name
        resumed_from = None if newest is None else str(newest.relative_to(run))
        _report_restart(run, state, resumed_from, report)
        report(start_of(job, state, backend.configuration, fingerprint, resumed_from))
        _report_shared_evaluation(job, state, report)
        if dist.get_rank() == 0 and request.may_begin_again:  # once
            write_resume_request(run, request.model_copy(update={"may_begin_again": False}))
        started = time.monotonic()
        planner = _planner(job, rows, state, fingerprint)
        self._trainer = Trainer(job, run, backend, train, valid, planner, state, report, stop)
        reason = self._trainer.train()
        if dist.get_rank() == 0:
            _report_audit(run, state, report)
        report(End(**state.here, reason=reason, seconds=time.monotonic() - started))
        return reason == "interrupted"


def _is_finished(job: JobConfig, newest: Path | None) -> bool:
    """Whether nothing is left to train after the newest checkpoint."""
    return newest is not None and read_state(newest)[0].samples_consumed >= job.total_samples


def _planner(job: JobConfig, rows: list[Measurement], state: TrainerState, fingerprint: Fingerprint) -> Planner | None:
    """The planner, on rank 0, as the checkpoint left it; without its speeds if these are another framework's."""
    speeds_of = f"{fingerprint.backend}, {fingerprint.precision}"
    with_speeds = state.speeds_of in ("", speeds_of)
    state.speeds_of = speeds_of
    if dist.get_rank() != 0:
        return None
    planner = Planner(job, rows, state.decisions)
    planner.restore(state.planner, with_speeds)
    return planner


def _report_restart(run: Path, state: TrainerState, resumed_from: str | None, report: Callable[[Event], None]) -> None:
    """Say what was lost, if the run had trained before."""
    done = samples_trained(run)
    if done is None:
        return
    report(
        Restart(
            **state.here,
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get(ATTEMPT, 0)),
            requeued=REQUEUED in os.environ,
            resumed_from=resumed_from,
            samples_repeated=max(0, done - state.samples_consumed),
            ranks=dist.get_world_size(),
        )
    )


def _report_shared_evaluation(job: JobConfig, state: TrainerState, report: Callable[[Event], None]) -> None:
    """Say so if validation takes another number of sequences than the job file names."""
    if job.evaluate_sequences == job.training.evaluate_sequences:
        return
    message = (
        f"validation losses are of {job.evaluate_sequences} sequences, not of training.evaluate_sequences("
        f"{job.training.evaluate_sequences}): {job.cluster.accelerators} ranks share them evenly"
    )
    report(Warned(**state.here, message=message))


def start_of(
    job: JobConfig,
    state: TrainerState,
    configuration: Configuration,
    fingerprint: Fingerprint,
    resumed_from: str | None,
) -> Start:
    """What the event log says when training begins."""
    return Start(
        **state.here,
        configuration=configuration,
        total_samples=job.total_samples,
        seq_len=job.model.seq_len,
        max_minutes=job.training.max_minutes,
        peak_samples_per_second=peak_samples_per_second(job.model, job.cluster, job.training.precision),
        resumed_from=resumed_from,
        data=state.data or None,
        backend=job.training.backend,
        network_gbit_per_second=job.cluster.network_gbit_per_second,
        hardware=fingerprint.hardware,
        software=fingerprint.software,
    )


def _report_audit(run: Path, state: TrainerState, report: Callable[[Event], None]) -> None:
    """Let the run look back on itself. It is trained and saved by now, so nothing that is wrong here may fail it."""
    try:
        report(Audited(**state.here, audit=audit_run(run)))
    except Exception as error:
        report(Warned(**state.here, message=f"the audit failed, `copus audit` may still work: {one_line(error)}"))


def _start_process_group(job: JobConfig) -> torch.device:
    """Join the other ranks: NCCL where there are GPUs, gloo elsewhere."""
    torch.set_num_threads(job.launch.threads_per_rank)
    timeout = timedelta(seconds=job.launch.timeout_seconds)
    try:
        check_accelerator(job.cluster.accelerator)
        device = rank_device(int(os.environ["LOCAL_RANK"]), job.cluster.accelerators_per_node)
    except ValueError as error:
        raise JobError(f"cluster.{error}") from None
    join_world(device, timeout, **_meeting_place(timeout))
    return device


def _meeting_place(timeout: timedelta) -> dict[str, Any]:
    """The store in which the ranks find each other, on the address of rank 0's node; nothing if that is a name, or
    an address that the node does not know of: torch opens its own."""
    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    if not is_bindable(address):
        return {}
    try:
        store = (join_store if rank else host_store)(address, port, timeout)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        store = TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False)
    return {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}


@dataclass
class _Reporter:
    """Where events go on rank 0: its output, the log, and the trackers of the job. Elsewhere (no run) nowhere."""

    run: Path | None
    job: JobConfig

    def __enter__(self) -> Callable[[Event], None]:
        if self.run is None:
            return lambda event: None
        self._log = EventLog(self.run)
        self._lines = StepLines()
        self._trackers = FanOut(self.run, self.job)
        return self._write

    def _write(self, event: Event) -> None:
        if line := self._lines.line(event):
            print(line, flush=True)
        for line in self._trackers.write(self._log.write(event)):
            self._log.write(Warned(step=event.step, samples_consumed=event.samples_consumed, message=line))

    def __exit__(self, *exception: Any) -> None:
        if self.run is not None:
            for line in self._trackers.close(failed=exception[0] is not None):
                print(f"copus: {line}", file=sys.stderr, flush=True)
            self._log.close()


class Output:
    """A standard stream that loses what finds no room. Its file is in the run's folder, and training goes on when the
    disk is full: a line about that must not end it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as much as there is room for."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what was held back, if there is room for it."""
        with suppress(OSError):
            self._stream.flush()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    status = main(sys.argv[1:])
    # Not by way of C++'s own end, where a thread of torch or gloo that is still there aborts the process: the
    # agent then starts a finished run again.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
