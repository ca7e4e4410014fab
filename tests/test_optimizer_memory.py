"""The memory model knows what every optimizer keeps: to within 1 % of what the backends' own tables say."""

from typing import Any

import numpy as np
import pytest

from copus.backends.fsdp.model import parameter_shapes
from copus.backends.fsdp.shards import shard_table as fsdp_table
from copus.backends.megatron.shard_table import shard_table as megatron_table
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.memory import MemoryModel
from tests.megatron_jobs import tiny_job

OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "adamw"},
    {"kind": "sgd"},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "adafactor"},
    {"kind": "muon"},
    {"kind": "signum"},
]
MODEL = {"hidden": 64, "ffn_hidden": 96, "kv_heads": 2, "vocab": 256}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "without masters"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
def test_the_state_takes_what_the_memory_model_says(backend: str, layout: dict[str, Any], precision: str) -> None:
    ranks = layout.get("tp", 1)
    settings = (
        {"precision": "bf16", "master_weights": "none"} if precision == "without masters" else {"precision": precision}
    )
    for optimizer in OPTIMIZERS:
        if optimizer["kind"] == "muon" and ranks > 1:
            continue
        job = tiny_job(ranks, layout, MODEL, backend=backend, optimizer=optimizer, **settings)
        training = job.training
        if backend == "megatron":
            table = megatron_table(job, training.layout)
        else:
            table = fsdp_table(parameter_shapes(job.model), training, training.layout)
        of_state = {
            index: sum(field.element_bytes for field in fields if backend == "fsdp" or "/" in field.name)
            for index, fields in enumerate(table.groups)
        }
        rows = np.flatnonzero(table.rank == 0)
        elements = (table.stop - table.start).prod(axis=1)
        held = sum(int(elements[row]) * of_state[int(table.group[row])] for row in rows)
        configuration = Configuration(layout=training.layout, micro_batch=1, global_batch=8)
        model = MemoryModel(training.implementation)
        predicted = model.predict(
            job.model, Configurations.of([configuration]), training.precision, coverage=None
        ).breakdown["optimizer"][0]
        assert predicted == pytest.approx(held, rel=0.01), optimizer
