"""A converted layer as data: the one form in which it is written to JSON and read back.

Manifests, recipes, run logs and the command line's JSON all hold it. `describe_layer` makes it from
a `LayerPlan`, and `LayerDescription.model_validate` reads it. Importable without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from moeify.plan.selection import Count, Natural, Strict
from moeify.plan.site import Install
from moeify.plan.specs import InitSpec, RouterSpec

if TYPE_CHECKING:
    from moeify.plan.layer_plan import LayerPlan

_Size: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]


class LayerDescription(Strict):
    """What one layer of the dense model became.

    Counts are of parameter elements, by the rules in `LayerPlan`.

    Attributes:
        name: The site's name.
        install: How it was put in place; see `Site`.
        d_in: Input width.
        d_ff: Hidden width of the dense MLP (of one half, if gated).
        d_out: Output width.
        activation: Such as "gelu".
        gated: Whether the hidden value is a product of an activated and a linear half.
        dtype: Of the dense parameters when they were converted, such as "float32".
        experts: Number of experts.
        top_k: Experts per token.
        residual: "none", "coefficient", "add" or "sigmoid".
        expert: "mlp" or "linear".
        kernel: What is to run the experts.
        router: Routing, with `combine` decided.
        init: Where experts and router started.
        rule: Position of the plan's last rule that had a say.
        parameters_before: Elements of the dense site.
        parameters_after: Elements of the MoE layer.
        active_parameters: Elements of the MoE layer that one token uses.
        active_neurons: Hidden neurons that a token uses, relative to the dense MLP's.
        bytes_after: Bytes of the MoE layer in `dtype`.
    """

    name: str
    install: Install
    d_in: _Size
    d_ff: _Size
    d_out: _Size
    activation: str
    gated: bool
    dtype: str
    experts: Count
    top_k: Count
    residual: str
    expert: str
    kernel: str
    router: RouterSpec
    init: InitSpec
    rule: Natural
    parameters_before: _Size
    parameters_after: _Size
    active_parameters: _Size
    active_neurons: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes_after: _Size

    def data(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return self.model_dump(mode="json", by_alias=True)


def describe_layer(layer: LayerPlan) -> LayerDescription:
    """Describe a resolved layer."""
    site = layer.site
    return LayerDescription(
        name=site.name,
        install=site.install,
        d_in=site.d_in,
        d_ff=site.d_ff,
        d_out=site.d_out,
        activation=site.activation,
        gated=site.gated,
        dtype=site.dtype,
        experts=layer.experts,
        top_k=layer.top_k,
        residual=layer.residual,
        expert=layer.expert,
        kernel=layer.kernel,
        router=layer.router,
        init=layer.init,
        rule=layer.rule,
        parameters_before=layer.parameters_before,
        parameters_after=layer.parameters_after,
        active_parameters=layer.active_parameters,
        active_neurons=layer.active_neurons,
        bytes_after=layer.bytes_after,
    )


__all__ = ["LayerDescription", "describe_layer"]
