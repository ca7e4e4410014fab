"""How measurements name what they ran on, and whether that is what a job's cluster is made of."""

import re
from pathlib import Path

from profiles.cluster import Cluster


def name_hardware(device: str, nodes: int, accelerators_per_node: int) -> str:
    """`8 × NVIDIA H100 80GB HBM3` for one node, `2 nodes × 8 × …` for several: their network is another one."""
    return f"{nodes} nodes × " * (nodes > 1) + f"{accelerators_per_node} × {device}"


def is_hardware_of(name: str, cluster: Cluster) -> bool:
    """Whether a name can be that of the cluster, whose accelerator is named as its file is: `h100-sxm` is what calls
    itself an H100 and not PCIe, `a100-80g` an A100 that does not tell another size, `rtx-4090` has both words in it."""
    head = name_hardware("", cluster.nodes, cluster.accelerators_per_node)
    if not name.startswith(head):
        return False
    device = name.removeprefix(head).lower().replace("_", " ")
    kind, *variants = Path(cluster.accelerator).stem.lower().split("-")
    if kind == "cpu":
        return device.endswith(" core")
    if not re.search(rf"(?<![a-wyz]){re.escape(kind)}x?(?![a-z0-9])", device):  # 8xH100, MI250X; not GH100
        return False
    return all(_is_variant(device, variant) for variant in variants)


def _is_variant(device: str, variant: str) -> bool:
    if re.fullmatch(r"\d+g", variant):
        sizes = re.findall(r"\b(\d+)\s?g(?:i?b)?\b", device)
        return not sizes or variant[:-1] in sizes
    if variant.startswith("sxm"):
        return not re.search(r"\b(pcie|nvl)\b", device)
    return re.search(rf"\b{re.escape(variant)}\b", device) is not None
