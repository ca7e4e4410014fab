"""`copus import-args`: the job file for a training that another tool's arguments describe."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from copus.job import JobConfig, JobError, apply_override, parse_job
from copus.job_text import parse_job_text
from copus.validation_messages import shortened
from launch.arguments.command_line import CommandLine, read_command, read_shell_script
from launch.arguments.configuration_file import add_overrides, command_of_values
from launch.arguments.imported_job import ImportedJob
from launch.arguments.megatron_read import job_of_megatron
from launch.arguments.torchtitan_read import job_of_torchtitan
from launch.job_file_output import put_job_file

MOST_BYTES = 2**20
"""Length of a script or of a configuration."""


def import_args(words: list[str], overrides: list[str], out: Path | None, *, as_json: bool = False) -> int:
    """Print the job file for a command line, a shell script with its arguments, or a configuration file, and on
    standard error what became of the arguments.

    Raises JobError, one line, for what cannot be read, and for a job that no cluster could run.
    """
    imported, job = imported_job(words, overrides)
    source = shortened(words, 100, lambda words: " ".join(" ".join(words).split()))
    text = imported.text([f"Made by copus import-args from {source}"])
    put_job_file(text, out, _as_values(imported, job, out), as_json=as_json)
    print("\n".join(imported.summary()), file=sys.stderr)
    if job.model_refusal is not None:
        print(f"  `copus plan` takes this job, and training does not: {job.model_refusal}", file=sys.stderr)
    return 0


def imported_job(words: list[str], overrides: list[str]) -> tuple[ImportedJob, JobConfig]:
    """The job of a command line's words, with `--set` overrides, and checked. Raises JobError."""
    command = _command(words)
    wanted: dict[str, Any] = {}
    for override in overrides:
        apply_override(wanted, override)
    for override in overrides:  # the data parallel degree follows from the number of accelerators
        name, _, value = override.partition("=")
        if name in ("cluster.nodes", "cluster.accelerators_per_node") and value.isdecimal():
            setattr(command, "nodes" if name == "cluster.nodes" else "per_node", int(value))
    sections = _torchtitan_sections(command)
    if sections is None:
        add_overrides(command)
    if isinstance(wanted.get("model"), dict) and "seq_len" in wanted["model"]:
        _set_seq_len(wanted["model"]["seq_len"], command, sections)
    imported = job_of_megatron(command) if sections is None else job_of_torchtitan(sections, command)
    for override in overrides:
        apply_override(imported.values, override)
        imported.comments.pop(override.partition("=")[0], None)
        imported.assumed = [text for text in imported.assumed if not text.startswith(f"{override.partition('=')[0]}:")]
    model = imported.values.get("model")
    if model is None or (isinstance(model, dict) and not {"layers", "from"} & set(model)):
        raise JobError("the arguments name no model (--num-layers is missing): add --set model.from=NAME")
    if sections is None and isinstance(model, dict) and "seq_len" not in model:
        raise JobError("--seq-length is missing, which says how many tokens a sample has: add --set model.seq_len=N")
    if isinstance(model, dict) and "from" not in model and "vocab" not in model:
        raise JobError(
            "neither --vocab-size nor a tokenizer that is here tells the vocabulary: add --set model.vocab=N"
        )
    return imported, parse_job(imported.values, "these arguments", planned_only=True)


def _set_seq_len(seq_len: Any, command: CommandLine, sections: dict[str, dict[str, Any]] | None) -> None:
    """Put `--set model.seq_len` in the place of the arguments' own: in it iterations and samples become tokens, so that
    their number stays. `sections` are torchtitan's. Raises JobError if it is no number of tokens."""
    if type(seq_len) is not int or seq_len < 1:
        raise JobError(f"--set model.seq_len={seq_len}: expected a whole number, at least 1")
    if sections is not None:
        sections.setdefault("training", {})["seq_len"] = seq_len
    else:
        command.arguments.pop("--encoder-seq-length", None)  # its former name
        command.arguments["--seq-length"] = [str(seq_len)]


def _command(words: list[str]) -> CommandLine:
    """What the words on the command line name: a training's own words, or a file that has them."""
    variables: dict[str, str] = {}
    while words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
        variables[match[1]] = match[2]
        words = words[1:]
    while words and words[0] in ("bash", "sh", "sbatch", "exec", "env", "nohup"):
        words = words[1:]
    if not words:
        raise JobError("expected a script, a configuration, or -- and a command line")
    path = Path(words[0])
    scripts = (".sh", ".bash", ".slurm", ".sbatch")
    if path.suffix in scripts or (path.suffix == "" and path.is_file() and _text(path).startswith("#!")):
        try:
            command = read_shell_script(_text(path), words[1:], variables)
        except ValueError as error:
            raise JobError(f"{path}: {error}") from None
        command.program = path.name
        return command
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path, words[1:])
    if path.suffix == ".toml":
        return CommandLine(arguments={"--job.config-file": [str(path)]} | read_command(words[1:]).arguments)
    return read_command(words)


def _torchtitan_sections(command: CommandLine) -> dict[str, dict[str, Any]] | None:
    """The sections of a TOML of torchtitan and of arguments `--section.field value`; None if there are none."""
    dotted = {name[2:]: values for name, values in command.arguments.items() if "." in name}
    if not dotted:
        return None
    sections: dict[str, dict[str, Any]] = {}
    if file := dotted.pop("job.config-file", None):
        path = Path(" ".join(file))
        try:
            sections = {name: value for name, value in tomllib.loads(_text(path)).items() if isinstance(value, dict)}
        except tomllib.TOMLDecodeError as error:
            raise JobError(f"{path}: not TOML: {error}") from None
    for name, values in dotted.items():
        section, _, field = name.replace("-", "_").partition(".")
        sections.setdefault(section, {})[field] = " ".join(values) or True
    return sections


def _read_yaml(path: Path, overrides: list[str]) -> CommandLine:
    """A configuration in YAML, with overrides as Hydra takes them."""
    try:
        values = parse_job_text(_text(path))
        if not isinstance(values, dict):
            raise ValueError("expected a mapping of sections")
        command = command_of_values(values)
    except ValueError as error:
        raise JobError(f"{path}: {error}") from None
    command.program = path.name
    command.overrides = read_command(overrides).overrides
    return command


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise JobError(f"{path}: {path.stat().st_size} bytes; expected at most {MOST_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: expected text (UTF-8)") from None


def _as_values(imported: ImportedJob, job: JobConfig, out: Path | None) -> dict[str, object]:
    return {
        "job": imported.values,
        "resolved": job.model_dump(mode="json"),
        "mapped": imported.mapped,
        "unmapped": [vars(argument) for argument in imported.unmapped],
        "assumed": imported.assumed,
        "notes": imported.notes,
        "out": None if out is None else str(out),
    }
