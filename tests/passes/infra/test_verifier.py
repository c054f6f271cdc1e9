import pytest
import torch
from torch.fx import Graph, GraphModule, symbolic_trace

from moeify.errors import PassError
from moeify.passes.infra.base import PlanContext
from moeify.passes.infra.records import update_record
from moeify.passes.infra.verifier import DEFAULT_RULES, Rule, find_problems, verify_graph

CTX = PlanContext()


def chain():
    return symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))


def nodes(gm):
    return list(gm.graph.nodes)


def broken_rules(gm):
    return {problem.split(":")[0] for problem in find_problems(gm, CTX)}


def test_a_sound_graph_has_no_problems():
    assert find_problems(chain(), CTX) == []


def test_missing_module():
    gm = chain()
    nodes(gm)[1].target = "5"
    with pytest.raises(PassError, match=r"nothing at '5', in %_0 : call_module\[5\]"):
        verify_graph(gm, CTX)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_missing_attribute():
    gm = chain()
    with gm.graph.inserting_before(nodes(gm)[1]):
        gm.graph.get_attr("a.b")
    assert "targets-exist" in broken_rules(gm)


def test_target_that_is_no_module():
    gm = chain()
    nodes(gm)[1].target = "0.weight"
    assert any("'0.weight' is not a module" in problem for problem in find_problems(gm, CTX))


def test_two_names():
    gm = chain()
    nodes(gm)[2].name = nodes(gm)[1].name
    assert "names-are-unique" in broken_rules(gm)


def test_no_output():
    gm = chain()
    gm.graph.erase_node(nodes(gm)[-1])
    assert any("0 output nodes" in problem for problem in find_problems(gm, CTX))


def test_output_is_not_last():
    gm = chain()
    gm.graph.call_function(torch.relu, (nodes(gm)[0],))
    assert "output-is-last" in broken_rules(gm)


def test_user_outside_the_graph():
    gm = chain()
    stranger = nodes(chain())[-1]
    nodes(gm)[1].users[stranger] = None
    assert "uses-agree" in broken_rules(gm)


def test_input_outside_the_graph():
    gm, other = chain(), chain()
    nodes(gm)[2].args = (nodes(other)[1],)
    assert "uses-agree" in broken_rules(gm)


def test_order_is_linted():
    gm = chain()
    nodes(gm)[1].prepend(nodes(gm)[2])
    assert broken_rules(gm) == {"lint"}


def test_nested_graphs_are_verified_under_their_path():
    root = torch.nn.Module()
    root.block = chain()
    graph = Graph()
    graph.output(graph.call_module("block", (graph.placeholder("x"),)))
    gm = GraphModule(root, graph)
    assert find_problems(gm, CTX) == []
    nodes(gm.block)[1].target = "5"
    assert any(p.startswith("targets-exist: block: nothing") for p in find_problems(gm, CTX))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "mlp"}, "a site but no role"),
        ({"role": "up"}, "a role but no site"),
        ({"shapes": ((2, 2),)}, "1 shapes and 0 dtypes"),
    ],
)
def test_records(changes, message):
    gm = chain()
    update_record(nodes(gm)[1], **changes)
    with pytest.raises(PassError, match=message):
        verify_graph(gm, CTX)


def test_a_foreign_record_is_reported():
    gm = chain()
    nodes(gm)[1].meta["moeify"] = "mine"
    assert broken_rules(gm) == {"records-are-whole"}


def test_all_problems_are_listed():
    gm = chain()
    nodes(gm)[1].target, nodes(gm)[2].target = "5", "6"
    with pytest.raises(PassError) as error:
        verify_graph(gm, CTX)
    assert "nothing at '5'" in str(error.value)
    assert "nothing at '6'" in str(error.value)


def test_own_rules_apply_while_their_fact_holds():
    rules = (*DEFAULT_RULES, Rule("no-relu", lambda gm, ctx: ["has a relu"], fact="lowered"))
    assert find_problems(chain(), CTX, rules) == []
    ctx = PlanContext(facts=frozenset({"lowered"}))
    assert find_problems(chain(), ctx, rules) == ["no-relu: has a relu"]
