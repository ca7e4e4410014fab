"""Where the job file goes that a command has made of something else: `copus import-args` and `copus import-hf`."""

from collections.abc import Mapping
from pathlib import Path

from copus.durable import replace_text
from copus.job import JobError
from launch.json_output import as_json_line


def put_job_file(text: str, out: Path | None, values: Mapping[str, object], *, as_json: bool) -> None:
    """Write it to `--out`, else print it; with `--json` print `values` instead. Raises JobError if `out` cannot be
    written."""
    if out is not None:
        try:
            replace_text(out, text)
        except OSError as error:
            raise JobError(f"--out {out}: {error.strerror}") from None
    if as_json:
        print(as_json_line(values))
    elif out is None:
        print(text, end="")
