"""How a class of transformers trains otherwise than moeify does, for the plan at hand.

The outputs agree; these are differences of gradients and losses. What follows from each class, read
in transformers 5:

- weights: their gradient goes through their value, so that one expert of weight 1 gives none
- tokens: none is dropped
- noise: Mixtral can add jitter, to what the experts read as well; the others add none
- balance loss: on request, `E * sum(f * P)` over all layers together and K times ours, where f
  counts all K choices; Glm4Moe has none
- z-loss: none
- selection bias: Glm4Moe has one, and nothing moves it
"""

from __future__ import annotations

from collections.abc import Iterator

from moeify.formats.native.architectures import Target
from moeify.formats.native.model_facts import Facts


def training_warning(target: Target, facts: Facts) -> tuple[str, ...]:
    """Return one sentence with all that differs and what to do; nothing if all is the same."""
    found = list(_differences(target, facts))
    if not found:
        return ()
    return (
        f"a {target.architecture} trains otherwise than this model does: {'; '.join(found)}. To "
        'train it further, export it as "custom"',
    )


def _differences(target: Target, facts: Facts) -> Iterator[str]:
    """Yield what differs, the worst first."""
    routers = [layer.plan.router for layer in facts.layers]
    combines = {router.combine for router in routers}
    if combines & {"straight_through", "sum"}:  # with one expert per token only
        yield "its routers never learn from the loss, because one expert's weight of 1 is constant"
    if any(router.bias_update for router in routers):
        yield "nothing moves its selection bias"
    if any(router.aux_loss for router in routers):
        if not target.aux_loss:
            yield "it has no balance loss"
        else:
            yield f"its balance loss is off until output_router_logits=True, and {_loss(facts)}"
    if any(router.z_loss for router in routers):
        yield "it has no z-loss"
    if any(router.capacity_factor is not None for router in routers):
        yield "it drops no tokens"
    if any(router.noise != "none" for router in routers):
        yield "it adds no noise"


def _loss(facts: Facts) -> str:
    """Say how the class's balance loss differs from ours."""
    parts = ["is one over all layers together"]
    if facts.layers[0].plan.top_k > 1:
        parts.append(f"{facts.layers[0].plan.top_k} times as large")
    if len({layer.plan.router.aux_loss for layer in facts.layers}) > 1:
        parts.append("with the first layer's weight")
    if any(layer.plan.router.balance == "first" for layer in facts.layers):
        parts.append("over all choices")
    return ", ".join(parts)
