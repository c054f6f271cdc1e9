import pytest
import torch
from torch.fx import symbolic_trace

from moeify.passes.infra.records import NodeRecord, ParamRef, record_of, set_record, update_record


@pytest.fixture
def node():
    gm = symbolic_trace(torch.nn.Linear(2, 3))
    return next(iter(gm.graph.nodes))


def test_a_node_has_no_record_at_first(node):
    assert record_of(node) is None


def test_set_then_get(node):
    rec = NodeRecord("up", ("", "up"), (ParamRef("up.weight", (3, 2)),), ((4, 3),), ("float32",), 0)
    set_record(node, rec)
    assert record_of(node) == rec


def test_update_keeps_other_fields(node):
    set_record(node, NodeRecord("up", call=2))
    rec = update_record(node, site="mlp", role="up")
    assert rec == NodeRecord("up", call=2, site="mlp", role="up")
    assert record_of(node) is rec


def test_update_of_an_unknown_field_names_it(node):
    with pytest.raises(TypeError, match="colour"):
        update_record(node, colour="red")


def test_records_are_frozen(node):
    rec = update_record(node, site="mlp")
    with pytest.raises(AttributeError):
        rec.site = "other"


def test_something_else_under_the_key_is_an_error(node):
    node.meta["moeify"] = {"site": "mlp"}
    with pytest.raises(TypeError, match="expected a NodeRecord"):
        record_of(node)


def test_a_copied_graph_keeps_its_records(node):
    update_record(node, site="mlp")
    copied = torch.fx.Graph()
    copied.graph_copy(node.graph, {})
    assert [record_of(n) is not None for n in copied.nodes].count(True) == 1
