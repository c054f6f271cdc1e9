"""A plan applied to one model: `LayerPlan` for each layer, `ResolvedPlan` for all of it.

Data only, and without torch; `moeify.plan.resolve` makes them. A `ResolvedPlan` prints as a table,
and rich is imported only then.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeify.plan.fitted_table import Column, FittedTable
from moeify.plan.layer_description import describe_layer
from moeify.plan.plan import Plan
from moeify.plan.selection import shorten
from moeify.plan.site import Site
from moeify.plan.specs import InitSpec, RouterSpec
from moeify.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 120


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one site becomes.

    All counts are of parameter elements. An expert is the site's MLP with its biases and inner
    norms; with `granular` it has 1/granularity of the hidden neurons and a whole output bias, with
    `split` 1/experts. With `expert: linear` an expert is a square `Linear(d_in, d_in)` with bias,
    and the original projection follows the experts. The router is `experts * d_in`, without bias. A
    residual keeps one dense MLP (or one more square linear) and a mixer: `2 * d_in + 2` elements
    for `coefficient`, `d_in` for `sigmoid`, none for `add`. The bias of `bias_update` is a buffer
    and not counted.

    Attributes:
        site: The MLP of the dense model, or the linear layer.
        experts: Number of experts.
        top_k: Experts per token.
        residual: "none", "coefficient", "add" or "sigmoid".
        expert: "mlp" or "linear".
        router: Routing, overrides applied and `combine` decided.
        init: Start, overrides applied.
        rule: Position of the last rule that selected it.
        kernel: What runs the experts; "auto" leaves it to the pass that lowers them.
        folder: Where relative paths in `init` start; "" for the working directory.
    """

    site: Site
    experts: int
    top_k: int
    residual: str
    expert: str
    router: RouterSpec
    init: InitSpec
    rule: int
    kernel: str = "auto"
    folder: str = ""

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def slices(self) -> int:
        """Into how many experts one dense MLP's hidden neurons go."""
        if self.init.experts == "split":
            return self.experts
        return self.init.granularity if self.init.experts == "granular" else 1

    @property
    def active_neurons(self) -> float:
        """Hidden neurons that a token uses in its experts, relative to the dense MLP's."""
        return self.top_k / self.slices

    @property
    def expert_parameters(self) -> int:
        """Elements of one expert."""
        site = self.site
        if self.expert == "linear":
            return site.d_in * site.d_in + site.d_in
        if self.slices == 1:
            return site.parameters
        bias = site.down.out_features if site.down.bias is not None else 0
        return (site.parameters - bias) // self.slices + bias

    @property
    def shared_parameters(self) -> int:
        """Elements that every token uses: router, residual, and a linear site's projection."""
        d_in = self.site.d_in
        count = self.experts * d_in
        if self.residual != "none":
            mixer = {"coefficient": 2 * d_in + 2, "sigmoid": d_in, "add": 0}[self.residual]
            linear = self.expert == "linear"
            count += (self.expert_parameters if linear else self.site.parameters) + mixer
        return count + (self.site.parameters if self.expert == "linear" else 0)

    @property
    def parameters_before(self) -> int:
        """Elements of the dense site."""
        return self.site.parameters

    @property
    def parameters_after(self) -> int:
        """Elements of the MoE layer."""
        return self.experts * self.expert_parameters + self.shared_parameters

    @property
    def active_parameters(self) -> int:
        """Elements of the MoE layer that one token uses."""
        return self.top_k * self.expert_parameters + self.shared_parameters

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense site."""
        return self.parameters_before * self.site.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes of the MoE layer, all of it in the site's own dtype."""
        return self.parameters_after * self.site.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as JSON-able data: a `LayerDescription`."""
        return describe_layer(self).data()


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """A plan applied to one model; iterates over its layers and prints as a table.

    Attributes:
        plan: The plan.
        layers: What the selected sites become: MLPs in execution order, then linear layers.
        sites: Every site of the model, those that stay dense and the refused ones too.
        dense_parameters: Elements of the whole model before.
        dense_bytes: Bytes of the whole model before.
        notes: Sentences on what the plan means for the rest of the model, such as which dense
            layers are sliced.
    """

    plan: Plan
    layers: tuple[LayerPlan, ...]
    sites: tuple[Site, ...]
    dense_parameters: int
    dense_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of the whole model after conversion."""
        grown = sum(layer.parameters_after - layer.parameters_before for layer in self.layers)
        return self.dense_parameters + grown

    @property
    def active_parameters(self) -> int:
        """Elements of the whole model after conversion that one token uses."""
        grown = sum(layer.active_parameters - layer.parameters_before for layer in self.layers)
        return self.dense_parameters + grown

    @property
    def bytes(self) -> int:
        """Bytes of the whole model after conversion."""
        return self.dense_bytes + sum(layer.bytes_after - layer.bytes_before for layer in self)

    @property
    def dense_sites(self) -> tuple[Site, ...]:
        """Sites that could be converted and stay dense."""
        chosen = {layer.name for layer in self.layers}
        return tuple(
            site for site in self.sites if site.install != "refused" and site.name not in chosen
        )

    @property
    def refused_sites(self) -> tuple[Site, ...]:
        """Sites that cannot be converted; `reason` says why."""
        return tuple(site for site in self.sites if site.install == "refused")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerPlan:
        return self.layers[index]

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*_parts(self))

    def __str__(self) -> str:
        return _plain_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, its layers, the sites left out and the totals as JSON-able data."""
        return {
            "plan": self.plan.data(),
            "layers": [layer.to_dict() for layer in self.layers],
            "dense": [site.name for site in self.dense_sites],
            "refused": [{"name": site.name, "reason": site.reason} for site in self.refused_sites],
            "dense_parameters": self.dense_parameters,
            "dense_bytes": self.dense_bytes,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def _parts(resolved: ResolvedPlan) -> list[RenderableType]:
    """Return what rich prints: a table of the layers, and lines on the sites that stay dense."""
    from rich.text import Text

    parts: list[RenderableType] = [_table(resolved)]
    parts += [Text(line) for line in _slices(resolved)]
    dense = resolved.dense_sites
    if dense:
        names = shorten([site.name for site in dense], 6)
        parts.append(Text(f"stay dense ({len(dense)}): {names}"))
    parts += [Text(f"refused: {site.name}: {site.reason}") for site in resolved.refused_sites]
    parts += [Text(note) for note in resolved.notes]
    return parts


def _slices(resolved: ResolvedPlan) -> list[str]:
    """Return lines on the share of hidden neurons that a token uses where experts are slices."""
    shares: dict[float, list[str]] = {}
    for layer in resolved:
        if layer.init.experts == "split":
            shares.setdefault(layer.active_neurons, []).append(layer.name)
    return [
        f"split: a token uses {share:.1%} of the hidden neurons of {shorten(names, 6)}"
        for share, names in shares.items()
    ]


def _plain_text(resolved: ResolvedPlan) -> str:
    """Render without colours, 120 columns wide."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, force_terminal=False)
    console.print(resolved)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def _table(resolved: ResolvedPlan) -> FittedTable:
    layers = list(resolved)
    spread = resolved.plan.parallel.expert
    columns = [
        Column("site", [layer.name for layer in layers], footer="whole model", names=True),
        Column("widths", [_widths(layer) for layer in layers], spare=1),
        Column("experts", [str(layer.experts) for layer in layers], right=True),
    ]
    if spread > 1:
        ranks = [str(min(spread, layer.experts)) for layer in layers]
        columns.append(Column("ranks", ranks, right=True))
    residual = ["-" if layer.residual == "none" else layer.residual for layer in layers]
    columns += [
        Column("k", [str(layer.top_k) for layer in layers], right=True),
        Column("residual", residual, spare=2 if set(residual) <= {"-"} else 0),
        _sizes(
            "before",
            [layer.parameters_before for layer in layers],
            resolved.dense_parameters,
            spare=3,
        ),
        _sizes("after", [layer.parameters_after for layer in layers], resolved.parameters),
        _sizes("active", [layer.active_parameters for layer in layers], resolved.active_parameters),
        _sizes("bytes", [layer.bytes_after for layer in layers], resolved.bytes, format_bytes),
    ]
    return FittedTable(tuple(columns))


def _short(count: int) -> str:
    """Write a count with four significant digits: 9,999 as it is, then 12.35K, 1.235M, ..."""
    if count < 10_000:
        return f"{count:,}"
    value, unit = count / 1000, "K"
    for larger in "MBT":
        if round(value, 1) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.{2 if value < 100 else 1}f}{unit}"


def _sizes(
    title: str,
    each: Sequence[int],
    total: int,
    text: Callable[[int], str] = _short,
    *,
    spare: int = 0,
) -> Column:
    return Column(title, [text(n) for n in each], right=True, footer=text(total), spare=spare)


def _widths(layer: LayerPlan) -> str:
    site = layer.site
    if layer.expert == "linear":
        return f"{site.d_in}->{site.d_in}->{site.d_out}"
    return f"{site.d_in}->{site.d_ff}->{site.d_out}"
