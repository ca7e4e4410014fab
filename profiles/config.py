"""The `profile` section of a job file."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from profiles.record import Record


class ProfileConfig(Record):
    """How throughput is learned."""

    table: Path = Path("~/.cache/copus/throughput.jsonl")
    """Throughput table (append-only JSONL) that is read, and that new measurements are added to."""
    when: Literal["missing", "always", "never"] = "missing"
    """Measure before training: what the table lacks, everything again, or nothing."""
    budget_seconds: PositiveFloat = 120.0
    """Stop measuring after this long; what is left stays unmeasured and is never chosen."""
    warmup_steps: PositiveInt = 1
    """Steps run and not counted before each measurement."""
    steps: PositiveInt = Field(default=3, ge=2)
    """Steps timed for each measurement, in each round."""
    rounds: PositiveInt = 2
    """Times that the whole set is gone through, so that a slow moment of the machine hits one round and not one
    layout."""
