import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from moeify.passes.infra.printer import diff_graphs, format_node, print_graph, target_name
from moeify.passes.infra.records import NodeRecord, set_record, update_record


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 8)
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, x, flag=None):
        hidden, rest = F.gelu(self.up(x), approximate="tanh").chunk(2, dim=-1)
        y = torch.cat([hidden * self.scale, rest[..., 1:]], dim=-1)
        return {"y": y.to(torch.float64), "x": (x,), "flag": flag}


def test_golden(golden):
    gm = symbolic_trace(Mlp())
    ShapeProp(gm).propagate(torch.zeros(2, 4), torch.zeros(()))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            update_record(node, module_path="mlp")
    up = next(n for n in gm.graph.nodes if n.op == "call_module")
    set_record(up, NodeRecord("mlp.up", shapes=((2, 8),), dtypes=("float32",), site="m", role="up"))
    golden(print_graph(gm), "printer.txt")


def test_nested_graphs_follow_under_their_path(golden):
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList([symbolic_trace(Mlp()), torch.nn.ReLU()])
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_module("layers.0", (x,))
    graph.output(graph.call_module("layers.1", (y,)))
    golden(print_graph(GraphModule(root, graph)), "printer_nested.txt")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (F.linear, "F.linear"),
        (F.relu, "F.relu"),
        (F.scaled_dot_product_attention, "F.scaled_dot_product_attention"),
        (torch.add, "torch.add"),
        (torch.einsum, "torch.einsum"),
        (torch.Tensor.add, "Tensor.add"),
        (torch.special.expit, "torch.special.special_expit"),
        (torch.ops.aten.mm, "aten.mm"),
        (torch.ops.aten.mm.default, "aten.mm.default"),
        (operator.mul, "operator.mul"),
        (getattr, "getattr"),
        ("layers.0", "layers.0"),
    ],
)
def test_target_name(target, name):
    assert target_name(target) == name


def test_values_print_without_addresses():
    graph = Graph()
    x = graph.placeholder("x")
    args = (x, torch.float16, torch.device("cpu"), float("inf"), object(), ..., None, "text")
    y = graph.call_function(torch.add, args, {"t": torch.zeros(2), "s": slice(None, 2, -1)})
    assert format_node(y) == (
        "%add : call_function[torch.add](%x, float16, cpu, inf, <object>, ..., None, 'text', "
        "t=tensor[2] float32, s=:2:-1)"
    )


def test_a_broken_graph_still_prints():
    gm = symbolic_trace(Mlp())
    up, scale = (n for n in gm.graph.nodes if n.op in ("call_module", "get_attr"))
    up.target, scale.target = "nowhere", "gone.too"
    gm.graph.erase_node(gm.graph.output_node())
    text = print_graph(gm)
    assert "call_module[nowhere](%x)" in text
    assert "get_attr[gone.too]\n" in text


def test_the_text_is_the_same_after_a_copy():
    gm = symbolic_trace(Mlp())
    assert print_graph(gm) == print_graph(GraphModule(gm, gm.graph))


def test_diff_shows_only_what_changed():
    gm = symbolic_trace(Mlp())
    before = print_graph(gm, numbers=False)
    assert diff_graphs(before, gm) == ""
    node = next(n for n in gm.graph.nodes if n.target is F.gelu)
    node.target = F.silu
    changed = [line for line in diff_graphs(before, gm).splitlines() if line[0] in "+-"][2:]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "F.silu" in changed[1]


def test_without_meta_shapes_do_not_show():
    gm = symbolic_trace(Mlp())
    before = print_graph(gm, meta=False)
    update_record(next(iter(gm.graph.nodes)), module_path="elsewhere", site="m")
    assert print_graph(gm, meta=False) == before
    assert print_graph(gm) != before
