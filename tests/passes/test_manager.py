from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule, symbolic_trace

from moeify.errors import MoeifyError, PassError, PassOrderError
from moeify.passes.base import Fact, Pass, PassResult, PlanContext
from moeify.passes.manager import PassManager, order_passes
from moeify.passes.printer import print_graph
from moeify.passes.testing import assert_golden, assert_idempotent, run_pass


@dataclass(frozen=True)
class Stub:
    """A pass that does nothing but declare."""

    name: str
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    invalidates: frozenset[str] = frozenset()
    log: list = field(default_factory=list, compare=False)

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        self.log.append((self.name, ctx.facts))
        return PassResult(gm, False)


@dataclass(frozen=True)
class ReluToSilu:
    name: ClassVar[str] = "relu-to-silu"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.CAPTURED})
    provides: ClassVar[frozenset[str]] = frozenset({"smooth"})

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        found = gm.graph.find_nodes(op="call_function", target=torch.relu)
        for node in found:
            node.target = torch.nn.functional.silu
        return PassResult(gm, bool(found))


def stub(name, requires="", provides="", invalidates="", log=None):
    sets = (frozenset(text.split()) for text in (requires, provides, invalidates))
    return Stub(name, *sets, log=[] if log is None else log)


def ordered(*passes, given=""):
    return [p.name for p in order_passes(passes, frozenset(given.split()))]


def model(x):
    return torch.relu(x) + 1


@pytest.fixture
def gm():
    return symbolic_trace(model)


CTX = PlanContext(facts=frozenset({Fact.CAPTURED}))


# Order


def test_providers_come_first():
    assert ordered(stub("b", "x"), stub("a", provides="x")) == ["a", "b"]


def test_all_providers_come_first():
    assert ordered(stub("c", "x"), stub("a", "", "x"), stub("b", "", "x")) == ["a", "b", "c"]


def test_users_of_a_fact_come_before_it_is_broken():
    passes = (
        stub("shard", "moe", "sharded", "whole"),
        stub("verify", "moe whole"),
        stub("replace", "sites", "moe"),
        stub("find", "", "sites whole"),
    )
    assert ordered(*passes) == ["find", "replace", "verify", "shard"]


def test_declaration_decides_the_rest():
    assert ordered(stub("c"), stub("a"), stub("b")) == ["c", "a", "b"]


def test_given_facts_need_no_provider():
    assert ordered(stub("a", "x"), given="x") == ["a"]


def test_enum_and_string_are_the_same_fact():
    moe = Stub("b", frozenset({Fact.MOE_BLOCKS}))
    assert ordered(moe, stub("a", "", "moe-blocks")) == ["a", "b"]


def test_missing_provider_names_fact_and_pass():
    with pytest.raises(PassOrderError, match="shard requires 'moe-blocks', which no other pass"):
        order_passes([Stub("shard", frozenset({Fact.MOE_BLOCKS}))])


def test_a_pass_does_not_provide_for_itself():
    with pytest.raises(PassOrderError, match="a requires 'x'"):
        ordered(stub("a", "x", "x"))
    assert ordered(stub("a", "x", "x"), given="x") == ["a"]


def test_cycle_is_told_with_its_facts():
    with pytest.raises(PassOrderError) as error:
        ordered(stub("z"), stub("a", "y", "x"), stub("b", "x", "y"))
    assert str(error.value) == (
        "the passes ask for a cycle: a -> b -> a "
        "(b comes after a because it requires 'x'; a comes after b because it requires 'y')"
    )


def test_cycle_through_invalidation():
    with pytest.raises(PassOrderError, match="a comes after b because it invalidates 'y'"):
        ordered(stub("a", "", "x", "y"), stub("b", "x", "y"))


def test_duplicate_names():
    with pytest.raises(PassOrderError, match="two passes are named 'a'"):
        ordered(stub("a"), stub("a"))


def test_provide_and_invalidate():
    with pytest.raises(PassOrderError, match="both provides and invalidates 'x'"):
        ordered(stub("a", "", "x", "x"))


