"""A command line that starts a training, taken apart: what starts it, on how many accelerators, and its arguments."""

import re
import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath

from launch.arguments.shell import Script, read_script

_PROGRAM = re.compile(r".*\.py")
_TELLING = ("--num-layers", "--micro-batch-size", "--hidden-size", "--seq-length", "--global-batch-size")
"""Arguments that show that a command, or a variable, is about a training."""
_NODES = ("--nnodes", "--num-nodes", "--nodes", "-N")
_PER_NODE = ("--nproc-per-node", "--num-gpus", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--gres")


@dataclass
class CommandLine:
    """A training's arguments."""

    arguments: dict[str, list[str]] = field(default_factory=dict)
    """`--name` → its values, none for a flag; of an argument that is repeated, the last."""
    overrides: dict[str, str] = field(default_factory=dict)
    """`section.field=value` among the words, as Hydra takes them."""
    program: str = ""
    """The script that is started; empty if none is named."""
    nodes: int | None = None
    """Machines; None if the command does not say."""
    per_node: int | None = None
    """Processes, and so accelerators, on each machine; None if the command does not say."""
    unset: list[str] = field(default_factory=list)
    """Variables of the script that nothing sets: `$1`, `$MODEL`."""
    notes: list[str] = field(default_factory=list)
    """What could not be followed."""


def read_command(words: list[str]) -> CommandLine:
    """Take apart the words of a command: a launcher with its own arguments, a program with its arguments."""
    start = next((at for at, word in enumerate(words) if _PROGRAM.fullmatch(word)), None)
    if start is None:  # torchrun -m module, or nothing but arguments
        start = next((at for at, word in enumerate(words) if word == "-m" and at + 1 < len(words)), None)
        start = None if start is None else start + 1
    command = CommandLine(program="" if start is None else PurePath(words[start]).name)
    starting, own = ([], words) if start is None else (words[:start], words[start + 1 :])
    command.nodes, command.per_node = _accelerators(starting)
    name = None
    for word in own:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            name = "--" + flag.lstrip("-").replace("_", "-")
            command.arguments[name] = [value] if equals else []
        elif match := re.fullmatch(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)+)=(.*)", word, re.DOTALL):
            command.overrides[match[1]] = match[2]
        elif name is not None:
            command.arguments[name].append(word)
    return command


def _accelerators(words: list[str]) -> tuple[int | None, int | None]:
    """Nodes, and processes on each, as the words of torchrun, srun, sbatch or deepspeed say."""
    nodes, per_node = None, None
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        digits = re.search(r"(\d+)$", value if equals else following)
        if digits and name in _NODES:
            nodes = int(digits[1])
        elif digits and name in _PER_NODE and (name != "--ntasks-per-node" or int(digits[1]) > 1):
            per_node = int(digits[1])
    return nodes, per_node


def read_shell_script(text: str, arguments: list[str], variables: dict[str, str]) -> CommandLine:
    """The training that a shell script starts, or whose arguments it has in a variable.

    Raises ValueError, one line, if there is none.
    """
    script = read_script(text, arguments, variables)
    candidates = [inner for command in script.commands for inner in _commands_in(command, script)]
    telling = [command for command in candidates if _is_training(command)]
    if telling:
        command = read_command(max(telling, key=len))
    elif words := _arguments_in_variables(script):
        command = read_command(words)
        command.notes.append("no command starts a training; the arguments are those of its variables")
    else:
        raise ValueError("no command in it has arguments of a training, such as --num-layers or --micro-batch-size")
    nodes, per_node = _accelerators(script.directives)
    command.nodes, command.per_node = command.nodes or nodes, command.per_node or per_node
    command.notes += script.notes
    command.unset = [f"${name}" for name in sorted(script.variables.unset)]
    if command.unset:
        command.notes.append(f"not set in the script, and taken as empty: {', '.join(command.unset)}")
    return command


def _commands_in(words: list[str], script: Script) -> list[list[str]]:
    """A command, and what it hands to another shell: `bash -c "torchrun …"`."""
    inner = [word for word in words if any(word.strip() != name and name in word for name in _TELLING)]
    commands = [words]
    for word in inner:
        if " " in word.strip():
            try:
                nested = read_script(word, script.variables.arguments, {})
            except ValueError:
                continue
            commands += nested.commands
            if len(nested.commands) == 1 and _is_training(nested.commands[0]):
                commands.append([*words[: words.index(word)], *nested.commands[0]])
    return commands


def _is_training(words: list[str]) -> bool:
    return any(word.partition("=")[0] in (*_TELLING, "train.global_batch_size") for word in words)


def _arguments_in_variables(script: Script) -> list[str]:
    """Arguments in the variables of a script that leaves starting the training to another one."""
    words: list[str] = []
    for values in script.variables.values.values():
        text = " ".join(values)
        if any(name in text for name in _TELLING):
            try:
                words += shlex.split(text)
            except ValueError:
                words += text.split()
    return words
