"""The moments of a step of FSDP that may be its fullest.

What the model computes with are copies of the weights, gathered for a step (ZeRO-3: for a layer). Every layer is a
unit; embedding, last norm and output layer are another one, the root, which stays gathered until the backward pass
ends. In the backward pass of the last micro-batch a unit's copies go when its gradients are reduced, so that gathered
weights and gradients are never all there together. As torch 2.13 reduces, in fp32: it copies a unit's gradients into a
buffer, which stays until the next unit is reduced, and has their sum in a second one. And it keeps the buffer in which
the last layer was gathered in the forward pass.
"""

from typing import NamedTuple

import numpy as np

from profiles.configurations import Configurations
from profiles.memory.parameters import Floats

REDUCED_BYTES = 4
"""Of an element of a gradient while it is reduced, and of one that waits for that: fp32."""


class Units(NamedTuple):
    """Numbers of weights on a rank, one entry a configuration, before ZeRO shares anything out."""

    layers: Floats
    """In all layers."""
    layer: Floats
    """In the largest of them."""
    root: Floats
    """Outside of them."""
    output: Floats
    """In the output layer, which may be the embedding too."""


class Passing(NamedTuple):
    """Bytes that are there for a part of a step only, one entry a configuration."""

    activations: Floats
    """What all layers keep for the backward pass."""
    logits: Floats
    """At the loss."""
    working: Floats
    """Beside gradients of weights, while a layer's backward pass runs."""
    update: Floats
    """While the optimizer updates the largest weight."""
    layer_update: Floats
    """While it updates the largest weight inside the layers."""


