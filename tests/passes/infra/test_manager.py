from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule, symbolic_trace

from moeify.errors import (
    CaptureError,
    CheckpointError,
    MoeifyError,
    PassError,
    PassOrderError,
    PlanError,
    UnsupportedModuleError,
)
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.manager import PassManager, order_passes
from moeify.passes.infra.observers import DisableByName, Dump
from moeify.passes.infra.printer import print_graph
from moeify.passes.infra.records import NodeRecord, mark, record_of, set_record, update_record
from moeify.passes.testing import (
    assert_golden,
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)


@dataclass(frozen=True)
class Stub:
    """A pass that does nothing but declare."""

    name: str
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    log: list = field(default_factory=list, compare=False)

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        self.log.append((self.name, ctx.facts))
        return PassResult(gm, False)


@dataclass(frozen=True)
class ReluToSilu:
    name: ClassVar[str] = "relu-to-silu"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"smooth"})

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        found = gm.graph.find_nodes(op="call_function", target=torch.relu)
        for node in found:
            node.target = torch.nn.functional.silu
        return PassResult(gm, bool(found))


def stub(name, requires="", provides="", log=None):
    sets = (frozenset(text.split()) for text in (requires, provides))
    return Stub(name, *sets, log=[] if log is None else log)


def ordered(*passes, given="", fixed=""):
    return [p.name for p in order_passes(passes, frozenset(given.split()), fixed.split())]


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


def test_fixed_passes_keep_their_order():
    a, b, c = stub("a", "", "x"), stub("b", "", "y"), stub("c", "", "z")
    assert ordered(c, b, a, fixed="c b a") == ["c", "b", "a"]
    # A pass of the user's stays where it is declared ...
    assert ordered(a, b, stub("u"), c, fixed="a b c") == ["a", "b", "u", "c"]
    # ... or comes after the last that provides what it requires ...
    last = stub("c", "", "x")
    assert ordered(a, stub("u", "x"), b, last, fixed="a b c") == ["a", "b", "c", "u"]
    # ... and before the first that requires what it provides, with what it requires before it.
    needs = stub("b", "w")
    users = (stub("u", "v", "w"), stub("v", "", "v"))
    assert ordered(a, needs, c, *users, fixed="a b c") == ["a", "v", "u", "b", "c"]


def test_a_fixed_order_that_facts_forbid():
    with pytest.raises(PassOrderError) as error:
        ordered(stub("b", "x"), stub("a", "", "x"), fixed="a b")
    assert str(error.value) == (
        "the passes ask for a cycle: b -> a -> b "
        "(a comes after b because it is listed after it in the pipeline; "
        "b comes after a because it requires 'x')"
    )


def test_duplicate_names():
    with pytest.raises(PassOrderError, match="two passes are named 'a'"):
        ordered(stub("a"), stub("a"))


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
            stub("b", "x", "y", log=log),
        ]
    )
    result = manager.run(gm, CTX)
    assert result.modified is False
    assert log == [
        ("a", frozenset({"captured"})),
        ("b", frozenset({"captured", "x"})),
        ("c", frozenset({"captured", "x", "y"})),
    ]
    assert manager.facts == {"captured", "x", "y"}


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


def without(*names):
    return {"observers": [DisableByName(*names)]}


def test_disabled(gm):
    manager = PassManager([ReluToSilu(), stub("a")], **without("relu-to-silu"))
    assert not manager.run(gm, CTX).modified
    assert str(manager.reports[0]) == "relu-to-silu: disabled"


def test_disabling_a_provider_says_who_needs_it(gm):
    passes = [ReluToSilu(), stub("lower", "smooth")]
    manager = PassManager(passes, **without("relu-to-silu"))
    message = "lower requires 'smooth', which only the disabled relu-to-silu provides"
    with pytest.raises(PassOrderError, match=message):
        manager.run(gm, CTX)


def test_disabling_an_unknown_pass(gm):
    with pytest.raises(MoeifyError, match="cannot disable nope: no such pass; there are a"):
        PassManager([stub("a")], **without("nope")).run(gm, CTX)


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


def test_long_graphs_are_cut_in_notes():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    for _ in range(500):
        node = graph.call_function(torch.neg, (node,))
    graph.output(node)
    error = ValueError("boom")
    with pytest.raises(ValueError):
        PassManager([failing(error)]).run(GraphModule(torch.nn.Module(), graph), CTX)
    assert len(error.__notes__[1].splitlines()) == 42
    assert "463 lines; MOEIFY_DUMP=dir writes all" in error.__notes__[1]


