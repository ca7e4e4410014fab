"""What an accelerator and the links around it can do, by the data sheet: `profiles/accelerators/*.yaml`."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import Field, PositiveFloat

from profiles.cluster import Cluster
from profiles.record import Record

FOLDER = Path(__file__).parent / "accelerators"


class Link(Record):
    """A way between accelerators."""

    kind: str
    """NVLink 4, InfiniBand NDR, Ethernet, …"""
    bytes_per_second: PositiveFloat
    """Of one accelerator, in one direction."""


class Accelerator(Record):
    """One accelerator: what a rank runs on."""

    name: str
    """As in `cluster.accelerator`."""
    flops: dict[str, PositiveFloat]
    """Dense peak by precision (fp32, bf16, fp16, fp8, …), floating point operations per second."""
    rated: bool = True
    """Whether that is from a data sheet; where it is a guess, no utilization is given."""
    memory_bytes: PositiveFloat
    """Memory of one accelerator."""
    memory_bytes_per_second: PositiveFloat
    """Its bandwidth."""
    inside_node: Link
    """Between accelerators of one node."""
    between_nodes: Link
    """The share of one accelerator in its node's network."""
    domain: int = 1
    """Accelerators that `inside_node` joins, where that is more than a node's."""
    constants: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Prior medians of the cost model's constants that differ here from `profiles.cost.constants`."""
    log_sd: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Standard deviations of their logarithms that do."""
    sources: list[str]
    """Where the figures come from."""

    def peak(self, precision: str) -> float:
        """Peak for a precision. One that it does not have runs as the next wider one that it has; ValueError if none.

        mxfp8 and the like count as fp8, nvfp4 as fp4.
        """
        kinds = ["fp4", "fp8", "bf16", "fp16", "fp32"]
        kind = next((kind for kind in kinds if kind in precision), precision)
        wider = {"bf16": ["bf16", "fp16", "fp32"], "fp16": ["fp16", "bf16", "fp32"]}.get(kind)
        if wider is None and kind in kinds:
            wider = kinds[kinds.index(kind) :]
        for candidate in wider or [kind]:
            if candidate in self.flops:
                return self.flops[candidate]
        raise ValueError(
            f"precision({precision}) is unknown for accelerator {self.name}: it has {', '.join(self.flops)}"
        )


def accelerators() -> list[str]:
    """Names of the files that exist."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "links")


@cache
def link(name: str) -> Link:
    """The link of that name in `links.yaml`. Raises ValueError, with the names that exist, where there is none."""
    known = yaml.safe_load((FOLDER / "links.yaml").read_text())
    if name not in known:
        raise ValueError(f"link({name}) is unknown: expected one of {', '.join(known)}")
    return Link.model_validate(known[name])


@cache
def accelerator(name: str) -> Accelerator:
    """The accelerator of that name. Raises ValueError, with the names that exist, where there is no file."""
    if name not in accelerators():
        raise ValueError(f"accelerator({name}) is unknown: expected one of {', '.join(accelerators())}")
    return Accelerator.model_validate({"name": name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text())})


def memory_bytes(cluster: Cluster) -> float | None:
    """Memory of one of its accelerators; None for CPU cores, which share what the machine has, and for an accelerator
    that nothing is known about."""
    if cluster.accelerator == "cpu" or cluster.accelerator not in accelerators():
        return None
    return accelerator(cluster.accelerator).memory_bytes


def node_size(cluster: Cluster) -> int:
    """Accelerators that the fast link joins: those of a node, or of a larger domain of it."""
    domain = accelerator(cluster.accelerator).domain if cluster.accelerator in accelerators() else 1
    return max(cluster.accelerators_per_node, domain)
