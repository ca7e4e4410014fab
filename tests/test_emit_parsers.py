"""What `--emit` prints, read by the tools themselves.

accelerate and DeepSpeed are installed for development. torchtitan (0.2.2) reads its arguments if it is installed, and
Megatron-LM, which is no package, if MEGATRON_LM names a checkout (0.18 or newer). Of Megatron-Bridge the fields are
read from its source.
"""

import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from copus.job import JobConfig, parse_job
from launch.emit import written
from launch.fixed_run import as_written
from tests import bridge_fields

RANKS = 8
MODEL = {"layers": 8, "hidden": 512, "ffn_hidden": 1024, "heads": 8, "kv_heads": 4, "seq_len": 512, "vocab": 32000}
TRAINING = {
    **{"micro_batch": 1, "global_batch": 16, "tokens": 512 * 16 * 1000, "warmup_tokens": 512 * 160},
    **{"lr": 3e-4, "min_lr": 3e-5},
}
GPT2 = {
    **{"norm": "layernorm", "bias": "all", "gated_mlp": False, "activation": "gelu_tanh", "positions": "learned"},
    **{"kv_heads": 8, "tied_embeddings": True},
}
DEEPSEEK = {
    **{"experts": 8, "experts_per_token": 2, "expert_hidden": 256, "shared_expert_hidden": 256, "dense_layers": 1},
    "router": {"scores": "sigmoid", "bias_update_rate": 0.001, "scale": 2.5, "groups": 2, "groups_per_token": 1},
}
RAMP = {
    **{"policy": "ramp", "ramp_start": 8, "ramp_increment": 4, "ramp_samples": 1600},
    **{"min_global_batch": 8, "max_global_batch": 16},
}
JOBS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"training": {"layout": {"tp": 2, "dp": 4, "zero": 1, "sequence_parallel": True}}},
    "interleaved pipeline, wsd": {
        "training": {"layout": {"pp": 2, "vp": 2, "dp": 4}, "decay": "wsd", "decay_tokens": 512 * 1600}
    },
    "uneven pipeline": {"model": {"layers": 14}, "training": {"layout": {"pp": 4, "dp": 2}}},
    "gpt2": {"model": GPT2, "training": {"layout": {"dp": 8}, "dropout": 0.1, "decay": "inverse-sqrt"}},
    "experts": {
        "model": {"experts": 8, "experts_per_token": 2},
        "training": {"layout": {"tp": 2, "dp": 4, "ep": 2, "zero": 1, "sequence_parallel": True}},
    },
    "whole experts": {
        "model": {"experts": 8, "experts_per_token": 2},
        "training": {"layout": {"tp": 2, "dp": 4, "ep": 4, "etp": 1, "zero": 1, "sequence_parallel": True}},
    },
    "shared experts": {"model": DEEPSEEK, "training": {"layout": {"dp": 8, "ep": 4, "zero": 1}}},
    "windows": {
        "model": {"sliding_window": 128, "full_attention_every": 4, "qk_norm": "head", "rope_base": 1e6},
        "training": {"layout": {"dp": 8, "recompute": "full"}, "overlap_grad_reduce": True},
    },
    "llama3": {
        "model": {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_seq_len": 256}},
        "training": {"layout": {"dp": 8, "recompute": "selective"}},
    },
    "ramp": {"training": {"layout": {"dp": 4, "tp": 2}}, "planner": RAMP},
    "blend": {
        "data": {
            **{"source": ["a", "b"], "weights": [0.25, 0.75], "held_out_share": 0.02, "eod_mask_loss": True},
            **{"reset_position_ids": True, "reset_attention_mask": True},
        },
        "training": {"layout": {"dp": 8}},
    },
    "held-out files": {
        "data": {"source": ["a"], "held_out_source": ["b"]},
        "training": {"layout": {"dp": 8}, "checkpoint_every_tokens": 512 * 16 * 50, "max_minutes": 60},
        "tracking": {"wandb": {"project": "p", "entity": "e"}},
    },
    "fsdp": {"training": {"backend": "fsdp", "layout": {"dp": 8, "zero": 3}}},
    "hybrid fsdp": {"training": {"backend": "fsdp", "layout": {"dp": 8, "zero": 3, "dp_replicate": 2}}},
    "deepspeed": {"training": {"backend": "deepspeed", "layout": {"dp": 8, "zero": 2}, "decay": "linear"}},
}


