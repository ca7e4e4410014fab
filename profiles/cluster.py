"""The machine."""

from pydantic import PositiveInt

from profiles.record import Record


class Cluster(Record):
    """Accelerators that the job may use. On a machine without GPUs an accelerator is one CPU core (one rank each)."""

    nodes: PositiveInt = 1
    """Machines."""
    accelerators_per_node: PositiveInt
    """Accelerators, and so ranks, on each machine."""
    accelerator: str = "cpu"
    """Kind of accelerator: `cpu` trains on CPU cores, also where there are GPUs; any other name (h100-sxm, a100-80g, …)
    takes the GPUs that are there."""

    @property
    def accelerators(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.accelerators_per_node
