"""Pipelines whose layers do not divide evenly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.memory import MEGATRON, MemoryModel
from profiles.memory.parameters import STAGES, stage_weights
from profiles.model_shape import ModelShape
from profiles.pipeline_split import split_layers
from profiles.preset import plain_fields


@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 4, 8, 16, 64]), st.sampled_from([1, 2, 4, 7]))
def test_stages_have_all_layers_and_the_ends_have_fewest(layers: int, pp: int, vp: int) -> None:
    split = split_layers(layers, pp, vp)
    first, middle, last = (int(count) for count in split)
    if not split.possible:
        assert layers % (pp * vp)
        assert (first, middle, last) == (0, 0, 0)
    elif pp == 1:
        assert (first, middle, last) == (layers, layers, layers)
    else:
        assert first + (pp - 2) * middle + last == layers
        assert 1 <= last <= first <= middle


def test_llama_405b_is_split_as_it_was_trained() -> None:
    """126 layers on 16 stages (2407.21783, section 3.3.2)."""
    assert [int(count) for count in split_layers(126, 16)] == [7, 8, 7]


@pytest.mark.parametrize("global_batch", [64, 2048])
def test_the_middle_may_be_the_fullest_and_the_slowest_stage(global_batch: int) -> None:
    model = ModelShape(**plain_fields("llama-3.1-405b"))
    cluster = Cluster(nodes=16, accelerators_per_node=8, accelerator="h100-sxm")
    layout = {"tp": 8, "pp": 16, "dp": 1, "sequence_parallel": True}
    one = Configuration(layout=layout, micro_batch=1, global_batch=global_batch)
    longer = model.model_copy(update={"layers": 128})
    arrays = Configurations.of([one])
    memory = MemoryModel()
    uneven, even = (memory.predict(it, arrays, "bf16", coverage=None) for it in (model, longer))
    assert STAGES[uneven.stage[0]] == "middle"
    assert STAGES[even.stage[0]] == "first"
    assert uneven.peak_bytes[0] < even.peak_bytes[0]
    held = [stage_weights(model, arrays, MEGATRON, stage).dense[0] for stage in STAGES]
    assert held[0] + 14 * held[1] + held[2] == pytest.approx(model.parameters / 8, rel=1e-3)
    seconds = [CostModel().predict(it, cluster, arrays, "bf16", coverage=None).seconds[0] for it in (model, longer)]
    assert 7 / 8 < seconds[0] / seconds[1] < 126 / 128, "the last stage is relieved, beside its output layer"
