"""Finding the repeated residual blocks of a model: its layers, as a recorded graph shows them.

A stack is a row of modules in one `ModuleList` or `Sequential`, called once each and in order, of
one class, each a map from a hidden state to one of the same shape, which also reaches the output
past all projections. What nearly is one is kept with the reason; names of modules decide
nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx, nn

from moeify.capture.capture import Capture
from moeify.capture.recorder import ModuleCall
from moeify.passes.match.operations import (
    CASTS,
    DROPOUTS,
    ELEMENTWISE,
    OVER_WIDTH,
    VIEWS,
    op_name,
    shape_of,
    strip,
)

_PASSES = ELEMENTWISE | OVER_WIDTH | VIEWS | CASTS | DROPOUTS | {"native_layer_norm", "pow"}
"""What a hidden state may pass through on the residual path: no projection, no attention."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One layer of a stack."""

    path: str
    source: fx.Node  # the hidden state that it takes
    out: fx.Node  # the hidden state that it returns
    nodes: tuple[fx.Node, ...]  # what ran inside it, in order


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A row of layers."""

    path: str  # the container
    blocks: tuple[Block, ...]  # its layers, in execution order
    # "encoder" or "decoder" where the decoder's layers read what the encoder returns
    role: str = ""

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class Miss:
    """A container that is not a stack."""

    path: str  # the container
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def find_stacks(model: nn.Module, found: Capture) -> tuple[list[Stack], list[Miss]]:
    """Return the stacks of a model in execution order, and what nearly is one."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in found.calls:
        calls.setdefault(call.path, []).append(call)
    stacks: list[Stack] = []
    misses: list[Miss] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in stacks)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        result = _read(path, module, calls, found)
        if isinstance(result, Stack):
            result = _staged(model, result, misses) or result
        if isinstance(result, Stack):
            stacks.append(result)
        elif result is not None:
            misses.append(result)
    order = {node: at for at, node in enumerate(found.graph_module.graph.nodes)}
    stacks.sort(key=lambda stack: order[stack.blocks[0].nodes[0]])
    return _with_roles(stacks), misses


def _read(
    path: str,
    module: nn.ModuleList | nn.Sequential,
    calls: dict[str, list[ModuleCall]],
    found: Capture,
) -> Stack | Miss | None:
    """Return a container as a stack, why it is not one, or None where it is nothing like one."""
    children = [(f"{path}.{key}" if path else key, child) for key, child in module._modules.items()]
    if not children or any(child is None for _, child in children):
        return None
    runs = [calls.get(name, []) for name, _ in children]
    often = next((i for i, run in enumerate(runs) if len(run) > 1), None)
    if often is not None:
        return Miss(path, f"block {often} runs {len(runs[often])} times: layers share its weights")
    if len(children) < 2 or not all(runs):
        return None
    kinds = [type(child) for _, child in children]
    if len(set(kinds)) > 1:
        names = " and ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        return Miss(path, f"its blocks are of different classes ({names})")
    blocks = []
    for (name, _), (call,) in zip(children, runs, strict=True):
        block = _block(name, call, found)
        if isinstance(block, str):
            return Miss(path, f"{name}: {block}")
        blocks.append(block)
    for before, after in itertools.pairwise(blocks):
        if shape_of(before.out) != shape_of(after.out):
            was, now = list(shape_of(before.out)), list(shape_of(after.out))
            return Miss(path, f"the hidden state changes its shape: {was}, then {now}")
        if strip(after.source) is not strip(before.out):
            return Miss(path, f"{after.path}: does not take just what {before.path} returns")
    return Stack(path, tuple(blocks))


def _block(path: str, call: ModuleCall, found: Capture) -> Block | str:
    nodes = tuple(found.nodes[call.start : call.end])
    if not call.outputs or not nodes:
        return "returns no tensor"
    out = call.outputs[0]
    inside = set(nodes)
    same_shape = [node for _, node in call.inputs if shape_of(node) == shape_of(out)]
    if not same_shape:
        return f"returns a hidden state of another shape ({list(shape_of(out))}) than it takes"
    source = next((node for node in same_shape if _reaches(node, out, inside)), None)
    if source is None:
        return "has no residual path from its input to its output"
    return Block(path, source, out, nodes)


def _reaches(source: fx.Node, out: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether a value comes out past all projections, and something is added to it."""
    todo, seen = [(source, False)], set()
    while todo:
        node, added = todo.pop()
        if node is out and added:
            return True
        for user in node.users:
            name = op_name(user)
            if user not in inside or name not in _PASSES:
                continue
            values = [n for n in user.all_input_nodes if n.op != "get_attr" and n is not node]
            step = (user, added or (name in ("add", "radd") and bool(values)))
            if step not in seen:
                seen.add(step)
                todo.append(step)
    return False


def _staged(model: nn.Module, stack: Stack, misses: list[Miss]) -> Miss | None:
    """Refuse a stack that is a stage of several, whose widths or depths belong together."""
    for miss in misses:
        around = model.get_submodule(miss.path) if miss.path else model
        if stack.path.startswith(f"{miss.path}.") and "different classes" not in miss.reason:
            count = len(list(around.children()))
            return Miss(stack.path, f"is one of {count} stages of {miss.path} ({miss.reason})")
    return None


def _with_roles(stacks: list[Stack]) -> list[Stack]:
    """Name the encoder and the decoder of a model that has one of each."""
    if len(stacks) != 2:
        return stacks
    first, second = stacks
    downstream, todo = {first.blocks[-1].out}, [first.blocks[-1].out]
    inside = {node for block in second.blocks for node in block.nodes}
    crossed = False
    while todo:
        for user in todo.pop().users:
            crossed |= user in inside
            if user not in downstream and user not in inside:
                downstream.add(user)
                todo.append(user)
    if not crossed or second.blocks[0].source in downstream:
        return stacks
    return [
        Stack(first.path, first.blocks, "encoder"),
        Stack(second.path, second.blocks, "decoder"),
    ]
