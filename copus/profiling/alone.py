"""A profiler that needs no job: `python -m copus.profiling.alone RUN`, one process under torch's elastic agent.

Reads `RUN/job.yaml` and fills the job's throughput table; writes `RUN/events.jsonl`. Stops after the measurement that
it is at when the file `RUN/stop` appears or on SIGTERM or SIGINT.
"""

import sys
import warnings
from pathlib import Path

import torch

from copus.devices import check_accelerator
from copus.event_log import EventLog
from copus.fingerprint import fingerprint_of
from copus.job import JobError, load_job
from copus.profiling.fill import fill_table, load_profiler
from copus.stop_request import StopRequest
from copus.user_errors import EXIT_CODE, report_failure
from profiles.profiler import Task


def main(arguments: list[str]) -> int:
    """Measure; the exit status of the process."""
    run = Path(arguments[0])
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    stop = StopRequest(run)
    log = EventLog(run)
    try:
        job = load_job(run / "job.yaml")
        try:
            check_accelerator(job.cluster.accelerator)  # the rows would say that they are of a CPU
        except ValueError as error:
            raise JobError(f"cluster.{error}") from None
        torch.set_num_threads(job.launch.threads_per_rank)  # a part of the fingerprint
        task = Task(job.model, job.cluster, fingerprint_of(job), job.profile, job=job)
        fill_table(job, run, load_profiler(job), task, log.write, stop)
    except Exception as error:
        if report_failure(error, log, rank=0):
            return EXIT_CODE
        raise
    finally:
        log.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