@given(st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_any_acyclic_pipeline_is_ordered(order, pairs):
    needs = {(a, b) for a, b in pairs if a < b}
    passes = [stub(f"p{i}", " ".join(f"f{a}" for a, b in needs if b == i), f"f{i}") for i in order]
    names = ordered(*passes)
    assert sorted(names) == sorted(p.name for p in passes)
    assert all(names.index(f"p{a}") < names.index(f"p{b}") for a, b in needs)
    assert names == ordered(*passes)


# Running


def test_runs_in_order_and_tracks_facts(gm):
    log = []
    manager = PassManager(
        [
            stub("c", "y", log=log),
            stub("a", "", "x", log=log),
            stub("b", "x", "y", "captured", log=log),
        ]
    )
    result = manager.run(gm, CTX)
    assert result.modified is False
    assert log == [
        ("a", frozenset({"captured"})),
        ("b", frozenset({"captured", "x"})),
        ("c", frozenset({"x", "y"})),
    ]
    assert manager.facts == {"x", "y"}


def test_the_graph_is_recompiled_and_reported(gm):
    manager = PassManager([ReluToSilu()])
    result = manager.run(gm, CTX)
    x = torch.randn(3)
    assert torch.equal(result.graph_module(x), torch.nn.functional.silu(x) + 1)
    (report,) = manager.reports
    assert (report.name, report.modified, report.skipped) == ("relu-to-silu", True, False)
    assert report.ops == {"F.silu": 1, "torch.relu": -1}
    assert report.nodes_before == report.nodes_after == 4
    assert str(report).startswith("relu-to-silu: 4 -> 4 nodes, +1 F.silu, -1 torch.relu, ")


def test_nested_graph_modules_are_recompiled():
    @dataclass(frozen=True)
    class Inner(ReluToSilu):
        name: ClassVar[str] = "inner"

        def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
            return PassResult(gm, ReluToSilu().run(gm.block, ctx).modified)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = symbolic_trace(model)

        def forward(self, x):
            return self.block(x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, qualname):
            return True

    root = Outer()
    nested = GraphModule(root, Tracer().trace(root))
    x = torch.randn(3)
    out = run_pass(Inner(), nested).graph_module(x)
    assert torch.equal(out, torch.nn.functional.silu(x) + 1)


def test_idempotent(gm):
    assert "F.silu" in print_graph(assert_idempotent(ReluToSilu(), gm))


def test_assert_idempotent_catches(gm):
    class Grows(ReluToSilu):
        name = "grows"

        def run(self, gm, ctx):
            out = gm.graph.output_node()
            with gm.graph.inserting_before(out):
                out.args = (gm.graph.call_function(torch.neg, out.args),)
            return PassResult(gm, True)

    with pytest.raises(AssertionError, match=r"grows run twice: modified=True[\s\S]*neg_1"):
        assert_idempotent(Grows(), gm)


def test_a_missing_fact_is_found_before_anything_runs(gm):
    log = []
    manager = PassManager([stub("a", "", "x", log=log), stub("b", "x moe", log=log)])
    assert manager.requires == {"moe"}
    with pytest.raises(PassOrderError, match="b requires 'moe', which does not hold"):
        manager.run(gm, CTX)
    assert log == []


def test_composed_facts():
    manager = PassManager(
        [stub("a", "in", "x"), stub("b", "x", "y", "x in"), stub("c", "y", "z")], name="inner"
    )
    assert isinstance(manager, Pass)
    assert manager.requires == {"in"}
    assert manager.provides == {"y", "z"}
    assert manager.invalidates == {"x", "in"}


def test_a_manager_runs_inside_another(gm):
    log = []
    inner = PassManager([stub("b", "x", "y", log=log), ReluToSilu()], name="inner")
    outer = PassManager([inner, stub("c", "y", log=log), stub("a", "", "x", log=log)])
    assert [p.name for p in outer.passes] == ["a", "inner", "c"]
    assert outer.run(gm, CTX).modified
    assert [name for name, _ in log] == ["a", "b", "c"]
    assert [r.name for r in inner.reports] == ["b", "relu-to-silu"]


def test_disabled(gm):
    manager = PassManager([ReluToSilu(), stub("a")], disabled=frozenset({"relu-to-silu"}))
    assert not manager.run(gm, CTX).modified
    assert str(manager.reports[0]) == "relu-to-silu: disabled"


def test_disabling_a_provider_says_who_needs_it(gm):
    passes = [ReluToSilu(), stub("lower", "smooth")]
    manager = PassManager(passes, disabled=frozenset({"relu-to-silu"}))
    message = "lower requires 'smooth', which only the disabled relu-to-silu provides"
    with pytest.raises(PassOrderError, match=message):
        manager.run(gm, CTX)


def test_disabling_an_unknown_pass(gm):
    with pytest.raises(MoeifyError, match="cannot disable nope: no such pass; there are a"):
        PassManager([stub("a")], disabled=frozenset({"nope"})).run(gm, CTX)


# Failure


def failing(error, at="b"):
    class Fails(Stub):
        def run(self, gm, ctx):
            raise error

    return Fails(at)


def test_failure_keeps_the_exception_and_adds_notes(gm):
    error = ZeroDivisionError("boom")
    with pytest.raises(ZeroDivisionError) as caught:
        PassManager([stub("a"), failing(error), stub("c")]).run(gm, CTX)
    assert caught.value is error
    first, second = error.__notes__
    assert first == "while running pass 'b', after a"
    assert "call_function[torch.relu](%x)" in second


def test_failure_in_a_nested_manager_prints_the_graph_once(gm):
    error = ZeroDivisionError("boom")
    inner = PassManager([failing(error)], name="inner")
    with pytest.raises(ZeroDivisionError):
        PassManager([stub("a"), inner]).run(gm, CTX)
    assert [note.splitlines()[0] for note in error.__notes__] == [
        "while running pass 'b', after no other pass",
        "the graph at this point:",
        "while running pass 'inner', after a",
    ]


def test_long_graphs_are_cut_in_notes():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    for _ in range(500):
        node = graph.call_function(torch.neg, (node,))
    graph.output(node)
    error = ValueError("boom")
    with pytest.raises(ValueError):
        PassManager([failing(error)]).run(GraphModule(torch.nn.Module(), graph), CTX)
    assert len(error.__notes__[1].splitlines()) == 202
    assert "303 lines; MOEIFY_DUMP=dir writes all" in error.__notes__[1]


def returning(make):
    class Returns(Stub):
        def run(self, gm, ctx):
            return make(gm)

    return Returns("odd")


def change_silently(gm):
    ReluToSilu().run(gm, CTX)
    return PassResult(gm, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda gm: None, "odd returned NoneType; return a PassResult"),
        (lambda gm: PassResult(torch.nn.ReLU(), True), "odd returned a ReLU for the graph"),
        (change_silently, "odd changed the graph and returned modified=False"),
    ],
)
def test_broken_contracts(gm, make, message):
    with pytest.raises(PassError, match=message):
        PassManager([returning(make)]).run(gm, CTX)


