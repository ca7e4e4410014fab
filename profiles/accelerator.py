"""What an accelerator and the links around it can do, by the data sheet: `profiles/accelerators/*.yaml`."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, ValidationError, field_validator

from profiles.cluster import Cluster
from profiles.record import Record

FOLDER = Path(__file__).parent / "accelerators"
OTHER_NAMES = {"h100": "h100-sxm"}
"""Short names, and the accelerators that they are taken for."""


class Link(Record):
    """A way between accelerators."""

    kind: str
    """NVLink 4, InfiniBand NDR, Ethernet, …"""
    bytes_per_second: PositiveFloat
    """Bandwidth of one accelerator, in one direction."""


class Accelerator(Record):
    """One accelerator: what a rank runs on."""

    name: str
    """Its name in `cluster.accelerator`."""
    flops: dict[str, PositiveFloat]
    """Dense peak by precision (fp32, bf16, fp16, fp8, …), floating point operations per second."""
    clock: PositiveFloat = 1.0
    """Clock under load over that of the same chip in another accelerator with the same peaks: the root of the power
    that each may take."""
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

    @field_validator("inside_node", "between_nodes", mode="before")
    @classmethod
    def _link_by_name(cls, value: Any) -> Any:
        """A text is the name of a link in `links.yaml`."""
        return link(value) if isinstance(value, str) else value

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
    """The link of that name in `links.yaml`. Raises ValueError, with the names that exist, if there is none."""
    links = yaml.safe_load((FOLDER / "links.yaml").read_text())
    if name not in links:
        raise ValueError(f"link({name}) is unknown: expected one of {', '.join(links)}")
    return Link.model_validate(links[name])


def is_file_of_user(name: str) -> bool:
    """Whether an accelerator is named by the path of its data sheet, written as those in `profiles/accelerators/`."""
    return name.endswith((".yaml", ".yml"))


def is_described(name: str) -> bool:
    """Whether there is a data sheet of an accelerator."""
    return is_file_of_user(name) or name in accelerators()


@cache
def accelerator(name: str) -> Accelerator:
    """The accelerator of that name, or from the file of a user.

    Raises ValueError for a name that has no file, with those that do, and in one line for a file that is no data sheet.
    """
    if not is_described(name):
        near = difflib.get_close_matches(name, [*accelerators(), *OTHER_NAMES], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(accelerators())}"
        raise ValueError(f"accelerator({name}) is unknown: {hint}")
    path = Path(name).expanduser() if is_file_of_user(name) else FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a data sheet is a mapping")
        return Accelerator.model_validate({"name": path.stem, **values})
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def on_network(cluster: Cluster) -> Accelerator:
    """The accelerator of a cluster, on the network that the cluster says it has. Raises ValueError like
    `accelerator`."""
    sheet, gbit_per_second = accelerator(cluster.accelerator), cluster.network_gbit_per_second
    if gbit_per_second is None:
        return sheet
    share = gbit_per_second / 8 * 1e9 / cluster.accelerators_per_node
    return sheet.model_copy(
        update={"between_nodes": Link(kind=f"{gbit_per_second:.3g} Gbit/s for a node", bytes_per_second=share)}
    )


def memory_bytes(cluster: Cluster) -> float | None:
    """Memory of one of its accelerators; None for CPU cores, which share what the machine has, and for an accelerator
    that nothing is known about."""
    if cluster.accelerator == "cpu" or not is_described(cluster.accelerator):
        return None
    return accelerator(cluster.accelerator).memory_bytes


def node_size(cluster: Cluster) -> int:
    """Accelerators that the fast link joins: those of a node, or of a larger domain of it."""
    domain = accelerator(cluster.accelerator).domain if is_described(cluster.accelerator) else 1
    return max(cluster.accelerators_per_node, domain)
