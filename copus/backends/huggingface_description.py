"""What the backends that train transformers' models have in common. No torch: a job file is checked against it."""

from typing import TYPE_CHECKING

from copus.backends.description import BackendDescription, refuse_fields
from planner.backend_traits import PartCount
from planner.noise_sources import REPLICA
from profiles.configuration import Configuration
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from copus.job import TrainingConfig

_REFUSED = (
    *("norm", "positions", "rope_fraction", "rope_local_base", "sliding_window", "full_attention_every"),
    *("attention_scale", "embedding_scale", "attention_softcap", "logit_softcap"),
    *("latent_attention", "expert_hidden", "shared_expert_hidden", "dense_layers", "capacity_factor", "router"),
)
"""Optional fields of a model that are not built."""


def family_of(model: ModelShape) -> str:
    """The family of models in transformers, by its `model_type`, that has the model's biases, norms and MLP.

    Raises ValueError for a model that no family has: a mixture of experts, or a combination of fields.
    """
    if model.experts:
        raise ValueError(f"experts({model.experts}): only dense models are built with transformers")
    refuse_fields(model, _REFUSED, "the backends that build models with transformers")
    norms = (model.norm_position, model.qk_norm)
    if norms == ("pre", "none") and not (model.bias == "qkv" and not model.gated_mlp):
        return "arcee" if not model.gated_mlp else "qwen2" if model.bias == "qkv" else "llama"
    if model.gated_mlp and model.bias in ("none", "attention") and norms in (("pre", "head"), ("post", "projection")):
        return "qwen3" if model.norm_position == "pre" else "olmo2"
    raise ValueError(
        f"gated_mlp({str(model.gated_mlp).lower()}), bias({model.bias}), norm_position({model.norm_position}) and "
        f"qk_norm({model.qk_norm}): no model that is built with transformers has them together"
    )


class HuggingFaceDescription(BackendDescription):
    """A backend that builds its models with `copus.backends.huggingface`."""

    reads_documents = True

    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a model that no family of transformers has."""
        family_of(model)

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for dropout, which these models have in attention only."""
        super().check_training(training)
        if training.dropout:
            raise ValueError(
                f"dropout({training.dropout:g}): the models of transformers have none on their residual branches"
            )

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        """The parts that a step has, by noise source. From ZeRO 2 on the gradient of every micro-batch is reduced: a
        replica with several of them never has one of its own."""
        parts = super().parts(configuration)
        if configuration.layout.zero >= 2 and configuration.num_microbatches > 1:
            del parts[REPLICA]
        return parts
