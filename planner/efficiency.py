"""How much a sample teaches, as the batch grows."""


def statistical_efficiency(global_batch: float, critical_batch: float) -> float:
    """SE = 1 / (1 + B/φ), between 0 and 1: the progress of a sample at batch B over that of a sample at a tiny batch.

    Both are in sequences; at B = φ a sample makes half of the progress. From McCandlish et al. 2018 (1812.06162, eq.
    2.7: a step of batch B makes a share 1 / (1 + B_noise/B) of the largest progress). Pollux (OSDI'21, §3.1) has the
    same ratio, relative to a base batch; COPUS (2604.26687) sets φ = c · B_simple. Raises ValueError unless both are
    positive.
    """
    if global_batch <= 0 or critical_batch <= 0:
        raise ValueError(f"global_batch({global_batch}) and critical_batch({critical_batch}) have to be positive")
    return 1 / (1 + global_batch / critical_batch)
