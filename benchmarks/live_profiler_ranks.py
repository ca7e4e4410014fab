"""What each rank of `benchmarks.live_profiler` does: `python -m benchmarks.live_profiler_ranks FOLDER` under torch's
launcher.

FOLDER/task.json says what is measured; rank 0 leaves FOLDER/result.json, the measurements.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.job import parse_job
from copus.profiling.live import LiveProfiler
from profiles.configuration import Configuration
from profiles.profiler import Task


def main(folder: Path) -> int:
    """Measure what the task names, in this order."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = parse_job(task["job"])
    backend = MegatronBackend(job, torch.device("cpu"))

    def batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed = torch.Generator().manual_seed(first)
        tokens = torch.randint(job.model.vocab, (count, job.model.seq_len + 1), generator=seed)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    task_ = Task(job.model, job.cluster, backend.fingerprint(), job.profile, backend, job, batches)
    profiler = LiveProfiler(task_)
    rows = [profiler.measure(Configuration.model_validate(wanted)) for wanted in task["wanted"]]
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps([row.model_dump(mode="json") for row in rows]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
