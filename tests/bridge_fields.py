"""The fields of Megatron-Bridge's configuration and their types, taken from its source, which is not run.

    python -m tests.bridge_fields FOLDER    # with the unpacked wheels of megatron-bridge and megatron-core

writes `bridge_fields.json`: package versions, and for each section of a recipe the annotation of each field. The file
there is of megatron-bridge 0.6.2 and megatron-core 0.19.2.
"""

import ast
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_suffix(".json")
SECTIONS = {
    "train": "TrainingConfig",
    "validation": "ValidationConfig",
    "optimizer": "OptimizerConfig",
    "scheduler": "SchedulerConfig",
    "rng": "RNGConfig",
    "tokenizer": "TokenizerConfig",
    "dataset": "GPTDatasetConfig",
    "checkpoint": "CheckpointConfig",
    "logger": "LoggerConfig",
    "dist": "DistributedInitConfig",
    "ddp": "DistributedDataParallelConfig",
    "model": "GPTModelProvider",
}
"""The classes of its `ConfigContainer`, those of GPT where there are several."""


class _Class(NamedTuple):
    module: str
    bases: list[str]
    fields: dict[str, str]
    imported: dict[str, str]
    """Name → module and name that it is imported from."""


def _classes(folder: Path) -> dict[str, list[_Class]]:
    classes: dict[str, list[_Class]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = path.relative_to(folder).with_suffix("").parts
        imported = {
            name.asname or name.name: ".".join(
                [*(parts[: -node.level] if node.level else ()), node.module or "", name.name]
            )
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                fields = {
                    entry.target.id: ast.unparse(entry.annotation)
                    for entry in node.body
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
                }
                bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                classes[node.name].append(_Class(".".join(parts), bases, fields, imported))
    return classes


def _fields(classes: dict[str, list[_Class]], name: str, package: str) -> dict[str, str]:
    """The fields of a class of a package, those that it inherits included."""
    of = next((one for one in classes.get(name, []) if one.module.startswith(package)), None)
    if of is None:
        return {}
    fields: dict[str, str] = {}
    for base in of.bases:
        origin, _, original = of.imported.get(base, f"{of.module}.{base}").rpartition(".")
        fields |= _fields(classes, original, origin)
    return fields | of.fields


def main(folder: Path) -> None:
    """Write the file."""
    classes = _classes(folder)
    sections = {}
    for section, name in SECTIONS.items():
        defined = sorted(classes[name], key=lambda one: not one.module.startswith("megatron.bridge."))
        sections[section] = dict(sorted(_fields(classes, name, defined[0].module).items()))
    packages = sorted(path.name.removesuffix(".dist-info") for path in folder.glob("*.dist-info"))
    FILE.write_text(json.dumps({"packages": packages, "sections": sections}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
