"""How alike configurations are: what the formulas miss for one, they miss for its neighbours."""

import numpy as np

from profiles.configurations import Configurations
from profiles.memory.parameters import Floats
from profiles.model_shape import ModelShape

SHAPE_SD = 0.12
"""Standard deviation of the logarithm of the formulas' error that neighbours share."""
REACH = {
    **{"tp": 2.0, "pp": 2.0, "vp": 2.0, "cp": 2.0, "ep": 2.0, "etp": 2.0, "dp": 3.0, "micro_batch": 2.0},
    "num_microbatches": 4.0,
    **{"zero": 1.0, "recompute": 1.0, "sequence_parallel": 1.0, "hidden": 1.0, "layers": 1.0, "seq_len": 1.0},
}
"""How far from each other neighbours are: in doublings of degrees, batches and sizes, in steps of the others."""


def coordinates(model: ModelShape, c: Configurations) -> Floats:
    """N × 15: places of configurations, one `REACH` apart in each direction; `etp` is tp ÷ etp, 1 for most."""
    doubling = [
        c.tp,
        c.pp,
        c.vp,
        c.cp,
        c.ep,
        c.tp / c.expert_tp,
        c.dp,
        c.micro_batch,
        np.maximum(c.num_microbatches, 1),
    ]
    steps = [c.zero, c.recompute, c.sequence_parallel]
    sizes = [np.full(len(c), size) for size in (model.hidden, model.layers, model.seq_len)]
    columns = [*(np.log2(column) for column in doubling), *steps, *(np.log2(column) for column in sizes)]
    return np.stack(columns, axis=1) / np.array(list(REACH.values()))


def covariance(a: Floats, b: Floats) -> Floats:
    """Covariance of the formulas' errors between places: Gaussian in their distance."""
    distance = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    return np.asarray(SHAPE_SD**2 * np.exp(-0.5 * np.maximum(distance, 0)), dtype=np.float64)
