"""Models by name, and read from Hugging Face configurations: as many weights as transformers builds, and nothing
ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from copus.job import JobError, load_job
from launch.plan import plan
from profiles.huggingface_config import config_fields
from profiles.model_shape import ModelShape
from profiles.preset import presets

DIMENSIONS = {
    **{"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 32}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("arcee", {}),
    ("mistral", {}),
    ("mixtral", {"num_local_experts": 4}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3_moe", {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}),
    ("olmo2", {}),
    ("olmo3", {}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32}),
    ("phi3", {}),
    ("starcoder2", {}),
    ("nemotron", {"head_dim": 16}),
]


def weights(shape: ModelShape) -> int:
    """Without the rows that the vocabulary is padded with."""
    padding = (shape.padded_vocab - shape.vocab) * shape.hidden
    return shape.parameters - padding * (1 if shape.tied_embeddings else 2)


@pytest.mark.parametrize(
    ("kind", "values"),
    [*((kind, DIMENSIONS | values) for kind, values in CONFIGURATIONS), ("gpt2", {"n_layer": 3, "n_embd": 96})],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_the_shape_of_a_configuration_has_the_weights_of_transformers_model(kind: str, values: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **values)
    fields = config_fields(json.loads(json.dumps(config.to_dict())))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert weights(ModelShape(**{"seq_len": 1024, **fields})) == sum(each.numel() for each in model.parameters())


def _config(**values: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, **DIMENSIONS, **values}


def test_rotary_positions_are_read_in_both_spellings() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = _config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = _config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert config_fields(old) == config_fields(new)
    shape = ModelShape(seq_len=8192, **config_fields(old))
    assert (shape.rope_base, shape.rope_scaling) == (5e5, ModelShape(**preset("llama-3.1-8b")).rope_scaling)


def test_gemma_3_has_a_base_for_each_kind_of_layer() -> None:
    old = {"model_type": "gemma3_text", **DIMENSIONS, "sliding_window": 512, "sliding_window_pattern": 6}
    old |= {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8}}
    new = json.loads(json.dumps(AutoConfig.for_model("gemma3_text", **DIMENSIONS, sliding_window=512).to_dict()))
    new["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8}
    read = ModelShape(seq_len=1024, **config_fields(old))
    assert read == ModelShape(seq_len=1024, **config_fields(new))
    assert (read.rope_base, read.rope_local_base, read.full_attention_every) == (1e6, 1e4, 6)


def test_qwen_attends_to_everything_unless_it_says_that_it_uses_windows() -> None:
    values = _config(model_type="qwen2", rope_theta=1e6, sliding_window=512, max_window_layers=3)
    assert "sliding_window" not in config_fields(values)
    with pytest.raises(ValueError, match=r"max_window_layers\(3\): full_attention_every says"):
        config_fields(values | {"use_sliding_window": True})
    assert config_fields(values | {"use_sliding_window": True, "max_window_layers": 0})["sliding_window"] == 512


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma", "nemotron", "qwen2"])
def test_a_key_that_is_missing_has_the_default_of_its_family(kind: str) -> None:
    """As transformers has it, not as most families have it."""
    whole = json.loads(json.dumps(AutoConfig.for_model(kind, use_sliding_window=False).to_dict()))
    keys = {"head_dim", "partial_rotary_factor", "max_window_layers"}
    rope = {key: value for key, value in whole["rope_parameters"].items() if key not in keys}
    less = {key: value for key, value in whole.items() if key not in keys} | {"rope_parameters": rope}
    assert ModelShape(**{"seq_len": 1024, **config_fields(less)}) == ModelShape(
        **{"seq_len": 1024, **config_fields(whole)}
    )


def test_a_configuration_without_a_base_of_rotary_positions_has_the_usual_one_if_its_family_has_one() -> None:
    assert config_fields(_config())["rope_base"] == 10000
    with pytest.raises(ValueError, match="rope_theta is missing"):
        config_fields(_config(model_type="qwen2"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            _config(rope_scaling={"type": "dynamic", "factor": 2.0}),
            r'type\("dynamic"\) has no field',
        ),
        (_config(rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 0.7}), r"mscale\(0.7\) has no field"),
        (_config(mlp_bias=True), r"mlp_bias\(true\) without attention_bias"),
        (_config(hidden_act="relu"), r'hidden_act\("relu"\): the model section has silu'),
        (_config(residual_multiplier=0.5), r"residual_multiplier\(0.5\) is not understood"),
        ({key: value for key, value in _config().items() if key != "hidden_size"}, "hidden_size is missing"),
        ({"model_type": "lama"}, r"model_type\(lama\) is unknown: did you mean llama\?"),
        ({"model_type": "deepseek_v2"}, r"model_type\(deepseek_v2\): .* the choice of groups by their one best"),
        ({"model_type": "qwen3_moe", **DIMENSIONS, "decoder_sparse_step": 2}, r"decoder_sparse_step\(2\): the model"),
        (
            {
                **_config(model_type="gemma2", hidden_activation="gelu"),
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 4,
            },
            r"layer_types\(\[.*: full_attention_every says every n-th layer only",
        ),
    ],
)
def test_what_the_section_cannot_say_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_fields(values)


def preset(name: str) -> dict[str, Any]:
    return {field: value for field, value in presets()[name].items() if field in ModelShape.model_fields}


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_the_weights_that_are_published(name: str) -> None:
    shape = ModelShape(**preset(name))
    assert presets()[name]["source"]
    assert presets()[name].keys() - ModelShape.model_fields.keys() <= {"source", "weights"}
    if "weights" in presets()[name]:
        assert weights(shape) == presets()[name]["weights"]


JOB = """
name: mine
model: {model}
cluster: {{accelerators_per_node: 8, accelerator: h100-sxm}}
training: {{layout: {{dp: 8}}, global_batch: 64, tokens: 1_000_000_000}}
"""


def job_file(folder: Path, model: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(JOB.format(model=model))
    return path


def test_a_job_names_its_model(tmp_path: Path) -> None:
    path = job_file(tmp_path, "llama-3.1-8b")
    assert load_job(path).model == ModelShape(**preset("llama-3.1-8b"))
    assert load_job(path, ["model.seq_len=2048", "model.layers=16"]).model == ModelShape(
        **{**preset("llama-3.1-8b"), "seq_len": 2048, "layers": 16}
    )


def test_a_job_takes_its_model_from_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    for source in (tmp_path, tmp_path / "config.json"):
        job = load_job(job_file(tmp_path, f"{{from: {source}, seq_len: 512}}"))
        assert (job.model.hidden, job.model.seq_len) == (64, 512)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "lama-3.1-8b",
            "model: from(lama-3.1-8b): there is no model of that name, and no such file; did you mean",
        ),
        ("{from: llama-3.1-8b, seqlen: 5}", "model.seqlen: unknown key; did you mean seq_len?"),
        ("{from: nowhere/config.json}", "model: nowhere/config.json: No such file or directory"),
        ("{from: 8}", "model: from(8): expected the name of a model"),
        ("olmo-2-7b", "model: qk_norm(projection) is not supported by the megatron backend"),
        ("gemma-2-2b", "model: attention_softcap(50.0) is not supported by the megatron backend"),
    ],
)
def test_a_model_that_is_not_there_or_not_trained_is_refused_in_one_line(
    tmp_path: Path, model: str, message: str
) -> None:
    with pytest.raises(JobError) as refused:
        load_job(job_file(tmp_path, model))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "a"}']
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(JobError, match=r"config.json: "):
        load_job(job_file(tmp_path, f"{{from: {tmp_path}, seq_len: 16}}"))


def test_a_configuration_does_not_say_how_long_sequences_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    with pytest.raises(JobError, match=r"model: seq_len is required beside from"):
        load_job(job_file(tmp_path, f"{{from: {tmp_path}}}"))


def test_a_model_that_no_backend_trains_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(job_file(tmp_path, "gemma-2-9b"), ["planner.max_global_batch=64"]) == 0
    assert "a plan only, attention_softcap(" in capsys.readouterr().out