def _job(name: str, folder: Path) -> JobConfig:
    for prefix in "ab":
        (folder / f"{prefix}.idx").touch()
    values = JOBS[name]
    data = dict(values.get("data", {}))
    for field in ("source", "held_out_source"):
        if field in data:
            data[field] = [str(folder / prefix) for prefix in data[field]]
    return parse_job(
        {
            **{"name": "emitted", "planner": {}, "tracking": {}, **values, "data": data},
            "model": {**MODEL, **values.get("model", {})},
            "cluster": {"accelerators_per_node": RANKS, "accelerator": "h100-sxm"},
            "training": {**TRAINING, **values["training"]},
        }
    )


def read_by_accelerate(text: str) -> None:
    """As `accelerate launch --config_file` reads it."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    Path("accelerate.yaml").write_text(text)
    load_config_from_file("accelerate.yaml")  # which refuses keys that it does not have, but not inside of a section
    parser = launch_command_parser()
    sections = (section for section in yaml.safe_load(text).values() if isinstance(section, dict))
    _check_names(itertools.chain.from_iterable(sections), (action.dest for action in parser._actions))
    _validate_launch_command(parser.parse_args(["--config_file", "accelerate.yaml", "train.py"]))


def _check_names(names: Iterable[str], there: Iterable[str]) -> None:
    """Raise NameError for names that are not there."""
    if unknown := set(names) - set(there):
        raise NameError(f"no such settings: {sorted(unknown)}")


def read_by_deepspeed(text: str) -> None:
    """As `deepspeed.initialize` reads it on all ranks."""
    import deepspeed.comm
    from deepspeed.runtime import constants, lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads(text)  # what it has no name for, it passes over
    sections = {
        "bf16": DeepSpeedBF16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "tensor_parallel": TPTrainingConfig,
    }
    _check_names(values.keys() - sections, (name for name in vars(constants).values() if isinstance(name, str)))
    for name, model in sections.items():
        fields = model.model_fields
        _check_names(values.get(name, {}), itertools.chain(fields, (str(field.alias) for field in fields.values())))
    scheduler = values["scheduler"]
    _check_names(scheduler["params"], inspect.signature(getattr(lr_schedules, scheduler["type"])).parameters)
    _check_names(values["optimizer"]["params"], inspect.signature(torch.optim.AdamW).parameters)
    replicas = RANKS // values.get("tensor_parallel", {}).get("autotp_size", 1)
    deepspeed.comm.get_rank = lambda *arguments: 0
    DeepSpeedConfig(
        values, mpu=MagicMock(get_data_parallel_world_size=lambda: replicas, spec=["get_data_parallel_world_size"])
    )


def read_by_torchtitan(text: str) -> None:
    """As its trainer reads its arguments."""
    from torchtitan.config.manager import ConfigManager

    words = shlex.split(text.replace("\\\n", " "))
    ConfigManager().parse_args(words[words.index("torchtitan.train") + 1 :])


def read_by_megatron(text: str) -> None:
    """As `pretrain_gpt.py` reads its arguments, on a GPU of Hopper's kind."""
    torch.cuda.get_device_capability = lambda *arguments: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *arguments: SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]
    if sys.version_info < (3, 12):  # 0.18 is for Python 3.12
        typing.override = lambda function: function
    torch.compile = lambda function, **options: function  # type: ignore[assignment]  # needs a real triton
    from megatron.training.arguments import parse_args, validate_args

    words = shlex.split(text.replace("\\\n", " "))
    sys.argv = words[words.index("pretrain_gpt.py") :]
    validate_args(parse_args())


