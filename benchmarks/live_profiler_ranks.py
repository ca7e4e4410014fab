"""What each rank of `benchmarks.live_profiler` does: `python -m benchmarks.live_profiler_ranks FOLDER` under torch's
launcher.

FOLDER/task.json says what is measured, and with how many more steps each is timed again right after; rank 0 leaves
FOLDER/result.json, the measurements.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.job import parse_job
from copus.profiling.live import LiveProfiler
from profiles.config import ProfileConfig
from profiles.configuration import Configuration
from profiles.profiler import Task


def main(folder: Path) -> int:
    """Measure what the task names, in this order."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    _pin()
    dist.init_process_group("gloo")
    job = parse_job(task["job"])
    backend = MegatronBackend(job, torch.device("cpu"))

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed = torch.Generator().manual_seed(first)
        tokens = torch.randint(job.model.vocab, (count, job.model.seq_len + 1), generator=seed)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def profiler(config: ProfileConfig) -> LiveProfiler:
        return LiveProfiler(Task(job.model, job.cluster, backend.fingerprint(), config, backend, job, batches))

    wanted = [Configuration.model_validate(values) for values in task["wanted"]]
    usual = profiler(job.profile)
    rows = [usual.measure(configuration) for configuration in wanted]
    started = time.perf_counter()
    settled = []
    if task["settled_steps"]:
        longer = profiler(job.profile.model_copy(update={"steps": task["settled_steps"]}))
        settled = [longer.measure(configuration) for configuration in wanted]
    if dist.get_rank() == 0:
        result = {
            "rows": [row.model_dump(mode="json") for row in rows],
            "settled": [row.model_dump(mode="json") for row in settled],
            "settled_seconds": time.perf_counter() - started,
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _pin() -> None:
    """Keep this rank on one core. Where ranks share cores, who shares one with whom decides how fast a layout is, and a
    system that is left to itself decides that anew in every process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
