"""Names, shapes and configurations: what copus says of a model without torch, against backends and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from copus.backends.fsdp.model import parameter_shapes
from copus.backends.megatron.shard_table import shard_table
from copus.weights.families import state_shape, stored_weights, weights_of
from copus.weights.safetensors import read_folder
from profiles.huggingface_config import config_fields
from profiles.huggingface_values import config_values
from profiles.model_shape import ModelShape
from profiles.preset import presets
from tests.megatron_jobs import SHAPE, tiny_job
from tests.pretrained import FAMILIES, ON_MEGATRON, WITH_TRANSFORMERS, tiny_config
from tests.test_model_families import FAMILIES as VARIANTS


def _shape(family: str) -> ModelShape:
    values = json.loads(json.dumps(tiny_config(family).to_dict()))
    return ModelShape(**{"seq_len": 16, **config_fields(values)})


def _in_state(model: ModelShape) -> dict[str, tuple[int, ...]]:
    return {name: state_shape(name, shape, model) for name, shape in weights_of(model).items()}


@pytest.mark.parametrize("model", [*(_shape(family) for family in ON_MEGATRON), *VARIANTS.values()], ids=str)
def test_megatron_has_the_weights_that_the_list_says(model: ModelShape | dict[str, Any]) -> None:
    fields = dict(model) if isinstance(model, ModelShape) else {**SHAPE, **model}
    job = tiny_job(1, {}, fields)
    table = shard_table(job, job.training.layout)
    assert {field.name: field.shape for field in table.fields if "/" not in field.name} == _in_state(job.model)


@pytest.mark.parametrize("family", WITH_TRANSFORMERS)
def test_the_backends_of_transformers_have_the_weights_that_the_list_says(family: str) -> None:
    model = _shape(family)
    assert dict(parameter_shapes(model)) == _in_state(model)


WINDOWS: dict[str, dict[str, Any]] = {
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
"""What the published models of these families have, and no backend trains."""


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_saves_what_the_family_is_said_to_store(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, **WINDOWS.get(family, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    model = ModelShape(**{"seq_len": 16, **config_fields(json.loads((tmp_path / "config.json").read_text()))})
    stored = {place.name: place.shape for place in stored_weights(family, model).values()}
    assert {name: tensor.shape for name, tensor in read_folder(tmp_path).items()} == stored


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_makes_the_same_model_of_the_configuration_that_is_written(family: str) -> None:
    config = tiny_config(family, **WINDOWS.get(family, {}))
    values = json.loads(json.dumps(config.to_dict()))
    model = ModelShape(**{"seq_len": 16, **config_fields(values)})
    written = config_values(model, prefer=family)
    assert written["model_type"] == family
    again = AutoConfig.for_model(**json.loads(json.dumps(written)), pad_token_id=None)
    assert ModelShape(**{"seq_len": 16, **config_fields(json.loads(json.dumps(again.to_dict())))}) == model
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(again).named_parameters())
        expected = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    assert {name: weight.shape for name, weight in parameters.items()} == {
        name: weight.shape for name, weight in expected.items()
    }


def test_every_known_model_is_written_and_read_again() -> None:
    for fields in presets().values():
        config_values(ModelShape(**{key: value for key, value in fields.items() if key not in ("source", "weights")}))


def test_a_model_that_no_family_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no family of Hugging Face has this model"):
        config_values(ModelShape(**{**SHAPE, "norm_position": "post", "norm": "layernorm", "bias": "all"}))
    scaling = {"kind": "linear", "factor": 1.0}  # DeepSeek's factor of scores grows with it, from 1 on
    with pytest.raises(ValueError, match="no family of Hugging Face has this model"):
        config_values(ModelShape(**{**SHAPE, **VARIANTS["deepseek"], "rope_scaling": scaling}))
