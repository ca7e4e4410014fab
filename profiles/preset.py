"""Models that are known by name: `profiles/presets/*.yaml`, and what `from` in the model section stands for."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from profiles.huggingface_config import read_config
from profiles.record import check_path

FOLDER = Path(__file__).parent / "presets"
_ABOUT = ("source", "weights")
"""What a preset says beside the fields of the model section."""


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Name → the fields of the model section, with `source` and, if it is published, the number of `weights`."""
    models: dict[str, dict[str, Any]] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        models |= yaml.safe_load(path.read_text())
    return models


def plain_fields(section: Any) -> Any:
    """A model section with the fields that `from` stands for in its place; the fields beside it take precedence. A text
    alone stands for `from`. Anything else comes back as it is.

    Raises ValueError, in one line, for a name that no preset has and for a configuration that cannot be read.
    """
    if isinstance(section, str):
        section = {"from": section}
    if not isinstance(section, dict) or "from" not in section:
        return section
    own = {name: value for name, value in section.items() if name != "from"}
    source = section["from"]
    if not isinstance(source, str) or not source:
        raise ValueError(f"from({source!r}): expected the name of a model, or the path of a Hugging Face config.json")
    fields = {**_fields_of(source), **own}
    if "seq_len" not in fields:
        raise ValueError(f"seq_len is required beside from({source})")
    return fields


def _fields_of(source: str) -> dict[str, Any]:
    if source.lower() in presets():
        return {name: value for name, value in presets()[source.lower()].items() if name not in _ABOUT}
    path = check_path(Path(source)).expanduser()
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        return read_config(path)
    near = difflib.get_close_matches(source.lower(), presets(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "there are such as llama-3.1-8b, qwen3-8b and gpt2"
    raise ValueError(f"from({source}): there is no model of that name, and no such file; {hint}")
