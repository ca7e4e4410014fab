"""The machine."""

from pydantic import Field

from profiles.record import Record


class Cluster(Record):
    """Accelerators that the job may use. On a machine without GPUs an accelerator is one CPU core (one rank each)."""

    nodes: int = Field(default=1, gt=0, le=100_000)
    """Machines."""
    accelerators_per_node: int = Field(gt=0, le=10_000)
    """Accelerators, and so ranks, on each machine."""
    accelerator: str = "cpu"
    """Kind of accelerator: `cpu` trains on CPU cores, also where there are GPUs; any other name takes the GPUs that are
    there. A name of `profiles/accelerators/` (h100-sxm, a100-80g, mi300x, …), or the path of a data sheet written as
    those are (`my-card.yaml`), says how fast it is and how much memory it has."""
    network_gbit_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Bandwidth of a machine's network in one direction, which its accelerators share. null: as the data sheet of the
    accelerator says; a job on several machines measures it as it starts, and believes what is less than half or more
    than twice of that."""

    @property
    def accelerators(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.accelerators_per_node