def test_a_dump_takes_the_graph_of_a_failure(gm, tmp_path):
    error = ZeroDivisionError("boom")
    with pytest.raises(ZeroDivisionError):
        PassManager([failing(error)], observers=[Dump(tmp_path)]).run(gm, CTX)
    path = tmp_path / "01-b.failed.txt"
    assert error.__notes__[1] == f"the graph at this point is in {path}"
    assert path.read_text() == print_graph(gm)


@pytest.mark.parametrize(
    "error",
    [
        PlanError("no", path="layers"),
        UnsupportedModuleError("mlp", "no"),
        CaptureError("no"),
        CheckpointError("no"),
    ],
)
def test_what_the_user_has_to_mend_comes_without_the_graph(gm, error, tmp_path):
    with pytest.raises(type(error)):
        PassManager([stub("a"), failing(error)], observers=[Dump(tmp_path)]).run(gm, CTX)
    assert error.__notes__ == ["while running pass 'b', after a"]
    assert not list(tmp_path.glob("*.failed.txt"))


def returning(make):
    class Returns(Stub):
        def run(self, gm, ctx):
            return make(gm)

    return Returns("odd")


def change_silently(gm):
    ReluToSilu().run(gm, CTX)
    return PassResult(gm, False)


def set_parameter(gm):
    gm.inner.weight = torch.nn.Parameter(gm.inner.weight.detach())
    return PassResult(gm, False)


def write_into_a_parameter(gm):
    with torch.no_grad():
        gm.inner.weight.zero_()
    return PassResult(gm, False)


def set_attribute(gm):
    gm.inner.where = "here"
    return PassResult(gm, False)


def replace_module(gm):
    gm.inner = torch.nn.Linear(2, 2)
    return PassResult(gm, False)


def write_records(gm):
    update_record(next(iter(gm.graph.nodes)), site="a", role="input")
    return PassResult(gm, False)


def write_meta(gm):
    gm.meta["decision"] = 1
    return PassResult(gm, False)


def do_both(gm):
    write_records(gm)
    return ReluToSilu().run(gm, CTX)


def do_both_in_meta(gm):
    write_meta(gm)
    set_attribute(gm)
    return PassResult(gm, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda gm: None, "odd returned NoneType; return a PassResult"),
        (lambda gm: PassResult(torch.nn.ReLU(), True), "odd returned a ReLU for the graph"),
        (change_silently, "odd changed the graph and returned modified=False"),
        (set_parameter, r"odd changed inner\.weight and returned modified=False"),
        (write_into_a_parameter, r"odd changed inner\.weight and returned modified=False"),
        (set_attribute, r"odd changed inner\.where and returned modified=False"),
        (replace_module, "odd changed inner and returned modified=False"),
        (write_records, "odd changed the record of %x and returned modified=False"),
        (write_meta, r"odd changed the graph\.meta\['decision'\] and returned modified=False"),
        (lambda gm: PassResult(gm, True), "odd changed nothing and returned modified=True"),
        (do_both, "odd changed the graph and also the record of %x: .* no pass does both"),
        (do_both_in_meta, r"odd changed inner\.where and also the graph\.meta"),
    ],
)
def test_broken_contracts(gm, make, message):
    gm.inner = torch.nn.Linear(2, 2)
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
    with pytest.raises(TypeError, match="object is not a pass: it lacks name, requires, provides"):
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


# Facts with a check


def no_relu(gm, ctx):
    return [f"%{n.name} is one" for n in gm.graph.find_nodes(op="call_function", target=torch.relu)]


CHECKS = {"smooth": no_relu}


def test_a_required_fact_is_looked_for_in_the_graph(gm):
    log = []
    manager = PassManager([stub("lower", "smooth", log=log)], checks=CHECKS)
    stated = PlanContext(facts=frozenset({"smooth"}))
    with pytest.raises(PassOrderError) as caught:
        manager.run(gm, stated)
    assert str(caught.value) == (
        "lower requires 'smooth', which does not hold: %relu is one; no pass here provides it"
    )
    assert not log
    manager.run(symbolic_trace(lambda x: x + 1), PlanContext())  # nobody has to state it
    assert log