READERS: dict[str, Callable[[str], None]] = {
    "accelerate": read_by_accelerate,
    "deepspeed": read_by_deepspeed,
    "torchtitan": read_by_torchtitan,
    "megatron": read_by_megatron,
}


def _refusals(tool: str, texts: dict[str, str]) -> dict[str, str]:
    """What a tool says against the texts, by their names. It may exit, so that this runs in a process of its own."""
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    for name in ("triton", "triton.language"):  # imported by their models, and not there on a CPU
        sys.modules.setdefault(name, MagicMock(__version__="3.0.0"))
    refusals = {}
    for name, text in texts.items():
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                READERS[tool](text)
        except (Exception, SystemExit) as error:
            refusals[name] = f"{type(error).__name__}: {error} {said.getvalue()[-500:]}"
    return refusals


@pytest.mark.slow
@pytest.mark.parametrize("tool", READERS)
def test_the_tool_itself_takes_what_is_printed_for_it(tool: str, tmp_path: Path) -> None:
    path = [str(Path(__file__).parent.parent)]
    if tool == "megatron":
        if "MEGATRON_LM" not in os.environ:
            pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
        path.insert(0, os.environ["MEGATRON_LM"])
    else:
        pytest.importorskip(tool)
    jobs = {name: _job(name, tmp_path) for name in JOBS}
    texts = {name: written(job, as_written(job), tool)[0] for name, job in jobs.items() if _is_for(job, tool)}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.test_emit_parsers", tool],
        input=json.dumps(texts),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "WORLD_SIZE": str(RANKS), "RANK": "0"}
        | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads(finished.stdout.splitlines()[-1]) == {}


@pytest.mark.parametrize("name", [name for name in JOBS if "backend" not in JOBS[name]["training"]])
def test_what_is_printed_for_megatron_bridge_are_fields_of_its_configuration(name: str, tmp_path: Path) -> None:
    """By its source, since it is not installed: every override names a field, and has a value of its type."""
    sections = json.loads(bridge_fields.FILE.read_text())["sections"]
    job = _job(name, tmp_path)
    words = shlex.split(written(job, as_written(job), "bridge")[0].replace("\\\n", " "))
    overrides = [word.partition("=")[::2] for word in words[words.index("RECIPE.py") + 1 :]]
    assert len(overrides) > 20
    for path, text in overrides:
        if path == "mixed_precision":  # a name of a recipe, and no section
            continue
        section, _, field = path.partition(".")
        assert field in sections[section], path
        assert _is_of_type(_value(text), sections[section][field]), (path, text, sections[section][field])


def _value(text: str) -> Any:
    """An override's value, by Hydra's grammar as far as it is used."""
    if text in (words := {"true": True, "false": False, "null": None}):
        return words[text]
    if text.startswith("["):
        return text[1:-1].split(",")
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _is_of_type(value: Any, annotation: str) -> bool:
    """Whether a value goes with one of the plain types in an annotation."""
    if isinstance(value, str) and "Literal[" in annotation:
        return f"'{value}'" in annotation
    names = {"bool": r"bool", "int": r"int|float", "float": "float", "str": "str", "list": "[Ll]ist|[Tt]uple"}
    names["NoneType"] = "None|Optional"
    return re.search(rf"\b({names[type(value).__name__]})\b", annotation) is not None


def _is_for(job: JobConfig, tool: str) -> bool:
    """Whether the job's framework can be that of the tool."""
    layout = job.training.layout
    if tool == "deepspeed":  # no pipelines, and no experts
        return (layout.pp, layout.ep, layout.dp_replicate) == (1, 1, 1)
    return tool != "megatron" or job.training.backend == "megatron"


if __name__ == "__main__":
    print(json.dumps(_refusals(sys.argv[1], json.load(sys.stdin))))
