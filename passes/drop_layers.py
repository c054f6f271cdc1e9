"""drop-layers: take whole layers out of a recorded graph, the hidden state passing them by.

Before::

    h_1 = layers.0(h_0)
    h_2 = layers.1(h_1)
    h_3 = layers.2(h_2)

After, without the second::

    h_1 = layers.0(h_0)
    h_3 = layers.2(h_1)

A layer that gives the rest of the model more than its hidden state (a shared position bias, keys
and values that a later layer reads) is refused. What it only returned to the caller (its cache
entry) is no longer returned.

A conversion keeps all layers: `moeify.distillation.student` runs this pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.errors import UnsupportedModuleError
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import module_path_of
from moeify.passes.match.stacks import Block, Stack


@dataclass(frozen=True, slots=True)
class DropLayers:
    """Take layers out of the graph.

    Args:
        stacks: The stacks of this graph.
        kept: Positions to keep, by the path of their stack; a stack that is missing stays whole.
    """

    stacks: Sequence[Stack]
    kept: Mapping[str, Sequence[int]]
    name: ClassVar[str] = "drop-layers"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.CAPTURED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        alive = set(gm.graph.nodes)
        dropped = [
            block
            for stack in self.stacks
            for at, block in enumerate(stack.blocks)
            if at not in self.kept.get(stack.path, range(len(stack))) and block.out in alive
        ]
        passed: dict[fx.Node, fx.Node] = {}  # what stands for the output of a dropped layer
        for block in dropped:
            passed[block.out] = source = passed.get(block.source, block.source)
            _erase(gm.graph, block, source)
        if dropped:
            for node in reversed(gm.graph.nodes):
                if node.op == "get_attr" and not node.users:
                    gm.graph.erase_node(node)
        return PassResult(gm, bool(dropped))


def _erase(graph: fx.Graph, block: Block, source: fx.Node) -> None:
    inside = set(block.nodes)
    block.out.replace_all_uses_with(source, delete_user_cb=lambda user: user not in inside)
    output = next(iter(graph.find_nodes(op="output")))
    returned = output.args[0]
    if isinstance(returned, tuple | list):
        output.args = (tuple(n for n in returned if n not in inside),)
    for node in reversed(block.nodes):
        reader = next(iter(node.users), None)
        if reader is not None:
            where = module_path_of(reader) or "the model"
            raise UnsupportedModuleError(
                block.path,
                f"cannot be dropped: {where} reads what it computes besides its hidden state "
                f"(%{node.name}); keep this layer",
            )
        graph.erase_node(node)
