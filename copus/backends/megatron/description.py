"""The description of the Megatron backend. Imports no megatron."""

from typing import Any

from copus.backends.description import BackendDescription
from profiles.layout import Layout
from profiles.model_shape import ModelShape


class MegatronDescription(BackendDescription):
    """Megatron-core: dense models; tensor, pipeline and data parallelism; the distributed optimizer."""

    framework = "megatron-core"
    largest_zero = 1

    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a model that the Megatron backend does not build."""
        if model.experts:
            raise ValueError(
                f"model.experts({model.experts}) is not supported by the megatron backend: it builds dense models"
            )

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the Megatron backend does not run."""
        limits = (("cp", layout.cp, 1), ("ep", layout.ep, 1), ("zero", layout.zero, self.largest_zero))
        for name, value, limit in limits:
            if value > limit:
                raise ValueError(f"{name}({value}) is not supported by the megatron backend: at most {limit}")

    def load(self) -> type[Any]:
        """The class that trains. Takes seconds, and changes torch on a CPU."""
        from copus.backends.megatron.backend import MegatronBackend

        return MegatronBackend
