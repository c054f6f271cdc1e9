"""A plan applied to one model's sites: what each becomes, checked and counted. Without torch.

`resolve_sites` is the whole of it and looks at `Site` records only, so that a plan can be tried
without the model. What the numbers count is said in `LayerPlan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeify.errors import UnsupportedModuleError
from moeify.layer_description import describe_layer
from moeify.plan import LayerRule, Plan
from moeify.resolve_checks import check_layer, check_layers
from moeify.rule_match import Universe, match_rule
from moeify.selection import Schedule
from moeify.sites import Projection, Site
from moeify.specs import InitSpec, RouterSpec
from moeify.strict_yaml import Where

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one site becomes.

    All counts are of parameter elements. An expert is the site's MLP with its biases and inner
    norms; `granular` gives it 1/granularity of the hidden neurons and a whole output bias, `split`
    1/experts. With `expert: linear` an expert is a square `Linear(d_in, d_in)` with bias, and the
    original projection stays behind the experts. The router is `experts * d_in`, without bias. A
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
        rule: Position of the last rule that had a say.
        kernel: What is to run the experts; "auto" leaves it to the pass that lowers them.
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
        from moeify.plan_table import render

        return render(self)

    def __str__(self) -> str:
        from moeify.plan_table import plain_text

        return plain_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Gives the resolved plan as JSON-able data.

        Returns:
            The plan, its layers, the sites left out, and the totals.
        """
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


@dataclass(slots=True)
class _Choice:
    """What the rules have said of one site so far; `said` is where each field was stated."""

    experts: int
    rule: int
    top_k: int = 1
    residual: str = "none"
    kernel: str = "auto"
    router: RouterSpec = field(default_factory=RouterSpec)
    init: InitSpec = field(default_factory=InitSpec)
    said: dict[str, Where] = field(default_factory=dict)


def resolve_sites(
    plan: Plan,
    sites: Sequence[Site],
    *,
    parameters: int,
    parameter_bytes: int,
    linears: Sequence[Projection] = (),
    near_misses: Sequence[str] = (),
) -> ResolvedPlan:
    """Applies a plan to sites.

    Args:
        plan: The plan.
        sites: Every site of the model in execution order, refused ones too.
        parameters: Parameter elements of the whole model, shared ones counted once.
        parameter_bytes: Their bytes.
        linears: Linear layers that are modules of their own, for rules with `expert: linear`.
        near_misses: What nearly is an MLP and why it is none, for the message where none is.

    Returns:
        What every selected site becomes.

    Raises:
        PlanError: If a rule selects nothing, or what it says does not fit a site.
        UnsupportedModuleError: If a selected site is blocked by the state of its weights.
    """
    itemsize = parameter_bytes // parameters if parameters else 4
    like = next((site for site in sites), None)
    linear_sites: dict[str, Site] = {}
    for projection in linears:
        if projection.module is not None and projection.module not in linear_sites:
            position = len(sites) + len(linear_sites)
            linear_sites[projection.module] = _linear_site(projection, position, like, itemsize)
    universe = Universe(
        mlps={site.name: site for site in sites if site.install != "refused" or site.blocked},
        linears=linear_sites,
        refused={
            site.name: site.reason
            for site in sites
            if site.install == "refused" and not site.blocked
        },
        near=near_misses,
    )
    chosen: dict[str, dict[str, _Choice]] = {"mlp": {}, "linear": {}}
    for position, rule in enumerate(plan.layers):
        names = match_rule(plan, position, universe, frozenset(chosen[rule.expert]))
        _apply(plan, position, rule, names, chosen[rule.expert])
    layers = []
    for expert, candidates in (("mlp", universe.mlps), ("linear", universe.linears)):
        for name, site in candidates.items():
            if (choice := chosen[expert].get(name)) is not None:
                if site.blocked:
                    raise UnsupportedModuleError(
                        name, f"{site.reason}; mend it, or take it back with `experts: dense`"
                    )
                layers.append(_layer(plan, site, expert, choice))
    if not layers:
        raise plan.fault(("layers",), "the rules take back all that they select; nothing is left")
    check_layers(plan, layers)
    return ResolvedPlan(plan, tuple(layers), tuple(sites), parameters, parameter_bytes)


def _linear_site(projection: Projection, position: int, like: Site | None, itemsize: int) -> Site:
    bias = projection.out_features if projection.bias is not None else 0
    by_size = {2: "bfloat16", 4: "float32", 8: "float64"}
    return Site(
        name=projection.module or projection.weight,
        index=position,
        install="T1",
        reason="",
        d_in=projection.in_features,
        d_ff=0,
        d_out=projection.out_features,
        activation="linear",
        gated=False,
        up=(),
        down=projection,
        # A projection does not know its dtype: take that of an MLP, else the model's average.
        dtype=like.dtype if like else by_size.get(itemsize, "float32"),
        itemsize=like.itemsize if like else itemsize,
        parameters=projection.in_features * projection.out_features + bias,
    )


def _apply(
    plan: Plan, position: int, rule: LayerRule, names: Sequence[str], chosen: dict[str, _Choice]
) -> None:
    """Lets one rule speak on the sites it selects."""
    if rule.experts == "dense":
        for name in names:
            chosen.pop(name, None)
        return
    counts: Sequence[int | None]
    if isinstance(rule.experts, Schedule):
        counts = rule.experts.spread(len(names))
    else:
        counts = [rule.experts if isinstance(rule.experts, int) else None] * len(names)
    for name, count in zip(names, counts, strict=True):
        choice = chosen.get(name)
        if choice is None:
            if count is None:
                raise plan.fault(
                    ("layers", position),
                    f"say how many `experts`: no earlier rule selects `{name}`",
                )
            choice = chosen[name] = _Choice(count, position, router=plan.router, init=plan.init)
        _override(choice, position, rule, count)


def _override(choice: _Choice, position: int, rule: LayerRule, count: int | None) -> None:
    here: Where = ("layers", position)
    choice.rule = position
    if count is not None:
        choice.experts, choice.said["experts"] = count, (*here, "experts")
    if "top_k" in rule.model_fields_set:
        choice.top_k, choice.said["top_k"] = rule.top_k, (*here, "top_k")
    if "residual" in rule.model_fields_set:
        choice.residual, choice.said["residual"] = rule.residual, (*here, "residual")
    if "kernel" in rule.model_fields_set:
        choice.kernel, choice.said["kernel"] = rule.kernel, (*here, "kernel")
    router = {key: getattr(rule.router, key) for key in rule.router.model_fields_set}
    init = {key: getattr(rule.init, key) for key in rule.init.model_fields_set}
    choice.router = choice.router.model_copy(update=router)
    choice.init = choice.init.model_copy(update=init)
    choice.said |= {f"router.{key}": (*here, "router", key) for key in router}
    for key in init:
        written = key.rstrip("_")  # `from` in a plan
        choice.said[f"init.{written}"] = (*here, "init", written)


def _layer(plan: Plan, site: Site, expert: str, choice: _Choice) -> LayerPlan:
    router = choice.router
    if router.combine == "auto":
        combine = "straight_through" if choice.top_k == 1 else "normalized"
        combine = "sum" if choice.init.experts == "split" else combine
        router = router.model_copy(update={"combine": combine})
    layer = LayerPlan(
        site,
        choice.experts,
        choice.top_k,
        choice.residual,
        expert,
        router,
        choice.init,
        choice.rule,
        choice.kernel,
        plan.folder,
    )
    check_layer(plan, layer, choice.said)
    return layer
