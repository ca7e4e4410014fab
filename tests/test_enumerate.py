"""The enumeration holds what `Layout.check` and `Configuration` allow, and all of it."""

import pytest

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.enumerate import enumerate_configurations
from profiles.layout import Layout
from profiles.model_shape import ModelShape

MODEL = ModelShape(layers=12, hidden=192, ffn_hidden=768, heads=12, kv_heads=4, seq_len=128, vocab=1000)
CLUSTER = Cluster(nodes=2, accelerators_per_node=4)


def test_every_one_is_valid_and_none_comes_twice() -> None:
    found = enumerate_configurations(MODEL, CLUSTER, (8, 24), max_cp=2)
    everyone = [found[index] for index in range(len(found))]
    assert len(set(everyone)) == len(everyone) > 100
    for c in everyone:
        c.layout.check(MODEL, CLUSTER)


def test_none_is_missing() -> None:
    """Against the plain loops."""
    wanted = set()
    for tp in range(1, 5):
        for pp in range(1, 9):
            if 8 % (tp * pp):
                continue
            for zero in (0, 1):
                layout = Layout(tp=tp, pp=pp, dp=8 // (tp * pp), zero=zero, sequence_parallel=tp > 1)
                try:
                    layout.check(MODEL, CLUSTER)
                except ValueError:
                    continue
                for micro_batch in (1, 2, 4):
                    if 24 % (layout.dp * micro_batch) == 0:
                        wanted.add(Configuration(layout=layout, micro_batch=micro_batch, global_batch=24))
    found = enumerate_configurations(
        MODEL, CLUSTER, (24,), max_vp=1, max_micro_batch=4, recompute=("none",), zero=(0, 1)
    )
    assert {found[index] for index in range(len(found))} == wanted


def test_experts_and_virtual_stages() -> None:
    model = MODEL.model_copy(update={"experts": 4, "experts_per_token": 2})
    found = enumerate_configurations(model, CLUSTER, (48,))
    assert set(found.ep.tolist()) == {1, 2, 4}
    assert (found.dp % found.ep == 0).all()
    virtual = found.vp > 1
    assert virtual.any()
    assert (found.num_microbatches[virtual] % found.pp[virtual] == 0).all()
    assert (found.pp[found.zero >= 2] == 1).all()


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recompute\(some\)"):
        enumerate_configurations(MODEL, CLUSTER, (8,), recompute=("some",))
    with pytest.raises(ValueError, match=r"zero\(4\)"):
        enumerate_configurations(MODEL, CLUSTER, (8,), zero=(4,))
