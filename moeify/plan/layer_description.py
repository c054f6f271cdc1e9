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
    """What one layer of the dense model became; the fields are those of `Site` and `LayerPlan`."""

    name: str
    install: Install
    d_in: _Size
    d_ff: _Size
    d_out: _Size
    activation: str
    gated: bool
    dtype: str  # of the dense parameters when they were converted
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
    site_fields = "name install d_in d_ff d_out activation gated dtype".split()
    layer_fields = LayerDescription.model_fields.keys() - set(site_fields)
    return LayerDescription(
        **{key: getattr(layer.site, key) for key in site_fields},
        **{key: getattr(layer, key) for key in layer_fields},
    )
