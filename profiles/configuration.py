"""What the planner chooses: a layout, a micro-batch and a global batch."""

from pydantic import model_validator

from profiles.layout import Layout
from profiles.record import PositiveInt, Record


class Configuration(Record):
    """A complete way to run a step. Batches are in sequences."""

    layout: Layout
    """Where the model lies."""
    micro_batch: PositiveInt
    """Sequences in one forward-backward pass of one data parallel replica."""
    global_batch: PositiveInt
    """Sequences in one optimizer step, over all replicas."""

    @model_validator(mode="after")
    def _check_whole(self) -> "Configuration":
        per_pass = self.layout.dp * self.micro_batch
        if self.global_batch % per_pass:
            raise ValueError(
                f"global_batch({self.global_batch}) ÷ (dp({self.layout.dp}) × micro_batch({self.micro_batch})) "
                f"= {self.global_batch / per_pass:g}, not a whole number of micro-batches"
            )
        return self

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that each replica runs in a step (gradient accumulation)."""
        return self.global_batch // (self.layout.dp * self.micro_batch)

    @property
    def halved(self) -> "Configuration":
        """The same step as twice as many micro-batches of half the size, where the micro-batch is even; else itself."""
        return self if self.micro_batch % 2 else self.model_copy(update={"micro_batch": self.micro_batch // 2})

    @property
    def label(self) -> str:
        """Short name for people: `TP2·PP1·DP1 B16 m4`."""
        return f"{self.layout.label} B{self.global_batch} m{self.micro_batch}"
