"""The `profile` section of a job file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from profiles.record import Record, UserPath


class ProfileConfig(Record):
    """How step times are measured."""

    table: UserPath = Path("~/.cache/copus/throughput.jsonl")
    """Throughput table (append-only JSONL) that is read, and that new measurements are added to."""
    when: Literal["missing", "always", "never"] = "missing"
    """Measure before training: configurations that the table lacks, everything again, or nothing. A resumed run
    measures only if the table has nothing of its machine, its software and its number of ranks."""
    budget_seconds: PositiveFloat = 120.0
    """Stop measuring after this long. Only policies that use predictions (`goodput`, `smallest-saturating`) choose
    configurations that remain unmeasured."""
    warmup_steps: int = Field(default=1, gt=0, le=1000)
    """Steps run and not counted before a measurement. `live` makes them as short as they can be, and leaves them out
    where the layout and the micro-batch have just run."""
    steps: int = Field(default=3, ge=2, le=1000)
    """Steps timed for each measurement, in each round."""
    rounds: int = Field(default=3, gt=0, le=1000)
    """Most times that a configuration is measured. After the first round only those are measured again that may still
    turn out to be the fastest at some global batch; measuring ends when there are none."""
    settled_within: float = Field(default=0.02, ge=0)
    """A configuration that could be faster than the fastest by less than this share is not measured again for that."""
    profiler: str = "live"
    """The profiler. live: the job itself, moved through the configurations. single: one accelerator, a rank's shard by
    itself. published: a CSV file, `options: {csv: FILE}`. Or the name of an installed plugin."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the profiler, which each profiler defines."""
