"""`python -m copus.weights RUN CHECKPOINT DIR FORMAT PRECISION`: export a checkpoint, on one process without a GPU.

Progress goes to stderr. Nothing is at DIR before everything is.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Literal, cast, get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from copus.durable import sync_folder
from copus.job import JobConfig, JobError, load_job
from copus.weights.export_hugging_face import HuggingFaceExport
from copus.weights.export_megatron import MegatronExport
from copus.weights.trained import Precision

Format = Literal["hf", "megatron"]
EXPORTS: dict[Format, type[HuggingFaceExport] | type[MegatronExport]] = {
    "hf": HuggingFaceExport,
    "megatron": MegatronExport,
}
"""The formats, by their names on the command line."""
_SPARE_BYTES = 16 * 2**20
"""For the small files, beside the weights."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 for an error that the user can fix, 130 and 143 when interrupted."""
    run, checkpoint, folder = map(Path, arguments[:3])
    to, precision = arguments[3:]
    assert to in EXPORTS, "the launcher offers no other formats"
    assert precision in get_args(Precision), "the launcher offers no others"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half made is left
    try:
        export(run, load_job(run / "job.yaml"), checkpoint, folder, cast(Format, to), cast(Precision, precision))
    except JobError as error:
        print(f"copus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def export(run: Path, job: JobConfig, checkpoint: Path, folder: Path, to: Format, precision: Precision) -> None:
    """Write a checkpoint of a run, which has been verified, into a new folder in a format of `EXPORTS`.

    Raises JobError, and leaves nothing, if that cannot be done.
    """
    planned = EXPORTS[to](run, job, checkpoint, precision)
    writing = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < planned.bytes + _SPARE_BYTES:
            raise JobError(
                f"{folder}: the weights take {planned.bytes / 2**20:.0f} MiB, what is beside them up to "
                f"{_SPARE_BYTES >> 20} MiB, and its disk has room for {free / 2**20:.0f} MiB"
            )
        writing.mkdir()
        with _progress() as bars:
            task = bars.add_task(f"writing {folder.name}", total=planned.bytes)
            planned.write(writing, lambda count: bars.update(task, advance=count))
        for path in [*writing.rglob("*"), writing]:
            sync_folder(path)  # files too: their contents
        if folder.is_dir():
            folder.rmdir()  # an empty one; anything else is refused here
        os.rename(writing, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise JobError(f"{error.filename or folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    return Progress(*columns, TransferSpeedColumn(), TimeElapsedColumn(), console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
