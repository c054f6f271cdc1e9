import logging
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx import GraphModule, symbolic_trace

from moeify.errors import MoeifyError, PassOrderError
from moeify.passes.infra.base import PassResult, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.observers import Dump, Observer, Timing, observers_from_env


@dataclass(frozen=True)
class NegToAbs:
    name: ClassVar[str] = "neg-to-abs"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"positive"})

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        found = gm.graph.find_nodes(op="call_function", target=torch.neg)
        for node in found:
            node.target = torch.abs
        return PassResult(gm, bool(found))


@dataclass(frozen=True)
class CheckPositive:
    name: ClassVar[str] = "check-positive"
    requires: ClassVar[frozenset[str]] = frozenset({"positive"})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        return PassResult(gm, False)


@pytest.fixture
def gm():
    return symbolic_trace(lambda x: torch.neg(x))


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="moeify.passes")
    return lambda: [record.getMessage() for record in caplog.records]


def run(gm, *observers):
    return PassManager([NegToAbs(), CheckPositive()], observers=observers).run(gm, PlanContext())


def run_env(gm, **environ):
    return run(gm, *observers_from_env(environ))


def test_nothing_set_nothing_observed():
    assert observers_from_env({}) == []


def test_log_passes(gm, messages):
    run_env(gm, MOEIFY_LOGS="passes")
    first, second = messages()
    assert first.startswith("neg-to-abs: 3 -> 3 nodes, +1 torch.abs, -1 torch.neg, ")
    assert second.startswith("check-positive: nothing changed, ")


def test_log_graphs(gm, messages):
    run_env(gm, MOEIFY_LOGS="graph")
    before, after = messages()
    assert before.startswith("before all passes\ngraph:\n")
    assert "torch.neg" in before
    assert after.startswith("after neg-to-abs\n")


def test_log_timing(gm, messages):
    run_env(gm, MOEIFY_LOGS="timing")
    (text,) = messages()
    assert text.splitlines()[0] == "time by pass"
    assert text.splitlines()[-1].split()[0] == "total"
    assert len(text.splitlines()) == 4


def test_timing_of_no_passes(gm, messages):
    PassManager([], observers=[Timing()]).run(gm, PlanContext())
    assert "total" in messages()[0]


@pytest.mark.parametrize(
    ("value", "count"), [("all", 2), ("check-positive", 1), ("neg-to-abs, check-positive", 2)]
)
def test_print_after(gm, messages, value, count):
    run_env(gm, MOEIFY_PRINT_AFTER=value)
    assert len(messages()) == count
    assert all("torch.abs" in message for message in messages())


def test_disable(gm):
    manager_observers = observers_from_env({"MOEIFY_DISABLE": "neg-to-abs,check-positive"})
    assert not run(gm, *manager_observers).modified


def test_disable_what_others_need(gm):
    with pytest.raises(PassOrderError, match="only the disabled neg-to-abs provides"):
        run_env(gm, MOEIFY_DISABLE="neg-to-abs")


@pytest.mark.parametrize("variable", ["MOEIFY_DISABLE", "MOEIFY_PRINT_AFTER"])
def test_unknown_pass(gm, variable):
    message = "neg-to-bas: no such pass; there are neg-to-abs, check-positive"
    with pytest.raises(MoeifyError, match=message):
        run_env(gm, **{variable: "neg-to-bas"})


def test_unknown_log():
    with pytest.raises(MoeifyError, match="no log named speed; there are passes, graph, timing"):
        observers_from_env({"MOEIFY_LOGS": "passes,speed"})


def test_dump(gm, tmp_path):
    run_env(gm, MOEIFY_DUMP=str(tmp_path / "stages"))
    files = {path.name: path.read_text() for path in (tmp_path / "stages").iterdir()}
    assert sorted(files) == [
        "00-capture.txt",
        "01-neg-to-abs.diff",
        "01-neg-to-abs.txt",
        "02-check-positive.diff",
        "02-check-positive.txt",
    ]
    assert "torch.neg" in files["00-capture.txt"]
    assert "-  %neg : call_function[torch.neg]" in files["01-neg-to-abs.diff"]
    assert files["02-check-positive.diff"] == ""


def test_a_second_run_goes_on_with_the_numbers(gm, tmp_path):
    dump = Dump(tmp_path)
    for _ in range(2):
        PassManager([NegToAbs()], observers=[dump]).run(gm, PlanContext())
    names = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert names == ["00-capture.txt", "01-neg-to-abs.txt", "02-capture.txt", "03-neg-to-abs.txt"]


def test_end_is_called_after_a_failure(gm):
    class Ends(Observer):
        count = None

        def end(self, reports):
            self.count = len(reports)

    class Fails(CheckPositive):
        def run(self, gm, ctx):
            raise ZeroDivisionError

    ends = Ends()
    with pytest.raises(ZeroDivisionError):
        PassManager([NegToAbs(), Fails()], observers=[ends]).run(gm, PlanContext())
    assert ends.count == 1


def test_logs_reach_stderr_where_no_handler_is_configured(repo):
    code = (
        "import torch; from moeify.passes.infra.base import PlanContext\n"
        "from moeify.passes.infra.manager import PassManager\n"
        "from moeify.passes.infra.observers import observers_from_env\n"
        "gm = torch.fx.symbolic_trace(lambda x: torch.neg(x))\n"
        "manager = PassManager([], observers=observers_from_env({'MOEIFY_LOGS': 'graph'}))\n"
        "manager.run(gm, PlanContext())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repo, check=True
    )
    assert "call_function[torch.neg]" in done.stderr
    assert done.stdout == ""
