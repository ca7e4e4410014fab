"""The reference of the job file, from the pydantic models and their docstrings."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from copus.job import JobConfig
from copus.tracking.mlflow import MlflowOptions
from copus.tracking.prometheus import PrometheusOptions
from copus.tracking.tensorboard import TensorBoardOptions
from copus.tracking.wandb import WandbOptions
from launch.engines.hosts_options import HostsOptions
from launch.engines.kubernetes_options import KubernetesOptions
from launch.engines.slurm_options import SlurmOptions
from profiles.record import MOST, Record

OPTIONS: dict[str, type[Record]] = {
    "tracking.tensorboard": TensorBoardOptions,
    "tracking.wandb": WandbOptions,
    "tracking.mlflow": MlflowOptions,
    "tracking.prometheus": PrometheusOptions,
    "launch.options (hosts)": HostsOptions,
    "launch.options (slurm)": SlurmOptions,
    "launch.options (kubernetes)": KubernetesOptions,
}
"""Place → model of options that only their plugin knows, and the job file's own model has as a mapping."""
UNITS = (  # the end of a name → its unit: quantities carry it (docs/design.md)
    ("tokens", "tokens"),
    ("seconds", "seconds"),
    ("minutes", "minutes"),
    ("bytes", "bytes"),
    ("samples", "sequences"),
    ("sequences", "sequences"),
    ("batch", "sequences"),
    ("ramp_start", "sequences"),
    ("ramp_increment", "sequences"),
    ("seq_len", "tokens"),
    ("vocab", "tokens"),
    ("steps", "steps"),
)


def sections(model: type[Record] = JobConfig, place: str = "") -> Iterator[tuple[str, type[Record]]]:
    """Place in the job file → its model, for the file itself, its sections, and theirs."""
    yield place, model
    for name, field in model.model_fields.items():
        for where, inner in _inner_sections(f"{place}.{name}" if place else name, field.annotation):
            yield from sections(inner, where)
    if model is JobConfig:
        yield from OPTIONS.items()


def page(models: Iterator[tuple[str, type[Record]]] | None = None) -> str:
    """All sections as headings and tables."""
    parts = []
    for place, model in models or sections():
        parts.append(f"## `{place}`" if place else "## The file")
        parts.append(" ".join((model.__doc__ or "").split()))
        if model.model_fields:
            rows = [_row(name, field, place) for name, field in model.model_fields.items()]
            head = "| field | type | default | unit | meaning |\n|---|---|---|---|---|"
            parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts)


def _row(name: str, field: FieldInfo, place: str) -> str:
    inner = list(_inner_sections(f"{place}.{name}" if place else name, field.annotation))
    kind = spell(field.annotation, field.metadata)
    if len(inner) == 1:
        kind = f"[{kind}]({_anchor(inner[0][0])})"
    elif inner:
        kind = " or ".join(f"[{model.__name__}]({_anchor(where)})" for where, model in inner)
    elif name == "tracking":
        kind = "tracker → options"
    meaning = re.sub(r"\bNone\b", "null", field.description or "")
    cells = [f"`{name}`", kind, _default(field), unit(name, field), meaning]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def unit(name: str, field: FieldInfo) -> str:
    """What a number counts, from the end of its name; empty for what is no quantity."""
    if "int" not in spell(field.annotation, []) and "number" not in spell(field.annotation, []):
        return ""
    return next((each for end, each in UNITS if name == end or name.endswith(f"_{end}")), "")


def spell(annotation: Any, metadata: list[Any]) -> str:
    """A type as a person writes values of it, with its limits: `int > 0`, `` `fp32` or `bf16` ``, `list of path`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [spell(each, metadata) for each in inner if each is not NoneType]
        return " or ".join(kinds + ["null"] * (NoneType in inner))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if hasattr(annotation, "__metadata__"):
        return spell(inner[0], list(annotation.__metadata__))
    if origin is list:
        return f"list of {spell(inner[0], [])}"
    if origin is tuple:
        return f"[{', '.join(spell(each, []) for each in inner)}]"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation.__name__
    names = {int: "int", float: "number", str: "text", bool: "`true` or `false`", Path: "path"}
    return " ".join([names[annotation], *_limits(metadata)])


def _limits(metadata: list[Any]) -> Iterator[str]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _limits(each.metadata)
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if getattr(each, name, None) not in (None, MOST):  # nobody needs to be told that
                yield f"{sign} {getattr(each, name)}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if isinstance(field.json_schema_extra, dict) and "default_in_words" in field.json_schema_extra:
        return str(field.json_schema_extra["default_in_words"])
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, Record):
        return "all its defaults" if not any(each.is_required() for each in type(value).model_fields.values()) else ""
    text = yaml.safe_dump(str(value) if isinstance(value, Path) else value, default_flow_style=True, allow_unicode=True)
    return f"`{text.partition(chr(10))[0]}`"


def _inner_sections(place: str, annotation: Any) -> Iterator[tuple[str, type[Record]]]:
    """Place and model of a field that is a section of its own, which may be left out; of each kind if there are
    several."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    models = [get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in kinds]
    if all(isinstance(model, type) and issubclass(model, Record) for model in models):
        for model in models:
            said = f" ({get_args(model.model_fields['kind'].annotation)[0]})" if len(models) > 1 else ""
            yield place + said, model


def _anchor(place: str) -> str:
    """The link to a section's heading."""
    return "#" + re.sub(r"[^\w-]", "", place.replace(" ", "-"))