def test_a_broken_graph_is_a_pass_error(gm):
    def break_it(gm):
        gm.graph.erase_node(gm.graph.output_node())
        return PassResult(gm, True)

    with pytest.raises(PassError, match="0 output nodes") as caught:
        PassManager([returning(break_it)]).run(gm, CTX)
    assert "while running pass 'odd'" in caught.value.__notes__[0]


def test_the_note_prints_the_graph_that_the_pass_returned(gm):
    def replace_by_broken(gm):
        new = symbolic_trace(lambda x: torch.tanh(x))
        new.graph.erase_node(new.graph.output_node())
        return PassResult(new, True)

    with pytest.raises(PassError) as caught:
        PassManager([returning(replace_by_broken)]).run(gm, CTX)
    assert "torch.tanh" in caught.value.__notes__[1]


def test_what_is_no_pass():
    with pytest.raises(TypeError, match="object is no pass: it lacks name, requires, provides"):
        PassManager([object()])
    with pytest.raises(TypeError, match=r"give an instance: ReluToSilu\(\)"):
        PassManager([ReluToSilu])


# Golden files


def test_assert_golden(tmp_path):
    path = tmp_path / "deep" / "text.txt"
    with pytest.raises(AssertionError, match="no golden file"):
        assert_golden("one", path)
    assert_golden("one", path, update=True)
    assert_golden("one", path)
    with pytest.raises(AssertionError, match=r"--update-golden[\s\S]*\n-one\n\+two"):
        assert_golden("two", path)
