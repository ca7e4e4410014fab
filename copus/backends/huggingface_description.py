"""What the backends that train transformers' models have in common. No torch: a job file is checked against it."""

from typing import TYPE_CHECKING

from copus.backends.description import BackendDescription
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from copus.job import TrainingConfig


class HuggingFaceDescription(BackendDescription):
    """A backend that builds its models with `copus.backends.huggingface`."""

    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a mixture of experts."""
        if model.experts:
            raise ValueError(f"experts({model.experts}): only dense models are built with transformers")

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for dropout, which these models have in attention only."""
        if training.dropout:
            raise ValueError(
                f"dropout({training.dropout:g}): the Llama models of transformers have none on their residual branches"
            )
