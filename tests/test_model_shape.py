"""The `model` section: what is refused, what names the same model, and how many weights and operations there are."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from copus.backends.megatron.shard_table import shard_table
from copus.job import JobError, dump_job, parse_job
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.memory import MEGATRON
from profiles.memory.parameters import STAGES, stage_weights
from profiles.mfu import flops_per_token
from profiles.model_shape import ModelShape
from profiles.query import query
from profiles.table import ThroughputTable
from tests.megatron_jobs import SHAPE, tiny_job
from tests.test_model_families import FAMILIES

BACKENDS = Path(__file__).parent.parent / "copus" / "backends"


def shape(**fields: Any) -> ModelShape:
    return ModelShape(**{**SHAPE, **fields})


def test_a_model_of_an_old_table_has_the_digest_that_it_had() -> None:
    assert shape().digest == "c519da6ef906"
    assert shape(gated_mlp=False).digest == "7a487b1904ae"
    assert shape(tied_embeddings=True, experts=4, experts_per_token=2, norm_epsilon=1e-6).digest == "e9088746bef3"


def test_what_is_usual_may_be_said_or_left_out() -> None:
    assert shape(head_dim=8, activation="silu") == shape()
    assert shape(gated_mlp=False, activation="gelu") == shape(gated_mlp=False)
    assert shape(head_dim=16) != shape()
    assert shape(activation="gelu").mlp_activation == "gelu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3, "kv_heads": 3}, r"hidden\(32\) ÷ heads\(3\) is not whole"),
        ({"head_dim": 7}, r"head_dim\(7\) = 7, but rotary positions need an even head width"),
        ({"rope_fraction": 0.4}, r"hidden\(32\) ÷ heads\(4\) × rope_fraction\(0.4\) = 3, but rotary positions"),
        ({"rope_fraction": 0.1}, r"head_dim\(8\) × rope_fraction\(0.1\) is less than 2"),
        ({"positions": "learned", "rope_fraction": 0.5}, r"rope_fraction needs positions\(rope\)"),
        ({"full_attention_every": 2}, r"full_attention_every needs sliding_window"),
        ({"sliding_window": 4, "full_attention_every": 1}, r"full_attention_every\(1\): every layer attends to all"),
        ({"rope_local_base": 1e4}, r"rope_local_base needs positions\(rope\) and sliding_window"),
        ({"rope_scaling": {"kind": "yarn", "factor": 4}}, r"kind\(yarn\) needs original_seq_len"),
        (
            {"rope_scaling": {"kind": "linear", "factor": 4, "beta_fast": 8}},
            r"beta_fast\(8.0\) is no setting",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 4, "original_seq_len": 8, "low_freq_factor": 4}},
            r"low_freq_factor\(4\) is not less than high_freq_factor\(4\)",
        ),
    ],
)
def test_impossible_arithmetic_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shape(**fields)


def test_heads_of_their_own_width_need_not_divide_the_hidden_width() -> None:
    assert shape(heads=3, kv_heads=3, head_dim=16).query_width == 48


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "attention"}, "model: bias(attention) is not supported by the megatron backend"),
        ({"qk_norm": "projection"}, "model: qk_norm(projection) is not supported by the megatron backend"),
        ({"logit_softcap": 30}, "model: logit_softcap(30.0) is not supported by the megatron backend"),
        (
            {"sliding_window": 4, "rope_local_base": 1e4},
            "model: rope_local_base(10000.0) is not supported by the megatron backend",
        ),
    ],
)
def test_the_backend_refuses_what_it_does_not_build(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as refused:
        tiny_job(1, {}, fields)
    assert message in str(refused.value)


@pytest.mark.parametrize("field", [name for name, field in ModelShape.model_fields.items() if not field.is_required()])
def test_a_backend_builds_a_field_or_refuses_it(field: str) -> None:
    """Nothing that a job file may say of a model is passed over."""
    for description, builders in (
        ("megatron/description.py", ("megatron/model.py", "megatron/modules.py", "megatron/experts.py")),
        ("huggingface_description.py", ("huggingface.py",)),
    ):
        said = (BACKENDS / description).read_text()
        built = "".join((BACKENDS / builder).read_text() for builder in builders) + said
        properties = {"head_dim": "head_width", "activation": "mlp_activation", "experts_per_token": "experts"}
        properties |= {"expert_hidden": "expert_width"}
        assert f'"{field}"' in said or re.search(rf"\b(model|shape)\.{properties.get(field, field)}\b", built)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_job_file_with_every_default_is_the_same_job(family: str) -> None:
    job = tiny_job(1, {}, FAMILIES[family])
    assert parse_job(yaml.safe_load(dump_job(job))) == job


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(pp=4), Layout(tp=4)], ids=lambda it: it.label)
def test_the_memory_model_counts_the_weights_of_a_rank(family: str, layout: Layout) -> None:
    # Tied embeddings, of which a pipeline has a copy on both ends, are one tensor of the state: untied here.
    model = FAMILIES[family] | {"tied_embeddings": False, "kv_heads": 4}
    job = tiny_job(layout.accelerators, {"tp": layout.tp, "pp": layout.pp}, model)
    table = shard_table(job, layout)
    configurations = Configurations.of([Configuration(layout=layout, micro_batch=1, global_batch=8)])
    of_a_stage = layout.accelerators // layout.pp
    for stage in STAGES if layout.pp > 2 else ("first", "last"):
        rank = {"first": 0, "middle": of_a_stage, "last": layout.accelerators - 1}[stage]
        held = table.of_rank(rank).values()
        counted = stage_weights(job.model, configurations, MEGATRON, stage).dense[0]
        assert counted == sum(box.elements for field, box in held if "/" not in field.name)


def test_operations_of_attention_follow_windows_and_the_width_of_heads() -> None:
    def attention(**fields: Any) -> float:
        model = shape(seq_len=64, **fields)
        weights = model.layers * model.attention_matrices + model.layers * model.mlp_matrices
        return flops_per_token(model) - 6 * (weights + model.vocab * model.hidden)

    assert attention() == 12 * 4 * 32 * 32  # layers, width of all heads, and 64 / 2 tokens attended to
    assert attention(head_dim=16) == 2 * attention()
    assert attention(sliding_window=64) == attention()
    assert attention(sliding_window=16) == pytest.approx(attention() * (2 / 4 - 1 / 16))
    mixed = attention(sliding_window=16, full_attention_every=2)
    assert mixed == pytest.approx((attention() + attention(sliding_window=16)) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_has_every_field_of_a_model(family: str, tmp_path: Any) -> None:
    model = shape(**FAMILIES[family])
    fingerprint = Fingerprint(model=model.digest, precision="fp32", backend="b", hardware="h", software="s")
    configuration = Configuration(layout=Layout(), micro_batch=1, global_batch=1)
    row = Measurement(fingerprint=fingerprint, model=model, configuration=configuration, step_seconds=1.0, time=1.0)
    ThroughputTable(tmp_path / "table.jsonl").add(row)
    assert [summary.measurement.model for summary in query([tmp_path / "table.jsonl"])] == [model]
