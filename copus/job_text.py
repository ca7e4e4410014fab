"""The text of a job file as plain values: safe YAML, of a bounded size, in which every key stands once."""

import stat
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 * 1024
"""Length of a job file."""
MOST_CHARACTERS = 4 * MOST_BYTES
"""Length after every alias (`*name`) is replaced by what it stands for: a few lines of them can stand for anything."""
MOST_DIGITS = 400
"""Of a number. No float has more, and longer ones take long to read."""


def read_job_text(path: Path) -> str:
    """The text of a job file. Raises OSError, or ValueError for what is no file, too long, or not UTF-8."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # opening a pipe waits for a writer
        raise ValueError("not a regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size} bytes; a job file has at most {MOST_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not YAML: {error}") from None


def parse_job_text(text: str) -> Any:
    """Plain values: dictionaries, lists, strings, numbers. Raises ValueError, one line, for anything else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("not YAML: too many brackets in each other") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: also a date that there is not
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        """The document, checked before anything is made of it."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check(node, {})
        return node


def _check_base(node: yaml.ScalarNode) -> None:
    """Refuse numbers that YAML 1.1 reads in another base than a person does: 0500000 is octal, 4:00:00 base 60."""
    plain, where = node.value.replace("_", "").lstrip("+-"), f"line {node.start_mark.line + 1}: {node.value}"
    if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return
    if ":" in plain:
        raise ValueError(f"{where} is a number to the base 60 in YAML: put it in quotes")
    if plain.isdecimal() and plain.startswith("0") and int(plain, 8) != int(plain):
        raise ValueError(f"{where} is octal in YAML, {int(plain, 8)}: write it without the 0 before it")


def _check(node: yaml.Node, lengths: dict[int, int | None]) -> int:
    """Length of a node with all aliases replaced. Raises ValueError for what the module's first line rules out.

    `lengths` has what is known, by the node's id; None while a node is looked at.
    """
    if id(node) in lengths:
        counted = lengths[id(node)]
        if counted is None:
            raise ValueError(f"line {node.start_mark.line + 1}: a value that contains itself")
        return counted
    lengths[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        length = 1 + len(node.value)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
            raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} digits")
        _check_base(node)
    elif isinstance(node, yaml.MappingNode):
        length = 1 + sum(_check(part, lengths) for pair in node.value for part in pair)
        seen = set()
        for key, _ in node.value:  # of two `training` sections, PyYAML drops the first without a word
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {key.value!r} stands twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
    else:
        length = 1 + sum(_check(part, lengths) for part in node.value)
    if length > MOST_CHARACTERS:
        raise ValueError(
            f"line {node.start_mark.line + 1}: its aliases stand for more than {MOST_CHARACTERS} characters"
        )
    lengths[id(node)] = length
    return length
