"""A plan on hand-made sites: what is selected, what it becomes, what it costs, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.errors import PlanError
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.presets import PRESETS
from moeify.plan.resolve import resolve_sites
from moeify.plan.site import Projection, Site

D, F = 8, 32


def make_site(index: int, *, bias: bool = True, gated: bool = False, d_ff: int = F) -> Site:
    name = f"model.layers.{index}.mlp"
    width = d_ff * (1 + gated)
    up = Projection(
        f"{name}.up.weight", f"{name}.up.bias" if bias else None, f"{name}.up", False, D, width
    )
    down = Projection(
        f"{name}.down.weight", f"{name}.down.bias" if bias else None, f"{name}.down", False, d_ff, D
    )
    count = D * width + d_ff * D + (width + D if bias else 0)
    return Site(name, index, "module", "", D, d_ff, D, "gelu", gated, (up,), down, parameters=count)


def make_sites(count: int, **options: Any) -> list[Site]:
    return [make_site(index, **options) for index in range(count)]


REFUSED = replace(
    make_site(0), name="model.conv[0]", index=-1, install="refused", reason="kernel 3"
)
LINEARS = (
    Projection("fc3.weight", "fc3.bias", "fc3", False, 84, 10),
    Projection("head.weight", None, "head", False, 16, 4),
)


def resolve(
    plan: Any, sites: list[Site] | None = None, linears: tuple[Projection, ...] = LINEARS
) -> ResolvedPlan:
    sites = make_sites(6) if sites is None else sites
    total = 1000 + sum(site.parameters for site in sites)
    if isinstance(plan, list):
        plan = {"layers": plan}
    return resolve_sites(
        Plan.of(plan), sites, parameters=total, parameter_bytes=4 * total, linears=linears
    )


def chosen(select: Any, count: int = 6) -> list[int]:
    resolved = resolve([{"select": select, "experts": 2}], make_sites(count))
    return [layer.site.index for layer in resolved]


@pytest.mark.parametrize(
    ("select", "indices"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ({"every": 2, "start": 1}, [1, 3, 5]),
        ({"every": 4}, [0, 4]),
        ({"first": 2}, [0, 1]),
        ({"first": 20}, [0, 1, 2, 3, 4, 5]),
        ({"last": 2}, [4, 5]),
        ({"last": 20}, [0, 1, 2, 3, 4, 5]),
        ({"half": "first"}, [0, 1, 2]),
        ({"half": "second"}, [3, 4, 5]),
        ({"index": -1}, [5]),
        ({"index": [3, 1, -3]}, [1, 3]),
        ({"name": "model.layers.2.*"}, [2]),
        ({"name": ["*.5.mlp", "*.0.mlp"]}, [0, 5]),
        ({"name": r"re:.*\.[13]\.mlp"}, [1, 3]),
    ],
)
def test_selection(select: Any, indices: list[int]) -> None:
    assert chosen(select) == indices


def test_odd_halves_share_nothing() -> None:
    assert chosen({"half": "first"}, 5) == [0, 1, 2]
    assert chosen({"half": "second"}, 5) == [3, 4]


def test_later_rules_override_only_what_they_state() -> None:
    resolved = resolve(
        [
            {
                "select": {"every": 2, "start": 1},
                "experts": 8,
                "top_k": 2,
                "residual": "add",
                "router": {"aux_loss": 0.5},
            },
            {"select": {"last": 2}, "experts": 16, "router": {"z_loss": 0.1}},
        ]
    )
    by_index = {layer.site.index: layer for layer in resolved}
    assert list(by_index) == [1, 3, 4, 5]
    both, new, old = by_index[5], by_index[4], by_index[3]
    assert (both.experts, both.top_k, both.residual, both.rule) == (16, 2, "add", 1)
    assert (both.router.aux_loss, both.router.z_loss) == (0.5, 0.1)
    assert (new.experts, new.top_k, new.residual, new.router.aux_loss) == (16, 1, "none", 0.01)
    assert (old.experts, old.rule, old.router.z_loss) == (8, 0, 0.0)


def test_of_selected_counts_over_earlier_rules() -> None:
    resolved = resolve(Plan.preset("pr-moe", experts=4, last=8), make_sites(24))
    assert [layer.site.index for layer in resolved] == list(range(1, 24, 2))
    assert [layer.experts for layer in resolved] == [4] * 10 + [8] * 2
    assert {layer.residual for layer in resolved} == {"coefficient"}
    with pytest.raises(PlanError, match="they select nothing"):
        resolve([{"select": {"last": 2, "of": "selected"}, "experts": 2}])


def test_dense_undoes_earlier_rules() -> None:
    rules: list[Any] = [
        {"select": "all", "experts": 4},
        {"select": {"first": 5}, "experts": "dense"},
    ]
    resolved = resolve(rules)
    assert [layer.site.index for layer in resolved] == [5]
    assert [site.index for site in resolved.dense_sites] == [0, 1, 2, 3, 4]
    with pytest.raises(PlanError, match="undoes all that the rules select"):
        resolve([*rules, {"select": "all", "experts": "dense"}])


def test_schedule_over_the_selected_sites() -> None:
    rule = {"select": {"last": 4}, "experts": {"from": 2, "to": 16, "shape": "geometric"}}
    assert [layer.experts for layer in resolve([rule])] == [2, 4, 8, 16]


def test_combine_is_decided_by_top_k() -> None:
    assert resolve("moe")[0].router.combine == "straight_through"
    assert resolve("top2")[0].router.combine == "normalized"
    assert resolve("switch")[0].router.combine == "probability"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_fit_any_depth(preset: str) -> None:
    for depth in (2, 3, 24):
        resolved = resolve(Plan.preset(preset), make_sites(depth))
        assert len(resolved) >= 1
        assert json.loads(json.dumps(resolved.to_dict()))["parameters"] == resolved.parameters


@pytest.mark.parametrize(
    ("rules", "path", "part"),
    [
        ([{"select": {"index": 6}, "experts": 2}], "layers[0].select.index", "6 sites: 0..5"),
        ([{"select": {"index": [0, -7]}, "experts": 2}], "layers[0].select.index", "no site -7"),
        ([{"select": {"every": 2, "start": 6}, "experts": 2}], "layers[0].select", "0..5"),
        (
            [{"select": {"name": "model.layer.1.mlp"}, "experts": 2}],
            "layers[0].select.name",
            "did you mean `model.layers.1.mlp`",
        ),
        ([{"select": {"name": "*.xyz"}, "experts": 2}], "layers[0].select.name", "there are"),
        (
            [{"select": {"name": ["*.1.mlp", "*.9.mlp"]}, "experts": 2}],
            "layers[0].select.name[1]",
            "matches nothing",
        ),
        ([{"select": {"name": "model.conv*"}, "experts": 2}], "layers[0].select.name", "kernel 3"),
        (
            [{"select": {"name": "fc3"}, "experts": 2}],
            "layers[0].select.name",
            "`fc3` is a linear layer, not an MLP; use `expert: linear`",
        ),
        (
            [{"select": {"name": "*.1.mlp"}, "experts": 2, "expert": "linear"}],
            "layers[0].select.name",
            "is an MLP, not a linear",
        ),
        (
            [
                {"select": {"index": 1}, "experts": 2},
                {"select": {"name": "*.2.mlp", "of": "selected"}, "experts": 2},
            ],
            "layers[1].select.name",
            "leave out `of: selected`",
        ),
        ([{"select": {"index": 1}, "top_k": 2}], "layers[0]", "no earlier rule selects"),
        ([{"select": "all", "experts": 2, "top_k": 3}], "layers[0].top_k", "at most 2"),
        (
            [{"select": "all", "experts": 4, "top_k": 4}, {"select": {"last": 1}, "experts": 2}],
            "layers[0].top_k",
            "model.layers.5.mlp",
        ),
    ],
)
def test_rules_that_do_not_fit(rules: list[Any], path: str, part: str) -> None:
    with pytest.raises(PlanError) as caught:
        resolve(rules, [*make_sites(6), REFUSED])
    assert caught.value.path == path
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("rule", "options", "path", "part"),
    [
        ({"top_k": 2}, {"router": {"combine": "straight_through"}}, "router.combine", "auto"),
        ({"top_k": 2, "router": {"combine": "straight_through"}}, {}, "R.router.combine", "auto"),
        ({"top_k": 2, "router": {"noise": "rsample"}}, {}, "R.router.noise", "top_k 1"),
        ({"router": {"noise": "gumbel"}}, {}, "R.router.noise", "top_k 2"),
        ({"init": {"granularity": 2}}, {}, "R.init.granularity", "granular"),
        ({"top_k": 3}, {"init": {"experts": "granular", "granularity": 2}}, "R.top_k", "multiple"),
        (
            {"top_k": 2, "experts": 7},
            {"init": {"experts": "granular", "granularity": 2}},
            "R.experts",
            "multiple",
        ),
        (
            {"top_k": 5, "experts": 10},
            {"init": {"experts": "granular", "granularity": 5}},
            "init.granularity",
            "hidden width 32",
        ),
        ({}, {"init": {"experts": "granular"}}, "R", "at least 2"),
        (
            {"top_k": 2, "router": {"combine": "probability"}},
            {"init": {"experts": "granular"}},
            "R.router.combine",
            "normalized",
        ),
        ({"router": {"combine": "sum"}}, {}, "R.router.combine", "split"),
        ({"init": {"clusters": "random"}}, {}, "R.init.clusters", "split"),
        ({}, {"init": {"router": "clusters"}}, "init.router", "split"),
        ({"experts": 6}, {"init": {"experts": "split"}}, "R.experts", "use 4 or 8"),
        ({"experts": 40}, {"init": {"experts": "split"}}, "R.experts", "use 32"),
        (
            {"router": {"combine": "normalized"}},
            {"init": {"experts": "split"}},
            "R.router.combine",
            "needs sum",
        ),
        ({"init": {"from": ["a"]}}, {}, "R.init.from", "models"),
        ({"init": {"rest": "keep"}}, {}, "R.init.rest", "models"),
        ({}, {"init": {"experts": "models"}}, "init.from", "folders"),
        ({}, {"init": {"experts": "models", "from": list("abc")}}, "R.experts", "use 3"),
        ({"experts": 6}, {"parallel": {"expert": 4}}, "R.experts", "use 4 or 8"),
        ({"experts": 3}, {"parallel": {"expert": 8}}, "R.experts", "use 2 or 4"),
        (
            {},
            {"parallel": {"tensor": 5, "experts_in_tp": "slice"}},
            "parallel.tensor",
            "hidden width 32",
        ),
    ],
)
def test_options_that_do_not_fit(
    rule: dict[str, Any], options: dict[str, Any], path: str, part: str
) -> None:
    with pytest.raises(PlanError) as caught:
        resolve({"layers": [{"select": "all", "experts": 8, **rule}], **options})
    assert caught.value.path == path.replace("R", "layers[0]", 1)
    assert part in caught.value.message
    assert caught.value.message.startswith("model.layers.0.mlp: ")


@pytest.mark.parametrize(("experts", "ranks"), [(8, 8), (16, 8), (2, 8), (1, 7), (64, 1)])
def test_expert_axes_that_fit(experts: int, ranks: int) -> None:
    rule = {"select": "all", "experts": experts}
    assert resolve({"layers": [rule], "parallel": {"expert": ranks}, "zero": {"stage": 3}})


@given(st.integers(1, 200), st.integers(1, 64))
def test_suggested_counts_do_fit(experts: int, ranks: int) -> None:
    def attempt(count: int) -> None:
        resolve(
            {
                "layers": [{"select": {"first": 1}, "experts": count}],
                "parallel": {"expert": ranks},
            }
        )

    try:
        attempt(experts)
    except PlanError as error:
        low, high = error.message.rsplit("use ", 1)[1].split(" or ")
        assert int(low) < experts < int(high)
        attempt(int(low))
        attempt(int(high))


def test_granular_refuses_inner_norms() -> None:
    site = replace(make_site(0), inner=("model.layers.0.norm.weight",))
    plan = {
        "layers": [{"select": "all", "experts": 4, "top_k": 2}],
        "init": {"experts": "granular", "granularity": 2},
    }
    with pytest.raises(PlanError, match="inner norm"):
        resolve(plan, [site])


def test_errors_of_resolving_name_the_files_line() -> None:
    text = "layers:\n  - select: all\n    experts: 4\n  - select:\n      name: nothing\n"
    with pytest.raises(PlanError, match=r"^p.yaml:5: layers\[1\].select.name: ") as caught:
        resolve(Plan.loads(text, file="p.yaml"))
    assert caught.value.line == 5
    first = text.partition("  - select:\n")[0]
    plan = Plan.loads(f"{first}parallel: {{expert: 3}}", file="p.yaml")
    with pytest.raises(PlanError, match=r"^p.yaml:3: layers\[0\].experts: "):
        resolve(plan)


def test_models_without_sites() -> None:
    with pytest.raises(PlanError, match="no MLP that can be converted"):
        resolve("moe", [], ())
    with pytest.raises(PlanError, match=r"refused: model.conv\[0\]: kernel 3"):
        resolve("moe", [REFUSED], ())
    with pytest.raises(PlanError, match="no linear layer"):
        resolve([{"select": {"name": "x"}, "experts": 2, "expert": "linear"}], linears=())


@given(
    experts=st.integers(1, 6),
    slices=st.sampled_from([1, 2, 4]),
    residual=st.sampled_from(["none", "coefficient", "add", "sigmoid"]),
    kind=st.sampled_from(["copy", "granular", "split"]),
    bias=st.booleans(),
    gated=st.booleans(),
)
def test_counts_are_those_of_the_tensors(
    experts: int, slices: int, residual: str, kind: str, bias: bool, gated: bool
) -> None:
    count, top_k, width = experts, 1, F
    plan: dict[str, Any] = {}
    if kind == "split":
        count, width = 2 * slices, F // (2 * slices)
        plan["init"] = {"experts": "split"}
    if kind == "granular":
        count, top_k, width = 4 * experts, 4, F // slices
        plan["init"] = {"experts": "granular", "granularity": slices}
    rule = {"select": {"index": 0}, "experts": count, "top_k": top_k, "residual": residual}
    sites = make_sites(2, bias=bias, gated=gated)
    resolved = resolve({"layers": [rule], **plan}, sites)

    def shapes(number: int) -> int:
        halves = 1 + gated
        tensors: list[tuple[int, ...]] = [(number, halves * width, D), (number, D, width)]
        tensors += [(number, halves * width), (number, D)] if bias else []
        return sum(_elements(shape) for shape in tensors)

    def _elements(shape: tuple[int, ...]) -> int:
        total = 1
        for size in shape:
            total *= size
        return total

    mixer = {"none": 0, "coefficient": 2 * D + 2, "add": 0, "sigmoid": D}[residual]
    shared = count * D + mixer + (sites[0].parameters if residual != "none" else 0)
    layer = resolved[0]
    assert layer.parameters_after == shapes(count) + shared
    assert layer.active_parameters == shapes(top_k) + shared
    assert layer.bytes_after == 4 * layer.parameters_after
    rest = 1000 + sites[1].parameters
    assert resolved.parameters == rest + layer.parameters_after
    assert resolved.active_parameters == rest + layer.active_parameters
    assert resolved.bytes == 4 * resolved.parameters
    assert resolved.dense_parameters == rest + layer.parameters_before


def test_linear_experts() -> None:
    rule = {"select": {"name": "fc3"}, "experts": 6, "expert": "linear", "top_k": 2}
    layer = resolve([rule], [])[0]
    square, projection = 84 * 84 + 84, 84 * 10 + 10
    assert (layer.name, layer.expert, layer.site.d_ff) == ("fc3", "linear", 0)
    assert layer.parameters_before == projection
    assert layer.parameters_after == 6 * square + 6 * 84 + projection
    assert layer.active_parameters == 2 * square + 6 * 84 + projection
    both = resolve([{"select": "all", "experts": 2}, rule])
    assert [layer.name for layer in both][-1] == "fc3"
    assert "84->84->10" in str(both)


def test_a_linear_inside_a_selected_mlp_is_refused() -> None:
    sites = make_sites(2)
    rules = [
        {"select": "all", "experts": 2},
        {"select": {"name": "*.1.mlp.up"}, "experts": 2, "expert": "linear"},
    ]
    with pytest.raises(PlanError, match=r"`model.layers.1.mlp.up` is part of") as caught:
        resolve(rules, sites, (sites[1].up[0],))
    assert caught.value.path == "layers[1].select"


def test_table() -> None:
    resolved = resolve(Plan.preset("pr-moe"), [*make_sites(8), REFUSED])
    text = str(resolved)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "\x1b" not in text
    for part in ("model.layers.7.mlp", "8->32->8", "coefficient", "whole model"):
        assert part in text
    assert "stay dense (4): model.layers.0.mlp" in text
    assert "refused: model.conv[0]: kernel 3" in text
    assert resolved.to_dict()["refused"] == [{"name": "model.conv[0]", "reason": "kernel 3"}]
    assert [layer.name for layer in resolved] == [
        resolved[position].name for position in range(len(resolved))
    ]
