"""How the router of a mixture of experts chooses and weighs the experts of a token."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from profiles.record import PositiveInt, Record

if TYPE_CHECKING:
    from profiles.model_shape import ModelShape


class Router(Record):
    """A linear layer without bias whose outputs score the experts. A token goes to those with the highest scores, and
    their outputs are added up with the scores as weights."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: over all experts (Mixtral, Qwen 3). sigmoid: of each expert by itself (DeepSeek-V3)."""
    normalized: bool = True
    """Whether the weights of a token's experts are divided by their sum. With one expert a token the quotient would be
    1, whatever the router says, so the score itself is the weight."""
    scale: PositiveFloat = 1.0
    """Factor of the weights (DeepSeek's `routed_scaling_factor`)."""
    groups: PositiveInt = 1
    """Equal groups that the experts are divided into. A token goes to experts of `groups_per_token` of them only."""
    groups_per_token: PositiveInt = 1
    """Groups that a token's experts are in: those whose experts_per_token ÷ groups_per_token best scores have the
    largest sum."""
    bias_update_rate: float = Field(default=0.0, ge=0, lt=1)
    """Each expert has a bias that is added to its score when experts are chosen, and not in the weights. After a step
    it grows by this where fewer tokens than the mean came, and falls by it where more did (2408.15664; DeepSeek-V3 has
    0.001). 0: no biases. Needs sigmoid scores."""
    aux_loss: NonNegativeFloat = 0.01
    """Coefficient of the loss that spreads tokens over the experts (2101.03961, eq. 4); it is not in the losses that
    are reported. 0: none."""
    aux_loss_over: Literal["sequence", "micro-batch"] = "sequence"
    """Tokens that are to be spread: those of each sequence, or those of each micro-batch, where the loss, and with it
    training, depends on the size of the micro-batch."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the loss that keeps the router's logits small (2202.08906, eq. 5). 0: none."""

    def check(self, model: "ModelShape") -> None:
        """Raise ValueError, with the arithmetic, if it cannot be the router of the model."""
        experts, chosen = model.experts, model.experts_per_token
        if self.scores == "sigmoid" and not self.normalized:
            raise ValueError("router.normalized(false) needs router.scores(softmax)")
        if self.bias_update_rate and self.scores != "sigmoid":
            raise ValueError(f"router.bias_update_rate({self.bias_update_rate:g}) needs router.scores(sigmoid)")
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"router.groups_per_token({self.groups_per_token}) is larger than router.groups({self.groups})"
            )
        for what, amount, by, degree in (
            ("experts", experts, "router.groups", self.groups),
            ("experts_per_token", chosen, "router.groups_per_token", self.groups_per_token),
        ):
            if amount % degree:
                raise ValueError(f"{what}({amount}) ÷ {by}({degree}) is not whole: {amount / degree:g}")
        reachable = experts // self.groups * self.groups_per_token
        if chosen > reachable:
            raise ValueError(
                f"experts_per_token({chosen}) is larger than experts({experts}) ÷ router.groups({self.groups}) × "
                f"router.groups_per_token({self.groups_per_token}) = {reachable}"
            )
