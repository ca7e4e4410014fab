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
    """Kind of accelerator, a name that throughput tables are kept by: cpu, h100-sxm, a100-80g, …"""

    @property
    def accelerators(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.accelerators_per_node
