"""What this backend can run. Imports nothing heavy: the job file is checked against it before any process starts."""

from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape


def check_model(model: ModelShape) -> None:
    """Raise ValueError for a model that the Megatron backend does not build."""
    if model.experts:
        raise ValueError(
            f"model.experts({model.experts}) is not supported by the megatron backend: it builds dense models"
        )


def check_layout(layout: Layout) -> None:
    """Raise ValueError for a layout that the Megatron backend does not do."""
    for name, value, limit in (("cp", layout.cp, 1), ("ep", layout.ep, 1), ("zero", layout.zero, 1)):
        if value > limit:
            raise ValueError(f"{name}({value}) is not supported by the megatron backend: at most {limit}")


def check_configuration(configuration: Configuration) -> None:
    """Raise ValueError for a configuration that the Megatron backend does not do."""
    check_layout(configuration.layout)
    pp, vp, count = configuration.layout.pp, configuration.layout.vp, configuration.num_microbatches
    if vp > 1 and count % pp:  # 2104.04473, section 2.2.2
        raise ValueError(
            f"global_batch({configuration.global_batch}) makes {count} micro-batches of micro_batch"
            f"({configuration.micro_batch}), and an interleaved pipeline (vp({vp})) needs a multiple of pp({pp})"
        )