def test_a_pass_that_did_not_do_what_it_provides(gm):
    log = []
    passes = [stub("a", "", "smooth"), stub("b", "smooth", log=log)]
    message = "a provides 'smooth', which does not hold after it: %relu is one"
    manager = PassManager(passes, checks=CHECKS)
    with pytest.raises(PassError, match=message):
        manager.run(gm, CTX)
    assert not log
    assert "smooth" not in manager.facts


def test_a_pass_that_undid_a_fact(gm):
    def undo(gm):
        gm.graph.find_nodes(op="call_function", target=torch.nn.functional.silu)[
            0
        ].target = torch.relu
        return PassResult(gm, True)

    passes = [ReluToSilu(), returning(undo), stub("b", "smooth")]
    message = "b requires 'smooth'.* relu-to-silu provided it, and a pass between has undone it"
    with pytest.raises(PassOrderError, match=message):
        PassManager(passes, checks=CHECKS).run(gm, CTX)


def test_disabling_a_pass_that_has_work_to_do(gm):
    passes = [ReluToSilu(), stub("lower", "smooth")]
    manager = PassManager(passes, checks=CHECKS, **without("relu-to-silu"))
    message = "relu-to-silu provides it, and is disabled: disable lower, too"
    with pytest.raises(PassOrderError, match=message):
        manager.run(gm, CTX)
    manager.run(symbolic_trace(lambda x: x + 1), CTX)  # it would have found nothing
    assert "smooth" in manager.facts


def test_long_lists_of_problems_are_cut(gm):
    checks = {"x": lambda gm, ctx: [f"{i} is wrong" for i in range(9)]}
    with pytest.raises(PassOrderError, match="2 is wrong; and 6 more; no pass"):
        PassManager([stub("a", "x")], checks=checks).run(gm, CTX)


# Analysis or transformation


def test_an_analysis_changes_records_only(gm):
    def mark_all(gm):
        changed = [mark(n, site="a", role="b") for n in gm.graph.nodes]
        return PassResult(gm, any(changed))

    manager = PassManager([returning(mark_all)])
    assert manager.run(gm, CTX).modified
    assert str(manager.reports[0]).startswith("odd: wrote down what it found, ")
    assert not manager.run(gm, CTX).modified
    assert str(manager.reports[0]).startswith("odd: nothing changed, ")


def test_a_transformation_may_change_modules_only(gm):
    def set_training(gm):
        return PassResult(gm.eval(), True)

    manager = PassManager([returning(set_training)])
    manager.run(gm, CTX)
    text = "odd: the same 4 nodes, what they call or read changed, "
    assert str(manager.reports[0]).startswith(text)


def test_records_of_new_nodes_belong_to_the_transformation(gm):
    def replace(gm):
        (old,) = gm.graph.find_nodes(op="call_function", target=torch.relu)
        with gm.graph.inserting_before(old):
            new = gm.graph.call_function(torch.tanh, old.args)
        set_record(new, record_of(old) or NodeRecord("act"))
        old.replace_all_uses_with(new)
        gm.graph.erase_node(old)
        return PassResult(gm, True)

    assert PassManager([returning(replace)]).run(gm, CTX).modified


# Helpers for tests


def test_before_and_after(gm):
    text = before_and_after(ReluToSilu(), gm, CTX)
    before, after = text.removeprefix("before\n").split("\nafter\n")
    assert "torch.relu" in before
    assert "F.silu" in after
    with pytest.raises(AssertionError, match="relu-to-silu found nothing to do in\ngraph:"):
        before_and_after(ReluToSilu(), gm, CTX)


def test_assert_untouched(gm):
    with pytest.raises(AssertionError, match=r"must find nothing to do here[\s\S]*F\.silu"):
        assert_untouched(ReluToSilu(), gm, CTX)
    assert_untouched(ReluToSilu(), gm, CTX)


def test_assert_requires():
    class Lowers(ReluToSilu):
        name = "lowers"
        requires = frozenset({Fact.RESOLVED})

    gm = symbolic_trace(model)
    assert "no plan applied" in assert_requires(Lowers(), Fact.RESOLVED, gm)
    with pytest.raises(AssertionError, match="lowers refuses for another reason: lowers requires"):
        assert_requires(Lowers(), Fact.MLP_SITES, gm)
    with pytest.raises(AssertionError, match="b ran without 'smooth'"):
        assert_requires(stub("b"), "smooth", gm)
