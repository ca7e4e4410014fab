"""Configurations that need not be looked at: those that others beat for certain."""

import numpy as np
import pytest

from planner.config import PlannerConfig
from planner.predictor import Predictor
from planner.pruning import dominated, worthwhile
from planner.space import candidates
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.layout import Layout
from profiles.memory import MemoryModel
from profiles.model_shape import ModelShape

SHAPE = {"heads": 32, "kv_heads": 8, "seq_len": 4096, "vocab": 32000, "gated_mlp": True}
SMALL = ModelShape(layers=16, hidden=1024, ffn_hidden=4096, **SHAPE)
LARGE = ModelShape(layers=48, hidden=8192, ffn_hidden=28672, **SHAPE)
GPUS = Cluster(nodes=2, accelerators_per_node=8, accelerator="h100-sxm")
CONFIG = PlannerConfig(min_global_batch=32, max_global_batch=128, max_micro_batch=4)
START = Configuration(layout=Layout(tp=2, dp=8, sequence_parallel=True, zero=1), micro_batch=1, global_batch=32)


def kept(model: ModelShape, start: Configuration = START, config: PlannerConfig = CONFIG) -> list[Configuration]:
    return worthwhile(config, model, GPUS, "bf16", start)


def test_if_everything_fits_nothing_is_recomputed() -> None:
    assert {c.layout.recompute for c in kept(SMALL)} == {"none"}
    assert {c.layout.recompute for c in kept(LARGE)} == {"none", "full"}


def test_the_layout_of_the_job_and_listed_ones_stay() -> None:
    slow = START.model_copy(update={"layout": START.layout.model_copy(update={"recompute": "full"})})
    found = kept(SMALL, slow)
    assert slow in found
    batches = {c.global_batch for c in candidates(CONFIG, SMALL, GPUS, slow) if c.layout == slow.layout}
    assert {c.global_batch for c in found if c.layout == slow.layout} == batches
    listed = CONFIG.model_copy(update={"layouts": [slow.layout]})
    assert {c.layout for c in kept(SMALL, START, listed)} == {START.layout, slow.layout}


@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_the_space_does_not_explode(model: ModelShape) -> None:
    allowed = candidates(CONFIG, model, GPUS, START)
    assert len(kept(model)) < 0.6 * len(allowed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_what_is_left_out_would_hardly_ever_have_been_the_fastest(model: ModelShape, seed: int) -> None:
    """Over machines as the cost model expects them: constants and misses drawn from its own beliefs."""
    allowed = candidates(CONFIG, model, GPUS, START)
    arrays = Configurations.of(allowed)
    left = {*kept(model)}
    memory = MemoryModel().predict(model, arrays, "bf16").chance_to_fit(80 * 2**30)
    cost, rng = CostModel(), np.random.default_rng(seed)
    logs = np.log(cost.predict(model, GPUS, arrays, "bf16", coverage=None).seconds)
    errors = cost.errors(model, GPUS, arrays, "bf16")
    covariance = errors.spread**2 * errors.covariance() + 1e-9 * np.eye(len(allowed))
    draws = logs + rng.normal(size=(100, len(allowed))) @ np.linalg.cholesky(covariance).T
    losses = []
    for batch in np.unique(arrays.global_batch):
        fits = (arrays.global_batch == batch) & (memory > 0.8)
        stays = fits & np.array([candidate in left for candidate in allowed])
        losses.append(draws[:, stays].min(axis=1) - draws[:, fits].min(axis=1))
    assert np.mean(losses) < 0.01, "a step of what is left is one percent longer at most"
    assert np.quantile(losses, 0.9) < 0.03


def test_an_accelerator_that_nobody_knows_keeps_everything() -> None:
    unknown = Cluster(nodes=2, accelerators_per_node=8, accelerator="abacus")
    assert worthwhile(CONFIG, SMALL, unknown, "bf16", START) == candidates(CONFIG, SMALL, unknown, START)
    with pytest.raises(ValueError, match="abacus"):
        dominated([START], np.ones(1, bool), SMALL, unknown, "bf16")


def test_the_predictor_looks_at_no_others() -> None:
    predictor = Predictor.from_rows(CONFIG, SMALL, GPUS, "bf16", START)
    assert predictor.candidates == kept(SMALL)


def test_errors_of_ratios_are_those_of_the_whole_covariance() -> None:
    arrays = Configurations.of(kept(SMALL)[:40])
    errors = CostModel().errors(SMALL, GPUS, arrays, "bf16")
    covariance, rng = errors.spread**2 * errors.covariance(), np.random.default_rng(0)
    one, other = rng.integers(len(arrays), size=(2, 200))
    variance = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
    assert errors.of_ratios(one, other) == pytest.approx(np.sqrt(np.maximum(variance, 0)), abs=1e-6)