def fsdp_moments(
    c: Configurations, units: Units, passing: Passing, element: int, gradient: int, layers: int
) -> list[dict[str, Floats]]:
    """Bytes by part, without what the optimizer keeps, at the moments of the last micro-batch that may be the fullest:
    the loss; the backward pass and the reduction of the first, the second and the last of its layers; the root's
    gradients, and their reduction; the update. Between the second and the last layer memory changes by the same amount
    with every layer. `element` and `gradient` are bytes of an element of a gathered weight and of a gradient
    that has been reduced."""
    sharers = np.where(c.zero >= 1, c.dp * c.cp // c.dp_replicate, 1)
    several, shares_gradients = c.num_microbatches > 1, c.zero >= 2
    waits = several & ~shares_gradients  # sums of whole gradients, reduced with the last micro-batch
    cast = gradient * (gradient < REDUCED_BYTES)
    copies = c.dp * c.cp // sharers
    held = REDUCED_BYTES * (gradient < REDUCED_BYTES) * (copies > 1)  # all-reduced sums, until the backward pass ends
    nothing = np.zeros(len(c))

    def moment(layers_reduced: Floats, gathered: Floats, buffers: Floats, **others: Floats) -> dict[str, Floats]:
        """In the backward pass. `layers_reduced` and `gathered` count weights; what is not reduced may wait for it."""
        waiting = units.layers + units.root - layers_reduced
        reduced = np.where(several & shares_gradients, units.layers + units.root, layers_reduced)
        buffers = buffers + np.where(sharers > 1, element * units.layer, 0)
        return {
            "weights": np.where(c.zero < 3, element * gathered, 0),
            "gradients": (gradient * reduced + held * layers_reduced) / sharers + REDUCED_BYTES * waits * waiting,
            "activations": nothing,
            "logits": nothing,
            "working": nothing,
            "communication": np.where(c.zero < 3, 0, element * gathered) + buffers,
        } | others

    def with_layers(left: Floats) -> Floats:
        """Gathered: the root, and the layers that are left. ZeRO-3 has the one that runs, and the next."""
        return units.root + np.where(c.zero < 3, left, np.minimum(2 * units.layer, left))

    def reduction(unit: Floats) -> Floats:
        """First the gradients and the buffer, then the buffer and the sum."""
        first = np.where(waits, REDUCED_BYTES, element) * unit + REDUCED_BYTES * unit
        then = REDUCED_BYTES * unit + (REDUCED_BYTES + cast) * unit / sharers
        return np.maximum(first, then) - REDUCED_BYTES * waits * unit  # which `moment` counts

    def backward(reduced: Floats, share: float, buffer: Floats) -> list[dict[str, Floats]]:
        """A layer's backward pass and its reduction, after so many weights of other layers; `share` of the layers are
        left, this one included."""
        gathered, of_output = with_layers(units.layers - reduced), element * units.output
        others = {"activations": share * passing.activations, "working": passing.working}
        left = np.where(c.zero < 3, gathered - units.layer, gathered)
        return [
            moment(reduced, gathered, of_output + element * units.layer + buffer, **others),
            moment(
                reduced,
                left,
                of_output + reduction(units.layer),
                activations=(share - 1 / layers) * passing.activations,
            ),
        ]

    one_layer, all_but_one, buffer = units.layer, units.layers - units.layer, REDUCED_BYTES * units.layer
    loss = {"activations": passing.activations, "logits": passing.logits}
    update = moment(units.layers + units.root, nothing, nothing, working=passing.update)
    update["gradients"] = gradient * (units.layers + units.root) / sharers  # nothing is held any longer
    return [
        moment(nothing, with_layers(units.layers), nothing, **loss),
        *backward(nothing, 1.0, np.where(several & shares_gradients, REDUCED_BYTES * units.root, 0)),
        *(backward(one_layer, 1 - 1 / layers, buffer) if layers > 1 else ()),
        *(backward(all_but_one, 1 / layers, buffer) if layers > 1 else ()),
        moment(units.layers, units.root, element * units.root + buffer),
        moment(units.layers, nothing, reduction(units.root)),
        update,
    ]


def in_backward_moments(
    units: Units, passing: Passing, element: int, gradient: int, layers: int
) -> list[dict[str, Floats]]:
    """The same for one rank whose optimizer is in the backward pass: a unit is updated and its gradients go as soon as
    they are reduced, which here is a copy in the precision of the model. Copies of one layer are there at a time. The
    loss; the backward pass of the first layer and of the second, each with what follows it; the root."""
    nothing = np.zeros_like(units.root)

    def moment(gathered: Floats, gradients: Floats, buffers: Floats, **others: Floats) -> dict[str, Floats]:
        own = {"weights": element * gathered, "gradients": gradients, "communication": buffers}
        return {"activations": nothing, "logits": nothing, "working": nothing} | own | others

    def updated(unit: Floats, update: Floats, **others: Floats) -> list[dict[str, Floats]]:
        """The reduction of a unit from one buffer into another, and its update, during which the first one stays."""
        cast = gradient * (gradient != element)
        gathered, waiting = others.pop("gathered", nothing), others.pop("waiting", nothing)
        return [
            moment(gathered, waiting, (2 * element + cast) * unit, **others),
            moment(gathered, waiting + gradient * unit, element * unit, working=update, **others),
        ]

    def backward(left: float, buffer: Floats) -> list[dict[str, Floats]]:
        """Of a layer; `left` is the share of the layers that are left, this one included."""
        output, kept = element * units.output, left * passing.activations
        after = (left - 1 / layers) * passing.activations
        return [
            moment(
                units.root + units.layer,
                output + element * units.layer,
                buffer,
                activations=kept,
                working=passing.working,
            ),
            *updated(units.layer, passing.layer_update, gathered=units.root, waiting=output, activations=after),
        ]

    return [
        moment(units.root, nothing, nothing, activations=passing.activations, logits=passing.logits),
        *backward(1.0, nothing),
        *(backward(1 - 1 / layers, element * units.layer) if layers > 1 else ()),
        moment(units.root, element * units.root, element * units.layer),
        *updated(units.root, passing.update),
    ]
